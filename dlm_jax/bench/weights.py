# SPDX-License-Identifier: Apache-2.0
"""Random parameters made where they are used, and the bytes that a pass reads of them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from dlm_jax.arrays import Params, RngKey


def random_params(model: Any, dtype: DTypeLike, seed: int = 0) -> Params:
  """Return random parameters of a decoder, made on the device in the type asked for.

  One array at a time and never in another type, so that memory holds them once and the random bits
  of the largest array: a float32 copy of 8 B parameters would take 33 GB.

  Args:
    model: a decoder, in any storage.
    dtype: of all of them.
    seed: of the values, uniform on ±1/√fan-in; norms are 1.
  """
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  leaves, structure = jax.tree.flatten_with_path(shapes)
  values = []
  for number, (path, leaf) in enumerate(leaves):
    name = path[-1].key
    if name == "scale":
      values.append(jnp.ones(leaf.shape, dtype))
      continue
    fan_in = leaf.shape[-1] if name == "embedding" else leaf.shape[-2]
    # This generator has no counters to hold in memory, and is the fastest one.
    rng = jax.random.key(seed + number, impl="rbg")
    values.append(uniform(rng, leaf.shape, jnp.dtype(dtype), 1 / math.sqrt(fan_in)))
  return jax.tree.unflatten(structure, values)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def uniform(rng: RngKey, shape: tuple[int, ...], dtype: jnp.dtype, bound: float) -> Array:
  """Return numbers uniform on ±bound, made on the device in the type asked for."""
  return jax.random.uniform(rng, shape, dtype, -bound, bound)


def weight_bytes(config: Any, params: Params, tokens: int) -> int:
  """Return the bytes of parameters that a pass reads: all but the embedding table.

  Of the table a pass reads a row per token; a tied head reads it all. Of experts a pass over few
  tokens reads at most those that it visits.

  Args:
    config: a `DecoderConfig`.
    params: the parameters.
    tokens: of the pass.
  """
  total = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys = [entry.key for entry in path]
    if keys[0] == "embed" and not config.tied:
      continue
    share = 1.0
    if "experts" in keys and "router" not in keys:
      share = min(1.0, tokens * config.experts_per_token / config.experts)
    total += share * leaf.size * leaf.dtype.itemsize
  return round(total)


def cache_bytes(config: Any, length: int) -> int:
  """Return the bytes of keys and values of one row's committed tokens."""
  channels = config.kv_heads * config.head_dim
  return 2 * config.layers * length * channels * jnp.dtype(config.dtype).itemsize
