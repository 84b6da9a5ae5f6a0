# SPDX-License-Identifier: Apache-2.0
"""The frontier: quality against the number of network evaluations (NFE), for several models."""

import contextlib
import csv
import dataclasses
import json
import math
import operator
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from dlm_jax import disk, draw, json_file
from dlm_jax.errors import InputError, check_counts
from dlm_jax.evaluate import generative, tables
from dlm_jax.evaluate._samplers import (
  Sampler,
  TemplateSampler,
  check_room,
  numbers,
  refuse_unless,
)
from dlm_jax.evaluate.judge import JudgeWithTokens
from dlm_jax.evaluate.reference import Reference
from dlm_jax.train import progress

__all__ = [
  "Reference",
  "Sampler",
  "SamplerFactory",
  "TemplateSampler",
  "check_room",
  "checked_nfes",
  "draw_samples",
  "numbers",
  "refuse_unless",
  "sweep",
  "sweep_progress",
  "table",
  "write",
]
Row = dict[str, Any]
COLUMNS = (
  "name",
  "nfe",
  "evaluations",
  "genppl",
  "genppl_se",
  "entropy",
  "entropy_se",
  "correlation",
  "distinct_4",
  "samples",
  "tokens",
  "seconds",
  "seed",
  "options",
  "context",
)
AXES = {  # what quality may be plotted against: the axis' title
  "nfe": "network evaluations per sample (NFE)",
  "evaluations": "network evaluations made per sample, of all networks",
  "seconds": "milliseconds per sample, drawn in batches",
}
_BEFORE = {"correlation": 0.0, "distinct_4": math.nan}  # of rows that have none yet
_IDENTITY = ("name", "nfe", "samples", "seed", "options", "context")


@runtime_checkable
class SamplerFactory(Protocol):
  """What `sweep` compares: `factory(batch, nfe)` prepares a function from a key to tokens [B, L].

  Whatever may take long and is not sampling (compilation) belongs in the factory; only the calls
  of the returned function are timed. An attribute `options`, if present, is recorded, and a method
  `evaluations(nfe)`, if present, gives those that are made: guides and the removal of noise make
  more than `nfe`, and a sample of L masks needs at most L.
  """

  def __call__(self, batch: int, nfe: int) -> Callable[[jax.Array], Any]: ...


def sweep(
  samplers: Mapping[str, SamplerFactory],
  nfes: Sequence,
  *,
  judge: JudgeWithTokens,
  samples: int = 512,
  batch_size: int = 64,
  valid_NL: np.ndarray | None = None,
  seed: int = 0,
  context: Mapping[str, Any] | None = None,
  path: str | os.PathLike | None = None,
  on_row: Callable[[Row, int, int], None] | None = None,
) -> list[Row]:
  """Measure GenPPL and entropy of every sampler at every NFE.

  With `path`, finished rows go to a JSON-lines file, and a later call skips those of the same name,
  NFE, samples, seed, options and context: let `context` hold what else decides the numbers.

  Args:
    samplers: see `SamplerFactory`, by the name to plot them under.
    nfes: numbers of network evaluations, integers ≥ 1; doubles are dropped. "first_hitting" is
      measured once, with as many as a text has tokens: the exact limit of masks.
    judge: see `load_judge`; it knows how many samples it reads at a time.
    samples: samples per row.
    batch_size: samples drawn at a time.
    valid_NL: bool [samples, L], False where samples were given: not judged. None: nowhere.
    seed: every sampler sees the same keys.
    context: recorded in every row, e.g. {"student_step": 400, "judge": "gpt2-large"}.
    path: JSON-lines file of finished rows, created with its folder.
    on_row: called with each row, its number from 1, and how many there are, skipped rows too.

  Returns:
    Rows with the keys of `COLUMNS`, by sampler. `seconds` is the time to draw, not to compile.

  Raises:
    InputError: no sampler, no NFE, an NFE or a count below 1, a `path` that cannot be read or
      written or that another process writes, or samples that are given in part and a judge with
      another tokenizer.
  """
  nfes = checked_nfes(nfes)
  check_counts(samplers=len(samplers), samples=samples, batch_size=batch_size)
  generative.check_translated(judge.retokenise, valid_NL)

  def measure(factory, key):
    tokens_BL, seconds = draw_samples(factory, key["nfe"], samples, min(batch_size, samples), seed)
    result = judge.quality(tokens_BL, valid_NL=valid_NL)
    count = factory.evaluations(key["nfe"]) if hasattr(factory, "evaluations") else key["nfe"]
    measured = dataclasses.asdict(result) | {"seconds": seconds, "evaluations": count}
    return _row(key | measured)

  fixed = {"samples": samples, "seed": seed, "context": dict(context or {})}
  rows, jobs = [], []
  for name, factory in samplers.items():
    own = getattr(factory, "nfes", list)(nfes)
    jobs += [(name, factory, nfe) for nfe in own]
  with _finished(path) as finished:
    for name, factory, nfe in jobs:
      options = dict(getattr(factory, "options", {}))
      key = _plain(fixed | {"name": name, "nfe": nfe, "options": options})
      row = finished.find(key) or finished.add(measure(factory, key))
      rows.append(row)
      if on_row is not None:
        on_row(row, len(rows), len(jobs))
  return rows


