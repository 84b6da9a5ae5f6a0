# SPDX-License-Identifier: Apache-2.0
"""Networks that come with the package, loaded by hash. `README.md` here says how they were made."""

import hashlib
import json
import pathlib

from dlm_jax import json_file
from dlm_jax.errors import InputError, hint

_HERE = pathlib.Path(__file__).parent
_HELD_OUT = "held_out.txt"


def names() -> list[str]:
  """Return what can be loaded as "shipped:NAME"."""
  return sorted({file.split("/")[0] for file in _hashes()})


def denoisers() -> list[str]:
  """Return those of `names()` that can be sampled from: all but the judges."""
  return [name for name in names() if not name.endswith("judge")]


def path(name: str) -> pathlib.Path:
  """Return the directory of a shipped network after checking its files.

  Args:
    name: one of `names()`, e.g. "novels-student".

  Raises:
    InputError: no such network, or a file differs from what was shipped.
  """
  known = names()
  if name not in known:
    raise InputError(f"shipped:{name} is unknown{hint(name, known)}; found: {', '.join(known)}.")
  for file, expected in _hashes().items():
    if file.startswith(f"{name}/") and digest(_HERE / file) != expected:
      raise InputError(f"{_HERE / file} is damaged: its SHA-256 differs; reinstall the package.")
  return _HERE / name


def held_out(name: str) -> str:
  """Return the held-out text that a judge came with: what real text scores is measured on it.

  Args:
    name: of a judge, e.g. "novels-judge".

  Raises:
    InputError: no such network, it has no such text, or a file is damaged.
  """
  file = path(name) / _HELD_OUT
  if not file.exists():
    raise InputError(f"shipped:{name} came without held-out text.")
  return file.read_text(encoding="utf-8")


def digest(file: pathlib.Path) -> str:
  """Return the SHA-256 of a file, or "" if it is missing."""
  return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def write_hashes() -> None:
  """Record the SHA-256 of every shipped file; run once when networks are replaced."""
  files = sorted(f for f in _HERE.glob("*/*") if f.is_file() and "__pycache__" not in f.parts)
  hashes = {file.relative_to(_HERE).as_posix(): digest(file) for file in files}
  (_HERE / "sha256.json").write_text(json.dumps(hashes, indent=2) + "\n")


def _hashes() -> dict[str, str]:
  """Return the SHA-256 of every shipped file by its path below this folder."""
  return json_file.read_object(_HERE / "sha256.json")
