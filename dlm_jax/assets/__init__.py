# SPDX-License-Identifier: Apache-2.0
"""Networks that come with the package, loaded by hash. `README.md` here says how they were made."""

import hashlib
import json
import pathlib

from dlm_jax.errors import InputError

_HERE = pathlib.Path(__file__).parent


def path(name: str) -> pathlib.Path:
  """Return the directory of a shipped network after checking its files.

  Args:
    name: "teacher" or "judge".

  Raises:
    InputError: no such network, or a file differs from what was shipped.
  """
  hashes = json.loads((_HERE / "sha256.json").read_text())
  names = sorted({file.split("/")[0] for file in hashes})
  if name not in names:
    raise InputError(f"shipped:{name} is unknown; found: {', '.join(names)}.")
  for file, expected in hashes.items():
    if file.startswith(f"{name}/") and digest(_HERE / file) != expected:
      raise InputError(f"{_HERE / file} is damaged: its SHA-256 differs; reinstall the package.")
  return _HERE / name


def digest(file: pathlib.Path) -> str:
  """Return the SHA-256 of a file, or "" if it is missing."""
  return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def write_hashes() -> None:
  """Record the SHA-256 of every shipped file; run once when networks are replaced."""
  files = sorted(f for f in _HERE.glob("*/*") if f.is_file() and "__pycache__" not in f.parts)
  hashes = {file.relative_to(_HERE).as_posix(): digest(file) for file in files}
  (_HERE / "sha256.json").write_text(json.dumps(hashes, indent=2) + "\n")
