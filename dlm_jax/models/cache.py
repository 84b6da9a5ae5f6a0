# SPDX-License-Identifier: Apache-2.0
"""Keys and values of committed tokens: fixed capacity, one length per row, all on the device.

A call of `Decoder.extend` reads a cache and returns its own keys and values; nothing changes until
`commit` writes them. Rows advance independently, so a batch may hold requests at different stages:

  extend   what the network says about some tokens after each row's committed ones
  commit   keep the first `count` of these tokens, per row; 0 keeps nothing
  rollback forget committed tokens from a length on; length 0 frees the row for another request

Everything at or beyond a row's length is garbage that no query sees.

The leaves are typed `Any`: a tree of shardings or of None has the same structure.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int


@flax.struct.dataclass
class KV:
  """Keys (after norm and rotation) and values of every layer for the tokens of one call."""

  k_NBQGC: Any
  v_NBQGC: Any


@flax.struct.dataclass
class Cache:
  """Keys and values of the committed tokens of every row.

  Attributes:
    k_NBSGC: keys; S slots per row, of which `length_B` count.
    v_NBSGC: values.
    length_B: committed tokens. Above S once a row was given more tokens than it has room for; see
      `overflow_B`.
  """

  k_NBSGC: Any
  v_NBSGC: Any
  length_B: Any

  @classmethod
  def make(cls, config, batch: int, capacity: int, dtype: DTypeLike | None = None) -> "Cache":
    """Return an empty cache.

    Args:
      config: a `DecoderConfig`; gives layers, key/value heads and channels.
      batch: rows.
      capacity: slots per row, tokens.
      dtype: None: the config's.
    """
    shape = (config.layers, batch, capacity, config.kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, dtype or config.dtype)
    return cls(zeros, jnp.zeros_like(zeros), jnp.zeros(batch, jnp.int32))

  @property
  def capacity(self) -> int:
    return self.k_NBSGC.shape[2]

  @property
  def room_B(self) -> Int[Array, "B"]:
    """Tokens that each row can still take; negative once tokens were lost."""
    return self.capacity - self.length_B

  @property
  def overflow_B(self) -> Bool[Array, "B"]:
    """Rows that were given more tokens than they have room for: their results are void."""
    return self.length_B > self.capacity


def commit(
  cache: Cache,
  kv: KV,
  count_B: Int[Array, "B"] | None = None,
  offset_B: Int[Array, "B"] | None = None,
) -> Cache:
  """Append tokens of a call to each row and raise its length.

  Exactly `count_B` slots per row are written; committed slots never are. Tokens beyond the capacity
  are dropped, and the length counts them all the same: `overflow_B` tells, and a rollback to what
  was there before repairs the row. Under `jit` with a donated cache the write is in place.

  Args:
    cache: the cache that the call read, or any of the same shape.
    kv: what the call returned.
    count_B: how many tokens to keep, 0 … Q − offset (larger ones mean that); None: all.
    offset_B: the first token to keep; None: 0.
  """
  queries = kv.k_NBQGC.shape[2]
  offset_B = jnp.zeros_like(cache.length_B) if offset_B is None else offset_B
  rest_B = queries - offset_B
  count_B = rest_B if count_B is None else jnp.minimum(count_B, rest_B)
  token_BQ = jnp.arange(queries)[None, :] - offset_B[:, None]
  kept_BQ = (token_BQ >= 0) & (token_BQ < count_B[:, None])
  # Slots outside the cache are dropped by the scatter; each a different one, so that all differ.
  beyond_BQ = cache.capacity + queries + jnp.arange(queries)[None, :]
  slot_BQ = jnp.where(kept_BQ, cache.length_B[:, None] + token_BQ, beyond_BQ)
  row_B1 = jnp.arange(slot_BQ.shape[0])[:, None]

  def write(old, new):
    new = new.astype(old.dtype)
    return old.at[:, row_B1, slot_BQ].set(new, mode="drop", unique_indices=True)

  return cache.replace(
    k_NBSGC=write(cache.k_NBSGC, kv.k_NBQGC),
    v_NBSGC=write(cache.v_NBSGC, kv.v_NBQGC),
    length_B=cache.length_B + count_B,
  )


def rollback(cache: Cache, length_B: Int[Array, "B"]) -> Cache:
  """Forget each row's tokens from a length on; a length above the row's own changes nothing."""
  return cache.replace(length_B=jnp.clip(length_B, 0, cache.length_B))
