# SPDX-License-Identifier: Apache-2.0
"""Decoders of the Qwen3 family ↔ the Hugging Face layout: Qwen3, SDAR, I-DLM, dense or of experts.

All share the names of Qwen3's tensors; `model_type` tells them apart. SDAR and I-DLM have a mask
token; their process is an absorbing one that says which. Weights go from the mapped file to the
devices one tensor at a time, each into its place among the stacked layers.
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax import mesh as meshes
from dlm_jax import models, process
from dlm_jax.arrays import Params
from dlm_jax.convert import decoder_config, files, trees
from dlm_jax.convert.tensors import Tensors
from dlm_jax.errors import InputError, hint

# (public name, our path, transposed); {l} is the layer, {e} the expert.
_OUTER = (
  ("model.embed_tokens.weight", "embed/embedding", False),
  ("model.norm.weight", "norm/scale", False),
)
_HEAD = ("lm_head.weight", "project/kernel", True)
_LAYER = (
  ("input_layernorm", "norm1/scale", False),
  *(
    (f"self_attn.{theirs}_proj", f"attention/{ours}/kernel", True)
    for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
  ),
  *((f"self_attn.{name}", f"attention/{name}/scale", False) for name in ("q_norm", "k_norm")),
  ("post_attention_layernorm", "norm2/scale", False),
)
_PARTS = ("gate", "up", "down")
_SHARD_BYTES = 5 * 10**9
STORED = ("float32", "bfloat16")


def load(
  path: pathlib.Path | str,
  config: dict[str, Any],
  *,
  params_dtype: str = "float32",
  mesh: Mesh | None = None,
  **overrides,
) -> tuple[models.Decoder, Params, process.Absorbing | None]:
  """Read a decoder; every tensor must be there, known, and fit.

  Args:
    path: directory with config.json and model.safetensors, or shards and their index.
    config: the parsed config.json.
    params_dtype: what parameters are kept in: "float32", or "bfloat16", which takes a public file
      as it is and lets a decoding step read half the bytes.
    mesh: parameters are sharded over it by the rules of `mesh`; None: the first device.
    **overrides: fields of `DecoderConfig` that change no shape.

  Returns:
    The network, its parameters, and an absorbing process that names the mask; None for a network
    without one.

  Raises:
    InputError: the architecture differs, the mask of an SDAR is unknown, or a tensor is missing,
      unknown, misshapen or unreadable.
  """
  directory = pathlib.Path(path)
  if directory.is_file():
    raise InputError(f"{path} is a file; give the directory that holds config.json.")
  if params_dtype not in STORED:
    raise InputError(f"params_dtype={params_dtype!r} is unknown; use {' or '.join(STORED)}.")
  model = decoder_config.make_model(directory, config, overrides)
  proc = decoder_config.make_process(directory, config, model)
  tensors = Tensors(directory)
  wanted = list(_entries(model.config))
  shapes = _shapes(model)
  _check(directory, model, tensors, wanted, shapes)
  shardings = None
  if mesh is not None:
    axes = model.axes(jax.ShapeDtypeStruct((1, 1), jnp.int32))
    shardings = meshes.param_shardings(mesh, axes, shapes)
  params: Params = {}
  for name, ours, index, transposed in wanted:
    sharding = None if shardings is None else trees.read(shardings, ours)
    value = tensors.place(name, _of_tensor(sharding, len(index), transposed))
    if index:
      old = _find(params, ours)
      if old is None:
        old = _zeros(trees.read(shapes, ours).shape, params_dtype, sharding)
      value = _insert(sharding, transposed)(old, value, tuple(jnp.asarray(i) for i in index))
    else:
      value = _oriented(sharding, transposed, params_dtype)(value)
    trees.write(params, ours, value)
  return model, params, proc


def _zeros(shape, dtype, sharding):
  return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()


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


def _of_tensor(sharding, stacked: int, transposed: bool):
  """Return the sharding of one stored tensor, given that of the parameter it becomes part of."""
  if sharding is None:
    return None
  spec = tuple(sharding.spec)[stacked:]
  return NamedSharding(sharding.mesh, PartitionSpec(*(spec[::-1] if transposed else spec)))


def _entries(config: models.DecoderConfig) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
  """Yield (public name, our path, index into the stacked parameter, transposed)."""
  if config.storage != "stacked":
    raise InputError(
      f"model.storage={config.storage!r}: files are read and written as 'stacked'; regroup the "
      "parameters after loading, with `models.regroup`."
    )
  for name, ours, transposed in (*_OUTER, *(() if config.tied else (_HEAD,))):
    yield name, ours, (), transposed
  for layer in range(config.layers):
    prefix = f"model.layers.{layer}."
    for name, ours, transposed in _LAYER:
      yield f"{prefix}{name}.weight", f"blocks/{ours}", (layer,), transposed
    if not config.experts:
      for part in _PARTS:
        yield f"{prefix}mlp.{part}_proj.weight", f"blocks/mlp/{part}/kernel", (layer,), True
      continue
    yield f"{prefix}mlp.gate.weight", "blocks/experts/router/kernel", (layer,), True
    for expert in range(config.experts):
      for part in _PARTS:
        name = f"{prefix}mlp.experts.{expert}.{part}_proj.weight"
        yield name, f"blocks/experts/{part}", (layer, expert), True


def _shapes(model):
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def _check(directory, model, tensors, wanted, shapes):
  """Refuse tensors that are not exactly those of the network."""
  for name, ours, index, transposed in wanted:
    if name not in tensors:
      raise InputError(f"{directory}: tensor {name} is missing.")
    shape = trees.read(shapes, ours).shape[len(index) :]
    shape = shape[::-1] if transposed else shape
    if tensors.shape(name) != shape:
      hint_ = "; is it transposed?" if tensors.shape(name) == shape[::-1] else "."
      raise InputError(
        f"{tensors.source(name)}: tensor {name} is {tensors.shape(name)}, expected {shape}{hint_}"
      )
  known = {name for name, *_ in wanted}
  strangers = sorted(set(tensors) - known)
  if model.config.tied and strangers == [_HEAD[0]]:
    if not np.array_equal(tensors.read(_HEAD[0]), tensors.read(_OUTER[0][0])):
      raise InputError(
        f"{directory} contradicts itself: tie_word_embeddings is true, but {_HEAD[0]} is not the "
        "embedding."
      )
  elif strangers:
    raise InputError(
      f"{tensors.source(strangers[0])}: unknown tensor {strangers[0]}{hint(strangers[0], known)}; "
      "the network has none."
    )


def from_tensors(model: models.Decoder, tensors: dict[str, Any], dtype: str = "float32") -> Params:
  """Return parameters from arrays under public names; raises KeyError for a missing one."""
  columns: dict[str, list] = {}
  for name, ours, _, transposed in _entries(model.config):
    value = np.asarray(tensors[name])
    columns.setdefault(ours, []).append(value.T if transposed else value)
  params: Params = {}
  for ours, leaf in _leaves(_shapes(model)):
    trees.write(params, ours, jnp.asarray(np.stack(columns[ours]).reshape(leaf.shape), dtype))
  return params


def to_tensors(model: models.Decoder, params: Params) -> dict[str, jax.Array]:
  """Return a tree like the parameters (gradients too) under public names and orientation."""
  return {
    name: _tensor(params, ours, index, transposed)
    for name, ours, index, transposed in _entries(model.config)
  }


def _tensor(params, ours, index, transposed):
  value = jnp.asarray(trees.read(params, ours)[index])
  return value.T if transposed else value


def save(
  path: pathlib.Path | str,
  model: models.Decoder,
  params: Params,
  proc: Any = None,
  *,
  dtype: str | None = None,
  extra: dict[str, Any] | None = None,
  block_length: int | None = None,
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Write config.json and model.safetensors, or shards and their index.

  A network whose process names a mask is written as model_type sdar, one without as qwen3.

  Args:
    path: directory, created if needed.
    model: the network.
    params: its parameters.
    proc: an absorbing process, or None.
    dtype: "float32" or "bfloat16"; None: what the parameters are kept in.
    extra: JSON-able facts stored in config.json under "dlm_jax".
    block_length: stored as block_size: what an SDAR was trained with.
    shard_bytes: the most that one file holds; one shard at a time is in memory.

  Raises:
    InputError: the process has no mask.
  """
  directory = pathlib.Path(path)
  dtype = dtype or str(params["embed"]["embedding"].dtype)
  config = decoder_config.describe(model, proc, block_length) | {"torch_dtype": dtype}
  if extra:
    config["dlm_jax"] = extra
  directory.mkdir(parents=True, exist_ok=True)
  groups, sizes = _groups(model, jnp.dtype(dtype).itemsize, shard_bytes)
  count, where = len(groups), {}
  for number, group in enumerate(groups, 1):
    file = "model.safetensors"
    if count > 1:
      file = f"model-{number:05d}-of-{count:05d}.safetensors"
    tensors = {name: _tensor(params, *rest).astype(dtype) for name, *rest in group}
    files.write(directory / file, tensors)
    where |= dict.fromkeys(tensors, file)
  if count > 1:
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _groups(model, itemsize, shard_bytes):
  """Return entries file by file, and their sizes in bytes."""
  shapes, groups, sizes, room = _shapes(model), [], [], -1
  for entry in _entries(model.config):
    _, ours, index, _ = entry
    size = int(np.prod(trees.read(shapes, ours).shape[len(index) :], dtype=np.int64)) * itemsize
    if room < size:
      groups.append([])
      room = shard_bytes
    groups[-1].append(entry)
    sizes.append(size)
    room -= size
  return groups, sizes


def _find(tree, path):
  for key in path.split("/"):
    tree = tree.get(key) if tree is not None else None
  return tree


def _leaves(tree):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield "/".join(entry.key for entry in path), leaf
