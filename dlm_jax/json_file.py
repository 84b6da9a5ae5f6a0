# SPDX-License-Identifier: Apache-2.0
"""The one reader of JSON: files, lines and texts, whoever wrote them.

Python's own reader follows nesting until the stack ends, takes NaN for a number and the last of
two fields of one name. Here all three are refused. What a field may hold, `fields` declares.
"""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from etils import epath

from dlm_jax import disk, fields, remote

DEPTH = 100  # of objects and lists in each other; public files have about ten
MOST_BYTES = 2**28  # of a file: the largest public tokenizers have a tenth of it


def read(path: epath.PathLike, *, finite: bool = True) -> Any:
  """Return what a file says; arguments as for `parse`.

  Raises:
    OSError: it is missing, cannot be read, or is no regular file: a pipe could wait for ever.
    ValueError: as `parse`.
  """
  if remote.is_remote(path):
    return parse(epath.Path(path).read_bytes(), finite=finite)
  file = pathlib.Path(path)
  disk.check_file(file)
  if (size := os.stat(file).st_size) > MOST_BYTES:
    raise ValueError(f"it has {size} bytes, and the most for such a file is {MOST_BYTES}")
  return parse(file.read_bytes(), finite=finite)


def read_object(path: epath.PathLike, *, finite: bool = True) -> dict[str, Any]:
  """Return the object that a file holds.

  Raises:
    OSError, ValueError: as `read`; or it holds something else.
  """
  content = read(path, finite=finite)
  if not isinstance(content, dict):
    raise ValueError(f"it holds {fields.named(content)}, not an object")
  return content


def parse(text: str | bytes, *, finite: bool = True, twice: bool = True) -> Any:
  """Return what a text says.

  Args:
    text: a byte-order mark is dropped.
    finite: refuse NaN and infinity, which JSON has not and Python writes.
    twice: let a name be there twice if it says the same.

  Raises:
    ValueError: it is no JSON, not UTF-8, too deep, or contradicts itself; the line says where, and
      leaves the name of the file to the caller.
  """
  if isinstance(text, bytes):
    text = text.decode("utf-8")  # its error is a ValueError
  more: dict[str, Callable] = {"parse_constant": _no_constant} if finite else {}
  try:
    hook = _object if twice else _once
    value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=hook, **more)
  except RecursionError:
    raise ValueError(_TOO_DEEP) from None
  if _deeper(value, DEPTH):
    raise ValueError(_TOO_DEEP)
  return value


def plain(value: Any, default: Callable[[Any], Any] | None = None) -> Any:
  """Return a value as it reads back from JSON: tuples as lists, the rest by `default`."""
  return json.loads(json.dumps(value, default=default))


_TOO_DEEP = f"it is nested more than {DEPTH} deep"


def _object(pairs):
  """Return an object; a name that is there twice must say the same."""
  content = dict(pairs)
  if len(content) < len(pairs):
    for name, value in pairs:
      if content[name] != value:
        raise ValueError(f"it has the field {name!r} twice, with different values")
  return content


def _once(pairs):
  content = dict(pairs)
  if len(content) < len(pairs):
    names = [name for name, _ in pairs]
    name = next(name for name in content if names.count(name) > 1)
    raise ValueError(f"it has the field {name!r} twice")
  return content


def _no_constant(name):
  raise ValueError(f"{name} is no number of JSON")


def _deeper(value, most: int) -> bool:
  """Tell whether lists and objects lie in each other more than so deep; without recursion."""
  level = [value] if isinstance(value, dict | list) else []
  for _ in range(most):
    level = [
      inner
      for outer in level
      for inner in (outer.values() if isinstance(outer, dict) else outer)
      if isinstance(inner, dict | list)
    ]
    if not level:
      return False
  return True
