# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of a file written by torch.save, without torch and without running anything.

Such a file is a zip archive: `data.pkl`, a pickle that describes the objects, and one raw file per
storage below `data/`. The pickle is read by `pickles`, which calls nothing; what a torch file may
name, and what becomes of it, is said here:

  torch._utils._rebuild_tensor_v2, _v3, _rebuild_parameter   a `Tensor`, read when asked for
  torch.FloatStorage and its siblings, torch.float8_e4m3fn   the name of a dtype
  collections.OrderedDict                                    a dict
  INERT: what lies beside the weights (configurations,       an empty placeholder: the object is not
  paths, times, numpy numbers, optimisers' classes)          built and its contents are dropped

Every other name is refused.
"""

import math
import pathlib
import zipfile
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlm_jax import disk
from dlm_jax.convert import pickles
from dlm_jax.convert.pickles import PLACEHOLDER, Global, PickleError
from dlm_jax.errors import InputError

# Packages whose objects become placeholders, whatever they are.
INERT = (
  *("omegaconf", "transformers", "tokenizers", "lightning", "pytorch_lightning"),
  *("lightning_fabric", "lightning_utilities", "datetime", "zoneinfo", "torch.optim", "torch.nn"),
)
# Names that do, one by one: their modules have functions as well, which nobody stores.
_INERT_NAMES = {
  *("_codecs.encode", "typing.Any", "functools.partial", "copyreg._reconstructor"),
  *(f"builtins.{name}" for name in ("bool", "bytearray", "bytes", "complex", "dict", "float")),
  *(f"builtins.{name}" for name in ("frozenset", "int", "list", "object", "set", "slice")),
  *(f"builtins.{name}" for name in ("range", "str", "tuple")),
  *(f"collections.{name}" for name in ("Counter", "defaultdict", "deque")),
  *("argparse.Namespace", "types.SimpleNamespace", "decimal.Decimal", "fractions.Fraction"),
  *("uuid.UUID", "uuid.SafeUUID", "torch.device", "torch.Size", "torch.Generator"),
  *("torch.Tensor", "torch._tensor.Tensor"),
  *("torch.torch_version.TorchVersion", "torch.serialization.LoadEndianness"),
  *(f"numpy.{name}" for name in ("dtype", "ndarray", "random._pickle.__randomstate_ctor")),
  *(
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
  ),
  *(
    f"{module}.{name}"
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
  ),
}
_DTYPES = {
  "float64": np.dtype(np.float64),
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(jnp.bfloat16),
  "float8_e4m3fn": np.dtype(jnp.float8_e4m3fn),
  "float8_e5m2": np.dtype(jnp.float8_e5m2),
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
  "torch.storage.UntypedStorage": "uint8",  # the tensor says what it is made of
}
# dtypes as values: fields of configurations, and what a tensor of an untyped storage is made of
_TYPE_NAMES = {f"torch.{name}" for name in (*_DTYPES, "complex64", "complex128", "uint16")}


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

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    size = self.dtype.itemsize
    numbers = math.prod(self.shape)
    steps = (step * (count - 1) for step, count in zip(self._strides, self.shape, strict=True))
    reach = self._offset + sum(steps) + 1 if numbers else 0
    try:
      with zipfile.ZipFile(self._path) as archive:
        held = archive.getinfo(self._entry).file_size // size
        if max(reach, numbers) > held:  # strides of 0 would make much out of little
          raise ValueError(f"a tensor of {max(reach, numbers)} numbers in a storage of {held}")
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
    disk.check_file(path)
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
    names = _Names(path, roots[0])
    return pickles.read(description, names.known, names.call, names.persistent, path.stat().st_size)
  except InputError:
    raise
  except Exception as error:  # a damaged pickle fails in any way whatever
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise InputError(f"{path} cannot be read: {why}") from None


class _Names:
  """What the names in a torch file mean."""

  def __init__(self, path, root):
    self._path, self._root = path, root

  def known(self, name):
    """Refuse a name that no object beside weights has; called for every name in the pickle."""
    inert = name in _INERT_NAMES or any(name.startswith(f"{package}.") for package in INERT)
    if inert or name in _STORAGES or name in _TYPE_NAMES or name in _CALLS:
      return
    shown = name if name.isprintable() and len(name) <= 200 else repr(name[:200])
    raise InputError(
      f"{self._path} holds a {shown}; only tensors, containers and numbers are read, and inert "
      "objects beside them dropped. Nothing of it was run."
    )

  def call(self, name, arguments):
    """Return what stands for the object that a call would make."""
    return _CALLS[name](self, *arguments) if name in _CALLS else PLACEHOLDER

  def persistent(self, pid):
    """Return (entry of the archive, dtype) of a storage."""
    if type(pid) is tuple and len(pid) == 5 and pid[0] == "storage":
      _, kind, key, _, _ = pid
      if type(kind) is Global and kind.name in _STORAGES and type(key) is str:
        return _Storage(f"{self._root}data/{key}", _STORAGES[kind.name])
    raise PickleError("an unknown kind of storage")

  def tensor(self, storage, offset, shape, strides, *_):
    """Return a tensor of a typed storage."""
    return self._tensor(storage, storage.dtype, offset, shape, strides)

  def tensor_of_type(self, storage, offset, shape, strides, grad, hooks, dtype, *_):
    """Return a tensor of an untyped storage."""
    kind = dtype.name.removeprefix("torch.") if type(dtype) is Global else None
    if kind not in _DTYPES:
      raise PickleError("a tensor of an unknown dtype")
    return self._tensor(storage, kind, offset, shape, strides)

  def parameter(self, data, *_):
    """Return the tensor of a parameter."""
    return data

  def tensor_of_class(self, function, kind, arguments, *_):
    """Return the tensor of a class derived from torch's."""
    if type(function) is not Global or type(arguments) is not tuple:
      raise PickleError("a tensor of an unknown class")
    return self.call(function.name, arguments)

  def mapping(self, *items):
    """Return an empty dict; current files fill it afterwards."""
    return {} if not items else PLACEHOLDER

  def _tensor(self, storage, dtype, offset, shape, strides):
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
      raise PickleError("a tensor without storage, shape or strides")
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or len(shape) != len(strides):
      raise PickleError("a tensor of impossible offset, shape or strides")
    return Tensor(self._path, storage.entry, dtype, (offset, shape, strides))


class _Storage:
  def __init__(self, entry, dtype):
    self.entry, self.dtype = entry, dtype


_CALLS = {
  "torch._utils._rebuild_tensor_v2": _Names.tensor,
  "torch._utils._rebuild_tensor_v3": _Names.tensor_of_type,
  "torch._utils._rebuild_parameter": _Names.parameter,
  "torch._utils._rebuild_parameter_with_state": _Names.parameter,
  "torch._tensor._rebuild_from_type_v2": _Names.tensor_of_class,
  "collections.OrderedDict": _Names.mapping,
}
