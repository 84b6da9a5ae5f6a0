# SPDX-License-Identifier: Apache-2.0
"""Parameters of a network ↔ tensors under public names: matched strictly, placed, written.

A family lists its `Entry`s; everything else is the same for all. Our layers are stacked and our
kernels transposed.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax import mesh as meshes
from dlm_jax.arrays import Params
from dlm_jax.convert import files, trees
from dlm_jax.errors import InputError, hint

SHARD_BYTES = 5 * 10**9
# A parameter up to this size is put together on the host, where nothing has to be compiled.
_ON_HOST = 2**26


class Entry(NamedTuple):
  """Where one public tensor lies in our tree.

  Attributes:
    name: in public files.
    path: of the parameter, a/b/c.
    index: of the tensor in a parameter that stacks layers; (): it is the parameter.
    transposed: public files keep its transpose.
  """

  name: str
  path: str
  index: tuple[int, ...] = ()
  transposed: bool = False


def param_shapes(model: Any) -> Params:
  """Return the shapes of a network's parameters."""
  return jax.eval_shape(model.init, jax.random.key(0), *model.inputs())["params"]


def public_shapes(entries: Iterable[Entry], shapes: Params) -> dict[str, tuple[int, ...]]:
  """Return the shape of every public tensor, in the order of the entries.

  Args:
    entries: of the network.
    shapes: of its parameters.
  """
  wanted = {}
  for name, path, index, transposed in entries:
    shape = trees.read(shapes, path).shape[len(index) :]
    wanted[name] = shape[::-1] if transposed else shape
  return wanted


def check(
  source: Callable[[str], Any],
  names: Mapping[str, str],
  tensors: Mapping[str, Any],
  wanted: Mapping[str, tuple[int, ...]],
  missing: str = "",
) -> None:
  """Refuse tensors that are not exactly those of a network.

  Args:
    source: where a tensor comes from, by its stored name, for messages; "" for one missing.
    names: public name -> name in the file.
    tensors: by name in the file.
    wanted: shapes by public name.
    missing: what the file writes before a public name.

  Raises:
    InputError: a tensor is missing, unknown, misshapen or no float.
  """
  for name, shape in wanted.items():
    if name not in names:
      raise InputError(f"{source('')}: tensor {missing}{name} is missing.")
    value = tensors[names[name]]
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise InputError(
        f"{source(names[name])}: tensor {names[name]} is {value.dtype}, not floating-point."
      )
    if value.shape != shape:
      advice = "; is it transposed?" if value.shape == shape[::-1] else "."
      raise InputError(
        f"{source(names[name])}: tensor {names[name]} is {value.shape}, expected {shape}{advice}"
      )
  strangers = sorted(stored for name, stored in names.items() if name not in wanted)
  if strangers:
    raise InputError(
      f"{source(strangers[0])}: unknown tensor {strangers[0]}{hint(strangers[0], wanted)}; the "
      "network has none."
    )


def sharding_of(mesh: Mesh | None, model: Any, shapes: Params) -> Params | None:
  """Return where parameters lie on a mesh by the rules of `mesh`; None without one."""
  if mesh is None:
    return None
  return meshes.param_shardings(mesh, model.axes(*model.inputs()), shapes)


def read(
  entries: Iterable[Entry],
  tensors: Mapping[str, Any],
  shapes: Params,
  *,
  dtype: str = "float32",
  shardings: Params | None = None,
  source: Any = "checkpoint",
) -> Params:
  """Return parameters from tensors under public names.

  Large ones go from the mapped file to the devices one tensor at a time, each into its place among
  the stacked layers, and each process reads only what its devices hold.

  Args:
    entries: of the network.
    tensors: by public name; whatever `numpy.asarray` takes.
    shapes: of the parameters.
    dtype: what they are kept in.
    shardings: None: the first device.
    source: where they come from, for messages.

  Raises:
    InputError: a number is NaN or infinite in the parameters' dtype.
  """
  columns: dict[str, list[Entry]] = {}
  for entry in entries:
    columns.setdefault(entry.path, []).append(entry)
  params: Params = {}
  for path, column in columns.items():
    shape = trees.read(shapes, path).shape
    sharding = None if shardings is None else trees.read(shardings, path)
    small = int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize <= _ON_HOST
    if sharding is None and small:
      value = _together(column, tensors, shape, dtype)
    else:
      value = _one_by_one(column, tensors, shape, dtype, sharding)
    trees.write(params, path, value)
  sound = jax.device_get({path: _finite(trees.read(params, path)) for path in columns})
  for path in (path for path, finite in sound.items() if not finite):
    _report(columns[path], tensors, dtype, source)
  return params


