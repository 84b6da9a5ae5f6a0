# SPDX-License-Identifier: Apache-2.0
"""Where arrays lie: meshes, the one table from logical to mesh axis names, batches kept split.

A compiler that sees a batch and a weight split over the same devices may exchange either. Left to
itself it summed activations over the devices: two GPUs trained slower than one (170 M parameters,
189 ms for 64 × 1024 tokens, one H100 87 ms for half of them), and both drew all samples. So
networks and samplers say what is meant (`split_batch`): batches stay split, weights are gathered
for their use.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dlm_jax.errors import InputError

BATCH = ("data", "fsdp")  # mesh axes that batches are split over
AXES = ("data", "fsdp", "tensor")
RULES = {
  "batch": BATCH,
  "embed": "fsdp",
  "mlp": "tensor",
  "heads": "tensor",
  "vocab": "tensor",
  "layers": None,
}


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """Build a mesh with axes data × fsdp × tensor; one size may be −1 and takes what is left.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  given = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and given > 0 and len(devices) % given == 0:
    sizes[sizes.index(-1)] = len(devices) // given
  if math.prod(sizes) != len(devices) or min(sizes) < 1:
    raise InputError(
      f"mesh data={data} × fsdp={fsdp} × tensor={tensor} does not fit {len(devices)} device(s); "
      "one size may be -1 to take what is left."
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
  """Return the sharding of an array whose axis number `leading` is the batch."""
  return NamedSharding(mesh, PartitionSpec(*[None] * leading, RULES["batch"]))


def over(mesh: Mesh, function: Callable) -> Callable:
  """Return the function, traced with the mesh in force: see `split_batch`."""

  @functools.wraps(function)
  def inside(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args, **kwargs)

  return inside


def batch_axes(size: int) -> tuple[str, ...]:
  """Return the axes of the mesh in force that a batch of this size is split over.

  Of a mesh with axes "data" or "fsdp" those, of one with other names all that are not "tensor"; as
  many of them, in order, as divide the batch. None where no mesh is in force (`jax.set_mesh`,
  `jax.sharding.use_abstract_mesh`), and none that belongs to a `shard_map` around the caller.
  """
  mesh = jax.sharding.get_abstract_mesh()
  names = [axis for axis in mesh.axis_names if axis in BATCH]
  names = names or [axis for axis in mesh.axis_names if axis not in AXES]
  found, ways = [], 1
  for axis in names:
    free = axis not in mesh.manual_axes
    if free and mesh.shape[axis] > 1 and size % (ways * mesh.shape[axis]) == 0:
      found.append(axis)
      ways *= mesh.shape[axis]
  return tuple(found)


def split_batch(x: Array) -> Array:
  """Keep the leading axis split over `batch_axes`, as batches are; the others are free.

  Does nothing where an axis of the mesh in force is explicit: the types of arrays then say how they
  are split, see `by_compiler`.
  """
  axes = batch_axes(x.shape[0])
  if not axes or jax.sharding.get_abstract_mesh().explicit_axes:
    return x
  free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free))


def by_compiler(function: Callable, out: Any) -> Callable:
  """Return the function with the explicit axes of the mesh in force left to the compiler inside.

  Explicit axes, the default of `jax.make_mesh`, are part of an array's type, and most programs that
  gather by index do not type. Without such axes it is the function itself.

  Args:
    function: of pytrees, whose leaves need not be arrays. It closes over no array that is split.
    out: `PartitionSpec` of its results, or a tree of them.
  """
  explicit = jax.sharding.get_abstract_mesh().explicit_axes
  if not explicit:
    return function

  def inside(*arguments):
    leaves, tree = jax.tree.flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of_arrays(*arrays):
      given = dict(zip(places, arrays, strict=True))
      return function(*tree.unflatten(given.get(i, leaf) for i, leaf in enumerate(leaves)))

    run = jax.sharding.auto_axes(of_arrays, axes=tuple(explicit), out_sharding=out)
    return run(*(leaves[i] for i in places))

  return inside


def varying_like(x: Array, others: Any) -> Array:
  """Return the array with the type, inside `shard_map`, of something computed from the others too.

  A loop's carry has one type from the start: what differs between devices makes every later state
  differ, and a state of masks would not. No value changes, and outside of `shard_map` nothing does.

  Args:
    x: array of numbers.
    others: pytree; leaves that are no arrays do not count.
  """
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return x
  for leaf in jax.tree.leaves(others):
    if isinstance(leaf, jax.Array) and leaf.size:
      key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      first = (jax.random.key_data(leaf) if key else leaf).reshape(-1)[0]
      x += ((first != first) & False).astype(x.dtype)
  return x


