# SPDX-License-Identifier: Apache-2.0
"""What files of weights add to a network's own names and numbers, and how it is taken off.

Wrappers of training leave their names inside the names of tensors; eight-bit floats have a scale
beside them. Both are undone when tensors are read, lazily, whatever kind of file they come from.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlm_jax.errors import InputError

# What torch.compile, data parallelism, FSDP, activation checkpoints and Fabric put into names.
WRAPPERS = frozenset(
  (
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    "_forward_module",
  )
)
_SCALES = ("_scale_inv", "_scale")  # after the name of a tensor; both are factors
_INPUT_SCALES = ("input_scale", "activation_scale")  # of rounded inputs, which ours are not
_BLOCK = 128  # rows and columns that share a scale, where the config does not say


class Views(Mapping[str, Any]):
  """Tensors of a mapping under other names, or what is made of them; made when asked for."""

  def __init__(self, tensors: Mapping[str, Any], made: Mapping[str, str | Callable[[], Any]]):
    self._tensors, self._made = tensors, dict(made)

  def __iter__(self) -> Iterator[str]:
    return iter(self._made)

  def __len__(self) -> int:
    return len(self._made)

  def __getitem__(self, name: str) -> Any:
    found = self._made[name]
    return self._tensors[found] if isinstance(found, str) else found()

  def source(self, name: str) -> pathlib.Path | str | None:
    """Return the file that holds a tensor; None: not known."""
    found = self._made[name]
    known = getattr(self._tensors, "source", None)
    return known(found if isinstance(found, str) else name) if known else None


def unwrapped(tensors: Mapping[str, Any], source: Any) -> Mapping[str, Any]:
  """Return tensors under the names that they had before anything was wrapped around a module.

  Args:
    tensors: by stored name.
    source: where they come from, for messages.

  Raises:
    InputError: two of them have one name then.
  """
  bare: dict[str, str] = {}
  for stored in tensors:
    name = ".".join(part for part in stored.split(".") if part not in WRAPPERS)
    if name in bare:
      raise InputError(f"{source}: tensor {stored} is there twice, also as {bare[name]}.")
    bare[name] = stored
  return tensors if all(name == stored for name, stored in bare.items()) else Views(tensors, bare)


class Scaled:
  """A tensor of eight-bit floats times its scale; `numpy.asarray` makes it, float32.

  Attributes:
    shape: sizes.
    dtype: float32.
  """

  dtype = np.dtype(np.float32)

  def __init__(self, value: Any, scale: Any, block: tuple[int, ...]):
    self._value, self._scale, self._block, self.shape = value, scale, block, value.shape

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    scale = np.asarray(self._scale).astype(np.float32)
    if self._block:
      scale = scale.reshape(scale.shape + (1,) * (len(self.shape) - scale.ndim))
      for axis, (size, count) in enumerate(zip(self._block, self.shape, strict=True)):
        scale = np.repeat(scale, min(size, count), axis).take(range(count), axis)
    else:
      scale = scale.reshape((1,) * len(self.shape))
    value = np.asarray(self._value).astype(np.float32) * scale
    return value if dtype is None else value.astype(dtype)


def is_eight_bit(dtype: Any) -> bool:
  """Tell whether numbers of a dtype are floats of eight bits."""
  return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize == 1


def dequantised(
  tensors: Mapping[str, Any], source: Any, config: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
  """Return tensors with eight-bit floats multiplied by the scales beside them, which then go.

  A scale NAME_scale_inv or NAME_scale of one number counts for the whole tensor, one of a number
  per row for the row, and one of a number per block for the block.

  Args:
    tensors: by name.
    source: where they come from, for messages.
    config: config.json, whose quantization_config may say how large a block is; else it is 128
      × 128, or what divides the tensor evenly.

  Raises:
    InputError: a tensor has no scale, or one of another shape.
  """
  small = [name for name, value in _dtypes(tensors) if is_eight_bit(value)]
  scales = {name: _scale_of(name, tensors) for name in small}
  small = [name for name in small if name not in scales.values()]  # a scale may be of eight bits
  if not small:
    return tensors
  made: dict[str, Any] = {name: name for name in tensors}
  file = getattr(tensors, "source", lambda _: source)
  for name in small:
    scale = scales[name]
    if scale is None:
      names = " or ".join(name + suffix for suffix in _SCALES)
      raise InputError(
        f"{file(name) or source}: tensor {name} is {tensors[name].dtype} and has no scale beside "
        f"it ({names}); eight bits alone do not say the numbers. Convert it to bfloat16 first."
      )
    try:
      block = _block(tensors[name].shape, tensors[scale].shape, config or {})
    except ValueError as error:
      raise InputError(f"{file(name) or source}: tensor {scale} is {error}.") from None
    made.pop(scale)
    made[name] = lambda name=name, scale=scale, block=block: Scaled(
      tensors[name], tensors[scale], block
    )
    for suffix in _INPUT_SCALES:
      made.pop(f"{name.rpartition('.')[0]}.{suffix}", None)
  return Views(tensors, made)


def _dtypes(tensors: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
  return ((name, tensors[name].dtype) for name in tensors)


def _scale_of(name, tensors):
  return next((name + suffix for suffix in _SCALES if name + suffix in tensors), None)


def _block(shape, scale, config):
  """Return sizes of the blocks that share a factor; (): all of it."""
  if np.prod(scale, dtype=np.int64) == 1:
    return ()
  padded = (*scale, *(1,) * (len(shape) - len(scale)))
  if len(padded) == len(shape) and padded == (*shape[:1], *(1,) * (len(shape) - 1)):
    return (1, *shape[1:])
  given = config.get("quantization_config")
  given = given.get("weight_block_size") if isinstance(given, Mapping) else None
  if isinstance(given, list) and len(given) == len(shape):
    sizes = [tuple(given)] if all(type(n) is int and n > 0 for n in given) else []
  else:
    sizes = [(_BLOCK,) * len(shape)]
    if len(scale) == len(shape) and not any(n % m for n, m in zip(shape, scale, strict=True)):
      sizes.append(tuple(n // m for n, m in zip(shape, scale, strict=True)))
  for block in sizes:
    if scale == tuple(-(-n // size) for n, size in zip(shape, block, strict=True)):
      return block
  raise ValueError(f"{scale}, which is no number, rows or blocks of {shape}")
