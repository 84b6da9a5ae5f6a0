# SPDX-License-Identifier: Apache-2.0
"""A case: a command on damaged files or with strange flags; the child that runs it; the verdict."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zlib
from typing import Any

import bases
import mutations
import tiny_runs
from hypothesis import strategies as st

_LONGEST = 3000  # characters of a line


class Child:
  """The process that runs commands, see `child`; it outlives what they do to it."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    ends = [os.pipe(), os.pipe()]
    (theirs, self._requests), (self._answers, into) = ends
    program = pathlib.Path(__file__).with_name("child.py")
    self._process = subprocess.Popen(
      [sys.executable, "-P", str(program), str(theirs), str(into)],
      pass_fds=(theirs, into),
      env=tiny_runs.environment(1),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
    )
    os.close(theirs), os.close(into)
    self._lines = os.fdopen(self._answers, "rb")

  def run(self, argv, files: pathlib.Path | None = None, changed=None) -> dict[str, Any]:
    """Run a command on a copy of files; return code, out, err, and what it left.

    Args:
      argv: the command.
      files: folder that is ../it for the command.
      changed: name → content of files in it that are others, or what stands at their place.
    """
    place = self._folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    (place / "here").mkdir(parents=True)
    if files is not None:
      shutil.copytree(files, place / "it", copy_function=shutil.copyfile)
    for name, content in (changed or {}).items():
      if isinstance(content, str):
        mutations.place(place / "it" / name, content)
      else:
        (place / "it" / name).write_bytes(content)
    request = {"argv": list(argv), "folder": str(place / "here")}
    os.write(self._requests, json.dumps(request).encode() + b"\n")
    line = self._lines.readline()
    if not line:
      raise RuntimeError("the child of the fuzz tests ended; see its errors above")
    left = sorted(p.relative_to(place / "here").as_posix() for p in (place / "here").rglob("*"))
    return {**json.loads(line), "left": left}

  def close(self) -> None:
    """End the process."""
    os.close(self._requests)
    self._lines.close()
    self._process.wait(30)


def complaint(verdict: dict[str, Any], writes: bool = False) -> str:
  """Return what is wrong with how a command ended; "" if it worked, or failed in one line."""
  code, out, err, left = (verdict[key] for key in ("code", "out", "err", "left"))
  if code in (0, None):
    return ""
  if code != 2:
    return f"ended with {code}"
  if out:
    return "failed and wrote to stdout"
  if len(err.splitlines()) != 1 or not err.startswith("dlm-jax") or len(err) > _LONGEST:
    return f"failed in {len(err.splitlines())} lines of {len(err)} characters"
  if not err.removesuffix("\n").isprintable():
    return "failed in a line that is not printable"
  return f"failed and left {left}" if left and not writes else ""


def damaged(found: list[bases.Base]) -> st.SearchStrategy:
  """Return (base, {file: steps}) of damage to one file, seldom two."""

  def steps(form):
    often = [mutations.mutation(form)] * 15
    return st.one_of(*often, mutations.instead())

  def of(base):
    one = st.sampled_from(sorted(base.files)).flatmap(
      lambda name: st.tuples(st.just(name), steps(base.files[name]))
    )
    return st.tuples(st.just(base), st.lists(one, min_size=1, max_size=2).map(dict))

  # Commands that begin a workdir take ten times as long as others.
  return st.sampled_from([base for base in found for _ in range(1 if base.writes else 4)]).flatmap(
    of
  )


def try_damage(child: Child, base: bases.Base, changes) -> tuple[str, str]:
  """Run a command on damaged files; return (complaint, how to see it again)."""
  changed = {name: _changed(base, name, steps) for name, steps in changes.items()}
  if base.summed:
    changed = _summed(base.folder, changed)
  verdict = child.run(base.argv, base.folder, changed)
  wrong = complaint(verdict, base.writes)
  shown = {name: content[:600] for name, content in changed.items()}
  return wrong, f"{base.name}: {' '.join(base.argv)}\nsteps: {changes}\nfiles: {shown}\n{verdict}"


def _changed(base, name, steps) -> bytes | str:
  """Return the content of a damaged file, or what stands at its place."""
  if steps[0][0] == "instead of it":
    return steps[0][1]
  return mutations.apply(base.files[name], (base.folder / name).read_bytes(), steps)


def _summed(folder: pathlib.Path, changed: dict[str, bytes]) -> dict[str, bytes]:
  """Return changed files with the sizes and sums that belong to them: damage with intent."""
  told, sums = (json.loads((folder / name).read_bytes()) for name in _SUMS)
  for name, content in changed.items():
    if isinstance(content, str):
      continue
    if name in sums:
      sums[name] = zlib.crc32(content)
    if name in told["files"]:
      told["files"][name] = len(content)
  written = json.dumps(sums).encode()
  told["files"]["checksums.json"] = len(written)
  return {_SUMS[0]: json.dumps(told).encode(), _SUMS[1]: written} | changed


_SUMS = ("dataset.json", "checksums.json")


def try_flags(child: Child, argv, writes: bool) -> tuple[str, str]:
  """Run a command with strange flags; return (complaint, how to see it again)."""
  verdict = child.run(argv)
  return complaint(verdict, writes), f"argv: {argv}\n{verdict}"
