# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of a file written by torch.save, without torch and without running anything.

Such a file is a zip archive: `data.pkl`, a pickle that describes the objects, and one raw file per
storage below `data/`. A pickle names functions to call, so a hostile one runs whatever it likes.
The unpickler here imports nothing. It knows these names and refuses every other:

  torch._utils._rebuild_tensor_v2, _rebuild_parameter   become `Tensor`, read when asked for
  torch.FloatStorage and its siblings                   become the name of a dtype
  torch.Size, collections.OrderedDict, containers and
  scalars of builtins                                   are themselves
  what training frameworks store beside the weights     becomes an empty placeholder: the object is
  (INERT: configurations and tokenizers)                not built and its contents are dropped
"""

import collections
import io
import pathlib
import pickle
import zipfile
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlm_jax.errors import InputError

# Objects of these packages are replaced by empty placeholders.
INERT = ("omegaconf", "transformers", "tokenizers", "lightning", "pytorch_lightning")
_INERT_NAMES = (  # how pickles spell bytes, types, … that we have no use for
  "_codecs.encode",
  "builtins.bytes",
  "builtins.bytearray",
  "collections.defaultdict",
  "torch.device",
  "typing.Any",
)
_DTYPES = {
  "float64": np.dtype(np.float64),
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(jnp.bfloat16),
  "int64": np.dtype(np.int64),
  "int32": np.dtype(np.int32),
  "int16": np.dtype(np.int16),
  "int8": np.dtype(np.int8),
  "uint8": np.dtype(np.uint8),
  "bool": np.dtype(np.bool_),
}
_STORAGES = {
  "torch.DoubleStorage": "float64",
  "torch.FloatStorage": "float32",
  "torch.HalfStorage": "float16",
  "torch.BFloat16Storage": "bfloat16",
  "torch.LongStorage": "int64",
  "torch.IntStorage": "int32",
  "torch.ShortStorage": "int16",
  "torch.CharStorage": "int8",
  "torch.ByteStorage": "uint8",
  "torch.BoolStorage": "bool",
}
_PLAIN = {
  "collections.OrderedDict": collections.OrderedDict,
  "torch.Size": tuple,
  **{
    f"builtins.{t.__name__}": t
    for t in (bool, complex, dict, float, frozenset, int, list, set, str, tuple)
  },
}


class Tensor:
  """A tensor in a file; `numpy.asarray` reads it.

  Attributes:
    shape: sizes.
    dtype: the numpy dtype.
  """

  def __init__(self, path: pathlib.Path, entry: str, dtype: str, layout: tuple):
    self._path, self._entry = path, entry
    self._offset, self.shape, self._strides = layout
    self.dtype = _DTYPES[dtype]

  def __setstate__(self, state):
    raise pickle.UnpicklingError("a tensor with a state")

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    size = self.dtype.itemsize
    try:
      with zipfile.ZipFile(self._path) as archive:
        data = archive.read(self._entry)
      array = np.ndarray(
        self.shape, self.dtype, data, self._offset * size, [size * n for n in self._strides]
      )
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
      raise InputError(f"{self._path}: {self._entry} is damaged: {error}") from None
    return array if dtype is None else array.astype(dtype)


def read(path: pathlib.Path | str) -> Any:
  """Return the object that torch.save wrote, every tensor as a `Tensor`.

  Raises:
    InputError: the file is no zip archive of torch.save, it is damaged, or it names a class that
      is not known here. Nothing of the file has run then.
  """
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      zipped = file.read(4) == b"PK\x03\x04"
    if not zipped:
      raise InputError(
        f"{path} is not in the zip format of torch.save; older files are bare pickles, which may "
        "run code and are never opened. Save it again with torch 1.6 or later, or as safetensors."
      )
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
      roots = [name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")]
      if len(roots) != 1:
        raise InputError(f"{path} holds {len(roots)} data.pkl; torch.save writes one.")
      if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise InputError(f"{path} is a compressed archive; torch.save does not compress.")
      order = f"{roots[0]}byteorder"
      if order in names and archive.read(order) != b"little":
        raise InputError(f"{path} is big-endian; only little-endian files load.")
      description = archive.read(f"{roots[0]}data.pkl")
    return _Unpickler(path, roots[0], description).load()
  except InputError:
    raise
  except Exception as error:  # a damaged pickle fails in any way whatever
    raise InputError(f"{path} cannot be read: {error or type(error).__name__}") from None


class _Unpickler(pickle.Unpickler):
  """Build known objects only. What it hands out is made per file: a pickle cannot alter ours."""

  def __init__(self, path, root, description):
    super().__init__(io.BytesIO(description))
    self._path, self._root = path, root

  def find_class(self, module, name):
    """Return a stand-in for a global; called for every name in the pickle."""
    full = f"{module.replace('__builtin__', 'builtins')}.{name}"
    if full == "torch._utils._rebuild_tensor_v2":
      return lambda *args: self._tensor(*args)
    if full == "torch._utils._rebuild_parameter":
      return lambda data, requires_grad, hooks: data
    if full in _STORAGES:
      return _STORAGES[full]
    if full in _PLAIN:
      return _PLAIN[full]
    if full in _INERT_NAMES or module.split(".")[0] in INERT:
      return _placeholder()
    raise InputError(
      f"{self._path} holds a {full}; only tensors, containers and numbers are read. Nothing of it "
      "was run."
    )

  def persistent_load(self, pid):
    """Return (entry of the archive, dtype) of a storage."""
    kind, dtype, key, _, _ = pid
    if kind != "storage" or dtype not in _DTYPES or not isinstance(key, str):
      raise pickle.UnpicklingError(f"an unknown kind of storage: {pid!r}")
    return f"{self._root}data/{key}", dtype

  def _tensor(self, storage, offset, shape, strides, *_):
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
      raise pickle.UnpicklingError(f"a tensor of impossible shape {shape!r}, strides {strides!r}")
    entry, dtype = storage
    return Tensor(self._path, entry, dtype, (offset, tuple(shape), tuple(strides)))


def _placeholder():
  """Return a class whose objects swallow what a pickle does to them."""

  class Placeholder:
    def __init__(self, *args, **kwargs):
      pass

    def __setstate__(self, state):
      pass

    def __setitem__(self, key, value):
      pass

    def append(self, item):
      pass

    def add(self, item):
      pass

  return Placeholder
