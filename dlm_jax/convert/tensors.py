# SPDX-License-Identifier: Apache-2.0
"""Tensors of a model directory by name, mapped from disk: read when and where they are needed."""

import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from dlm_jax.convert import files
from dlm_jax.errors import InputError

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jax.numpy.bfloat16}


class Tensors:
  """The tensors of model.safetensors or of its shards; only the headers are read at first.

  A tensor is a slice of the mapped file, so a device receives its part of it and nothing else is
  held in memory.

  Raises:
    InputError: a shard is missing or damaged, two hold one name, or a tensor is no float.
  """

  def __init__(self, directory: pathlib.Path | str):
    self._found: dict[str, tuple[pathlib.Path, np.memmap, DTypeLike, tuple[int, ...]]] = {}
    for file in files.shards(pathlib.Path(directory)):
      for name, entry in _entries(file):
        if name in self._found:
          raise InputError(f"{file}: tensor {name} is in another shard as well.")
        self._found[name] = (file, *entry)

  def __iter__(self) -> Iterator[str]:
    return iter(self._found)

  def __contains__(self, name: str) -> bool:
    return name in self._found

  def shape(self, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor."""
    return self._found[name][3]

  def source(self, name: str) -> pathlib.Path:
    """Return the file that holds a tensor."""
    return self._found[name][0]

  def read(self, name: str) -> np.ndarray:
    """Return a tensor as an array over the mapped file."""
    _, data, dtype, shape = self._found[name]
    return data.view(np.dtype(dtype)).reshape(shape)

  def place(self, name: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Return a tensor on devices; each process reads only what its devices hold."""
    value = self.read(name)
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    read: Callable = lambda index: np.array(value[index])  # noqa: E731
    return jax.make_array_from_callback(value.shape, sharding, read)


def _entries(file: pathlib.Path):
  """Yield (name, (bytes, dtype, shape)) of one file, after the library has checked its header."""
  try:
    with safe_open(str(file), "numpy"):
      pass
    with file.open("rb") as stream:
      size = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(size))
    mapped = np.memmap(file, np.uint8, "r", offset=8 + size)
  except FileNotFoundError:
    raise InputError(f"{file} is missing; fetch the checkpoint again.") from None
  except (OSError, ValueError, SafetensorError) as error:
    raise InputError(f"{file} cannot be read: {error}; fetch it again.") from None
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    if entry["dtype"] not in _DTYPES:
      raise InputError(f"{file}: tensor {name} is {entry['dtype']}, not floating-point.")
    begin, end = entry["data_offsets"]
    yield name, (mapped[begin:end], _DTYPES[entry["dtype"]], tuple(entry["shape"]))