def _finite(value):
  """Return whether all numbers are finite, found where they are."""
  on_host = all(device.platform == "cpu" for device in value.sharding.device_set)
  if on_host and value.is_fully_addressable:
    return np.isfinite(np.asarray(value)).all()  # nothing to compile
  return _all_finite(value)


@jax.jit
def _all_finite(value):
  return jnp.all(jnp.isfinite(value))


def _report(column, tensors, dtype, source):
  """Raise for the tensor with a number that is none."""
  wrong = lambda entry: ~np.isfinite(np.asarray(tensors[entry.name]).astype(jnp.dtype(dtype)))  # noqa: E731
  entry = next((entry for entry in column if wrong(entry).any()), column[0])
  found = wrong(entry)
  raise InputError(
    f"{source}: tensor {entry.name} holds {found.sum()} of {found.size} numbers that are NaN or "
    f"infinite in {dtype}, so nothing the network says would mean anything; fetch or train it "
    "again."
  )


def _together(column, tensors, shape, dtype):
  values = []
  for entry in column:
    value = np.asarray(tensors[entry.name])
    values.append((value.T if entry.transposed else value).astype(dtype))
  return jnp.asarray(np.stack(values).reshape(shape))


def _one_by_one(column, tensors, shape, dtype, sharding):
  total = None
  for name, _, index, transposed in column:
    value = _place(tensors[name], _of_tensor(sharding, len(shape), len(index), transposed))
    if not index:
      return _oriented(sharding, transposed, dtype)(value)
    if total is None:
      total = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    total = _insert(sharding, transposed)(total, value, tuple(jnp.asarray(i) for i in index))
  return total


def _place(value, sharding):
  """Return a tensor on devices; each process reads only what its devices hold."""
  value = np.asarray(value)
  if sharding is None:
    return jnp.asarray(value)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index]))


@functools.lru_cache(maxsize=64)
def _insert(sharding, transposed):
  """Return a compiled function that writes one tensor into a stacked parameter, in place."""

  def insert(old, value, index):
    return old.at[index].set((value.T if transposed else value).astype(old.dtype))

  return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _oriented(sharding, transposed, dtype):
  def orient(value):
    return (value.T if transposed else value).astype(dtype)

  return jax.jit(orient, out_shardings=sharding)


def _of_tensor(sharding, rank: int, stacked: int, transposed: bool):
  """Return the sharding of one stored tensor, given that of the parameter it becomes part of."""
  if sharding is None:
    return None
  spec = tuple(sharding.spec)
  spec = (*spec, *(None,) * (rank - len(spec)))[stacked:]
  return NamedSharding(sharding.mesh, PartitionSpec(*(spec[::-1] if transposed else spec)))


def to_tensors(entries: Iterable[Entry], params: Params) -> dict[str, jax.Array]:
  """Return a tree like the parameters (gradients too) under public names and orientation."""
  return {entry.name: _tensor(entry, params) for entry in entries}


def _tensor(entry, params):
  value = jnp.asarray(trees.read(params, entry.path)[entry.index])
  return value.T if entry.transposed else value


def write(
  directory: pathlib.Path,
  entries: Sequence[Entry],
  params: Params,
  *,
  dtype: str = "float32",
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Write model.safetensors, or shards and their index; one shard at a time is in memory.

  Args:
    directory: there already.
    entries: of the network.
    params: its parameters.
    dtype: what tensors are stored in.
    shard_bytes: the most that one file holds.
  """
  groups, total = _groups(entries, params, jnp.dtype(dtype).itemsize, shard_bytes)
  count, where = len(groups), {}
  for number, group in enumerate(groups, 1):
    file = "model.safetensors"
    if count > 1:
      file = f"model-{number:05d}-of-{count:05d}.safetensors"
    tensors = {entry.name: _tensor(entry, params).astype(dtype) for entry in group}
    files.write(directory / file, tensors)
    where |= dict.fromkeys(tensors, file)
  if count > 1:
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _groups(entries, params, itemsize, shard_bytes) -> tuple[list[list[Entry]], int]:
  """Return entries file by file, and their size in bytes."""
  groups, total, room = [], 0, -1
  for entry in entries:
    shape = trees.read(params, entry.path).shape[len(entry.index) :]
    size = int(np.prod(shape, dtype=np.int64)) * itemsize
    if room < size:
      groups.append([])
      room = shard_bytes
    groups[-1].append(entry)
    total, room = total + size, room - size
  return groups, total


def numbered(table: Iterable[tuple[str, str, bool]], layers: int | None = None) -> Iterator[Entry]:
  """Yield the entries of a table of (public name, our path, transposed).

  Args:
    table: rows.
    layers: how often; `{}` in a name is the layer. None: once, and nothing is stacked.
  """
  for layer in (None,) if layers is None else range(layers):
    for name, path, transposed in table:
      index = () if layer is None else (layer,)
      yield Entry(name.format(layer), path, index, transposed)
