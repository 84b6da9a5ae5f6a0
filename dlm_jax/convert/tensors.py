# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors files by name, mapped from disk: read when and where they are needed."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dlm_jax import disk, json_file
from dlm_jax.errors import InputError

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "F8_E4M3": jnp.float8_e4m3fn,
  "F8_E5M2": jnp.float8_e5m2,
  "F8_E8M0": jnp.float8_e8m0fnu,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


class Tensors(Mapping[str, np.ndarray]):
  """The tensors of one file or of several shards; only the headers are read at first.

  A tensor is an array over the mapped file, so a device receives its part of it and nothing else is
  held in memory.

  Raises:
    InputError: a file is missing or damaged, or two tensors have one name.
  """

  def __init__(self, files: Sequence[pathlib.Path]):
    self._found: dict[str, tuple[pathlib.Path, np.ndarray, Any, tuple[int, ...]]] = {}
    for file in files:
      for name, entry in _entries(file):
        if name in self._found:
          raise InputError(f"{file}: tensor {name} is in another shard as well.")
        self._found[name] = (file, *entry)

  def __iter__(self) -> Iterator[str]:
    return iter(self._found)

  def __len__(self) -> int:
    return len(self._found)

  def __getitem__(self, name: str) -> np.ndarray:
    _, data, dtype, shape = self._found[name]
    return data.view(np.dtype(dtype)).reshape(shape)

  def source(self, name: str) -> pathlib.Path:
    """Return the file that holds a tensor."""
    return self._found[name][0]


def _entries(file: pathlib.Path):
  """Yield (name, (bytes, dtype, shape)) of one file, after the library has checked its header."""
  try:
    disk.check_file(file)
    with safe_open(str(file), "numpy"):
      pass
    with file.open("rb") as stream:
      size = int.from_bytes(stream.read(8), "little")
      header = json_file.parse(stream.read(size), twice=False)
    mapped = np.memmap(file, np.uint8, "r")[8 + size :]
  except FileNotFoundError:
    raise InputError(f"{file} is missing; fetch the checkpoint again.") from None
  except (OSError, ValueError, SafetensorError) as error:
    why = getattr(error, "strerror", None) or error
    raise InputError(
      f"{file} cannot be read: it is not a readable safetensors file ({why}); fetch it again."
    ) from None
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    if entry["dtype"] not in _DTYPES:
      raise InputError(f"{file}: tensor {name} is {entry['dtype']}; known: {', '.join(_DTYPES)}.")
    begin, end = entry["data_offsets"]
    yield name, (mapped[begin:end], _DTYPES[entry["dtype"]], tuple(entry["shape"]))