def write(
  rows: Sequence[Row],
  directory: str | os.PathLike,
  *,
  reference: Reference | None = None,
  axes: Sequence[str] = ("nfe",),
  stem: str = "frontier",
) -> dict[str, pathlib.Path]:
  """Write `frontier.csv`, `frontier.json` and `frontier.png`; return their paths by suffix.

  Args:
    rows: of `sweep`.
    directory: created if needed.
    reference: horizontal lines of the plot.
    axes: keys of `AXES` to plot against; all but "nfe" go to frontier_KEY.png.
    stem: of the file names.

  Raises:
    InputError: there are no rows, or the directory cannot be written.
  """
  from dlm_jax.evaluate import _plot

  if not rows:
    raise InputError("there are no frontier rows to write; sweep at least one model and NFE.")
  directory = pathlib.Path(directory)
  paths = {suffix: directory / f"{stem}.{suffix}" for suffix in ("csv", "json")}
  pictures = {x: f"{stem}.png" if x == "nfe" else f"{stem}_{x}.png" for x in axes}
  paths |= {name.removeprefix(f"{stem}."): directory / name for name in pictures.values()}
  try:
    directory.mkdir(parents=True, exist_ok=True)
    _write_csv(rows, paths["csv"])
    write_json(rows, paths["json"], reference)
    for x, name in pictures.items():
      trade = x == "nfe" and stem == "frontier"  # matched entropies have none
      _plot.save(rows, directory / name, reference, x=x, title=AXES[x], trade=trade)
  except OSError as error:
    raise InputError(f"{directory} cannot be written: {disk.refusal(error) or error}.") from error
  return paths


def table(rows: Sequence[Row]) -> str:
  """Return the rows as a Markdown table whose columns are also aligned as plain text.

  "all nets" counts the evaluations made, of all networks, where they are not the NFE everywhere.
  """
  varied = any(math.isfinite(row["distinct_4"]) for row in rows)
  counted = any(row["evaluations"] != row["nfe"] for row in rows)
  header = (
    "model",
    "NFE",
    *(("all nets",) if counted else ()),
    "GenPPL",
    "entropy (nats)",
    *(("distinct 4-grams",) if varied else ()),
    "samples",
    "seconds",
  )
  cells = [
    (
      row["name"],
      str(row["nfe"]),
      *((str(row["evaluations"]),) if counted else ()),
      generative.plus_minus(row["genppl"], row["genppl_se"]),
      generative.plus_minus(row["entropy"], row["entropy_se"], 2),
      *((f"{row['distinct_4']:.3f}",) if varied else ()),
      f"{row['samples']:,}",
      f"{row['seconds']:.1f}",
    )
    for row in rows
  ]
  return tables.markdown(header, cells)


def checked_nfes(nfes: Sequence) -> list[int]:
  """Return the NFEs without doubles.

  Raises:
    InputError: the list is empty, or one is not a whole number of at least 1.
  """
  if len(nfes) == 0:
    raise InputError("the list of NFEs is empty; give at least one, e.g. 4,8,16.")
  for nfe in nfes:
    try:
      good = operator.index(nfe) >= 1 and not isinstance(nfe, bool)
    except TypeError:
      good = False
    if not good:
      raise InputError(f"NFE {nfe!r} is not a whole number of at least 1; e.g. 4,8,16.")
  check_counts(**{"the largest NFE": max(map(operator.index, nfes))})
  return list(dict.fromkeys(operator.index(nfe) for nfe in nfes))