def host_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """Return (host, hosts): which equal slice of the global batch this process has to read.

  Where a process holds no slice of its own (the tensor axis spans hosts, or the mesh interleaves
  them) every process reads the whole batch: (0, 1).
  """
  count = jax.process_count()
  parts: dict[int, set[tuple[int, int]]] = {}  # first row and the one behind the last
  indices = batch_sharding(mesh).devices_indices_map((batch_size,))
  for device, (rows_slice,) in indices.items():
    start, stop, _ = rows_slice.indices(batch_size)
    parts.setdefault(device.process_index, set()).add((start, stop))
  share, mine = batch_size // count, min(parts[jax.process_index()])[0]
  for owned in map(sorted, parts.values()):
    whole = all(one[1] == other[0] for one, other in itertools.pairwise(owned))
    first, end = owned[0][0], owned[-1][1]
    if not whole or end - first != share or first % share:
      return 0, 1
  return mine // share, count


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def memory() -> int | None:
  """Return the bytes that arrays can have, on the devices of all hosts; None: unknown."""
  found = 0
  for device in jax.local_devices():
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    if limit is None:
      names = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(getattr(os, "sysconf_names", ()))
      found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if names else None
      break
    found += limit
  return found and found * jax.process_count()


def check_room(what: str, needed: int) -> None:
  """Refuse what needs more memory than there is, before any is taken.

  Args:
    what: it is, for the message.
    needed: bytes, at the least.

  Raises:
    InputError: it does not fit.
  """
  most = memory()
  if most is not None and needed > most:
    raise InputError(
      f"{what} need {needed / 2**30:.3g} GiB at least, and there are {most / 2**30:.3g}; ask for "
      "less at a time."
    )


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
  """Check that micro-batches divide over the mesh.

  Raises:
    InputError: with the two nearest batch sizes that would.
  """
  ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
  if batch_size < 1 or batch_size % ways:
    low = max(batch_size // ways, 1) * ways
    parts = f"data={mesh.shape['data']} × fsdp={mesh.shape['fsdp']}"
    parts += f" × accumulate={accumulate}" if accumulate > 1 else ""
    raise InputError(
      f"loader.batch_size={batch_size} is not divisible by the {ways}-way batch sharding "
      f"({parts}); use {low} or {low + ways}."
    )


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
  """Return a sharding per parameter from its logical axis names.

  A dimension that its mesh axes do not divide stays whole (50,258 rows over 4 devices).

  Args:
    mesh: the mesh.
    axes: tree of `PartitionSpec` of logical names, see `models.layers.Network.axes`.
    shapes: tree of arrays or shape structs.
  """

  def one(names, array):
    spec = []
    for size, name in zip(array.shape, (*names, *[None] * array.ndim), strict=False):
      axis = RULES[name] if name is not None else None
      ways = math.prod(mesh.shape[a] for a in ([axis] if isinstance(axis, str) else axis or []))
      spec.append(axis if size % ways == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def state_shardings(mesh: Mesh, params: Any, state: Any, further: tuple[Any, ...] = ()) -> Any:
  """Shard every subtree shaped like the parameters as they are; replicate the rest.

  Optimiser moments, averages and further copies follow without being named.

  Args:
    mesh: the mesh.
    params: the tree returned by `param_shardings`.
    state: any pytree of arrays or shape structs.
    further: trees of logical axis names of other networks, or of parts of them.
  """

  def match(node):
    """Return the shardings of a node that is a network, or None."""
    if (structure := jax.tree.structure(node)) == jax.tree.structure(params):
      shardings = params
    else:
      names = [t for t in further if _structure(t) == structure]
      if not names:
        return None
      shardings = param_shardings(mesh, names[0], node)
    # a factored moment has the structure, but other ranks
    leaves = zip(jax.tree.leaves(node), jax.tree.leaves(shardings), strict=True)
    return shardings if all(len(s.spec) <= leaf.ndim for leaf, s in leaves) else None

  def one(node):
    found = match(node)
    return replicated(mesh) if found is None else found

  return jax.tree.map(one, state, is_leaf=lambda node: match(node) is not None)


def _structure(axes):
  return jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def start_distributed() -> None:
  """Join the other hosts.

  Slurm, GKE and TPU pods are recognised by JAX. Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of
  process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  """
  count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
  try:
    jax.distributed.initialize(
      num_processes=int(count) if count else None, process_id=int(index) if index else None
    )
  except (ValueError, RuntimeError) as error:
    line = str(error).splitlines()[0]
    raise InputError(f"--distributed: cannot join the other hosts: {line}") from None


def from_first_host(value: np.ndarray) -> np.ndarray:
  """Return process 0's value on every host."""
  if jax.process_count() == 1:
    return value
  return np.asarray(multihost_utils.broadcast_one_to_all(value))


def any_host(flag: bool) -> bool:
  """Return whether the flag is set on any host; all hosts must call it at the same step."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
