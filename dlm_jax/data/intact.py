# SPDX-License-Identifier: Apache-2.0
"""Whether the files of a prepared dataset are those that were written.

checksums.json holds the CRC-32 of every file. Small ones are checked when a dataset is opened;
records, a second per GB, once one cannot be read, which their format notices: to name the file.
"""

import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

import numpy as np

from dlm_jax import json_file
from dlm_jax.errors import InputError

FILE = "checksums.json"
ADVICE = "prepare it again into a new directory."
_RECORDS = ".array_record"
# TFDS imports the module of any class that features.json names, under several keys and also inside
# of texts: so all texts in it must be among those that we write.
_TFDS = "tensorflow_datasets.core.features"
_TEXTS = (f"{_TFDS}.features_dict.FeaturesDict", f"{_TFDS}.tensor_feature.Tensor")
_TEXTS += ("none", "int32", "bool")


def write(directory: pathlib.Path, paths: Iterable[pathlib.Path]) -> pathlib.Path:
  """Write checksums.json of files below a directory; return its path."""
  sums = {path.relative_to(directory).as_posix(): _sum(path) for path in paths}
  (directory / FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
  return directory / FILE


def check(directory: pathlib.Path) -> None:
  """Compare all files but the records with what was written.

  Raises:
    InputError: one differs.
  """
  for name, wanted in _sums(directory).items():
    if _RECORDS not in name and _sum(directory / name) != wanted:
      raise InputError(f"{directory} is damaged or changed: {name}; {ADVICE}")


def check_features(file: pathlib.Path) -> None:
  """Refuse features of classes that we do not write; none is imported.

  Args:
    file: features.json of TFDS.

  Raises:
    InputError: it names others, or cannot be read.
  """
  try:
    content = json_file.read(file)
  except (OSError, ValueError) as error:
    why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    raise InputError(f"{file.parents[2]} cannot be opened by TFDS: {file.name}: {why}.") from error
  foreign = {t for t in _texts(content) if t not in _TEXTS and not re.fullmatch(r"-?\d+", t)}
  if foreign:
    named = ", ".join(text[:60] for text in sorted(foreign)[:3])
    raise InputError(
      f"{file.parents[2]} holds features of {named}, which is not ours and is not imported; "
      f"{ADVICE}"
    )


class Split:
  """The records of a split as TFDS reads them; one that is damaged is one line.

  Args:
    directory: of the dataset.
    name: of the split.
    source: of TFDS.
  """

  def __init__(self, directory: pathlib.Path, name: str, source: Any):
    self._directory, self._name, self._source = directory, name, source

  def __len__(self) -> int:
    return len(self._source)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return (self[index] for index in range(len(self)))

  def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
    try:
      return self._source[index]
    except IndexError:
      raise
    except Exception as error:  # its readers raise many types; all mean the same to a user
      why = str(error).partition("\n")[0].strip()[:200] or type(error).__name__
      raise InputError(
        f"{self._directory}: record {index} of {self._name} cannot be read from "
        f"{self._damaged()}: {why}; {ADVICE}"
      ) from error

  def _damaged(self) -> str:
    """Return the shards whose sum is another, else all that the record may be in."""
    shards = sorted(self._directory.rglob(f"*-{self._name}{_RECORDS}*"))
    sums, names = _sums(self._directory), [p.relative_to(self._directory) for p in shards]
    pairs = [(p, sums.get(n.as_posix())) for p, n in zip(shards, names, strict=True)]
    changed = [p.name for p, wanted in pairs if wanted is not None and _sum(p) != wanted]
    return " and ".join(changed or [path.name for path in shards[:3]]) or "its file, which is gone"


def _texts(node: Any) -> Iterator[str]:
  """Yield all texts among the values of parsed JSON."""
  pending = [node]
  while pending:
    node = pending.pop()
    if isinstance(node, str):
      yield node
    elif isinstance(node, dict | list):
      pending += node.values() if isinstance(node, dict) else node


def _sums(directory) -> dict[str, int]:
  """Return the sums by file; none of a dataset of before they were written."""
  try:
    content = json_file.read(directory / FILE)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise InputError(f"{directory} is damaged or changed: {FILE}; {ADVICE}") from error
  if not isinstance(content, dict) or any(pathlib.PurePath(n).is_absolute() for n in content):
    raise InputError(f"{directory} is damaged or changed: {FILE}; {ADVICE}")
  return content


def _sum(path) -> int | None:
  """Return the CRC-32 of a file; None: it cannot be read."""
  total = 0
  try:
    with path.open("rb") as stream:
      while block := stream.read(2**22):
        total = zlib.crc32(block, total)
  except OSError:
    return None
  return total