def draw_samples(factory, nfe, samples, batch, seed) -> tuple[np.ndarray, float]:
  """Return int32 [samples, L] and the seconds they took.

  Batches have one size; what the last one has too many is dropped, and its time is not counted.

  Raises:
    InputError: a token was drawn from logits that are no numbers.
  """
  if hasattr(factory, "draw"):
    tokens_NL, seconds = factory.draw(nfe, samples, batch, seed)
  else:
    tokens_NL, seconds = _in_batches(factory, nfe, samples, batch, seed)
  refuse_unless(not np.any(tokens_NL == draw.NONE))
  return tokens_NL, seconds


def _in_batches(factory, nfe, samples, batch, seed):
  run = factory(batch, nfe)
  rng = jax.random.fold_in(draw.key(seed), nfe)
  rngs = [jax.random.fold_in(rng, i) for i in range(-(-samples // batch))]
  start = time.perf_counter()
  drawn = [np.asarray(run(rng)) for rng in rngs]
  seconds = (time.perf_counter() - start) * samples / (batch * len(drawn))
  return np.concatenate(drawn)[:samples], seconds


@contextlib.contextmanager
def _finished(path: str | os.PathLike | None) -> Iterator["_Finished"]:
  """Hold a file of rows as the only one who writes it."""
  if path is None:
    yield _Finished(None)
    return
  path = pathlib.Path(path)
  with disk.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  with disk.alone(path):
    yield _Finished(path)


class _Finished:
  """Rows already on disk; each new one is flushed before the next is begun."""

  def __init__(self, path: pathlib.Path | None):
    self._path, self._rows = path, []
    if path is None:
      return
    with disk.writing(path):
      disk.check_file(path)
      text = path.read_bytes() if path.exists() else b""
    lines, whole = text.splitlines(), text.endswith(b"\n")
    for number, line in enumerate(lines, start=1):
      # A kill in the middle of a row leaves its beginning, and nothing behind it.
      torn = number == len(lines) and not whole and line.startswith(b"{")
      self._rows += self._parse(line, number, torn)
    with disk.writing(path):  # so that a torn line does not swallow the next row
      part = path.with_name(path.name + ".part")
      part.write_text("".join(json.dumps(row) + "\n" for row in self._rows), encoding="utf-8")
      part.replace(path)

  def _parse(self, line, number, torn):
    try:
      return [_row(_BEFORE | json_file.parse(line, finite=False))]
    except (ValueError, TypeError, KeyError) as error:
      if torn:
        return []
      raise InputError(
        f"line {number} of {self._path} is no frontier row; move the file away and run again."
      ) from error

  def find(self, key: Row) -> Row | None:
    same = (row for row in self._rows if all(row[name] == key[name] for name in _IDENTITY))
    return next(same, None)

  def add(self, row: Row) -> Row:
    self._rows.append(row)
    if self._path is not None:
      with disk.writing(self._path), self._path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _row(values: Mapping[str, Any]) -> Row:
  return {column: values[column] for column in COLUMNS}


def _plain(key: Row) -> Row:
  """Return the key as it reads back from JSON: arrays as lists, what JSON has not by its repr."""

  def encode(value):
    return np.asarray(value).tolist() if hasattr(value, "__array__") else repr(value)

  return json_file.plain(key, encode)


def write_json(rows: Sequence[Row], path: pathlib.Path, reference: Reference | None) -> None:
  """Write rows, and what real text scores, as `write` does; NaN and infinities as null."""

  def finite(value):  # JSON knows no NaN
    if isinstance(value, Mapping):
      return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

  content = {
    "rows": [finite(row) for row in rows],
    "reference": reference and finite(dataclasses.asdict(reference)),
  }
  path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_csv(rows, path):
  with path.open("w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    for row in rows:
      nested = {name: json.dumps(row[name]) for name in ("options", "context")}
      writer.writerow(row | nested)


@contextlib.contextmanager
def sweep_progress(total: int):
  """Show a sweep's progress in network evaluations; yields what `frontier.sweep` calls per row."""
  with progress.Bar("frontier, NFE", total) as bar:

    def on_row(row, number, count):
      text = (
        f"{row['name']} at {row['nfe']}: GenPPL {row['genppl']:.1f}, entropy {row['entropy']:.2f} "
        f"({row['samples']} samples)"
      )
      if bar.disable:  # no terminal: lines, as training has them
        print(f"frontier: {number}/{count}, {text}", file=sys.stderr, flush=True)
      bar.parts = (text,)
      bar.update(row["nfe"])

    yield on_row
