# SPDX-License-Identifier: Apache-2.0
"""Keys and values of committed tokens: fixed capacity, one length per row, all on the device.

A call of `Decoder.extend` reads a cache and returns its own keys and values; nothing changes until
`commit` writes them. Rows advance independently, so a batch may hold requests at different stages:

  extend   what the network says about some tokens after each row's committed ones
  commit   keep the first `count` of these tokens, per row; 0 keeps nothing
  refill   start rows anew with the tokens of a call of their own

Everything at or beyond a row's length is garbage that no query sees.

The leaves are typed `Any`: a tree of shardings or of None has the same structure.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int


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
    length_B: committed tokens. Above S once a row was given more tokens than it has room for: its
      results are void.
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


def commit(cache: Cache, kv: KV, count_B: Int[Array, "B"] | None = None) -> Cache:
  """Append tokens of a call to each row and raise its length.

  Exactly `count_B` slots per row are written; committed slots never are. Tokens beyond the capacity
  are dropped, and the length counts them all the same. Under `jit` with a donated cache the write
  is in place.

  Args:
    cache: the cache that the call read, or any of the same shape.
    kv: what the call returned.
    count_B: how many tokens to keep, 0 … Q (larger ones mean that); None: all.
  """
  queries = kv.k_NBQGC.shape[2]
  count_B = jnp.minimum(
    queries if count_B is None else count_B, jnp.full_like(cache.length_B, queries)
  )
  token_1Q = jnp.arange(queries)[None, :]
  # Slots outside the cache are dropped by the scatter; each a different one, so that all differ.
  beyond_1Q = cache.capacity + queries + token_1Q
  slot_BQ = jnp.where(token_1Q < count_B[:, None], cache.length_B[:, None] + token_1Q, beyond_1Q)
  row_B1 = jnp.arange(slot_BQ.shape[0])[:, None]

  def write(old, new):
    new = new.astype(old.dtype)
    return old.at[:, row_B1, slot_BQ].set(new, mode="drop", unique_indices=True)

  return cache.replace(
    k_NBSGC=write(cache.k_NBSGC, kv.k_NBQGC),
    v_NBSGC=write(cache.v_NBSGC, kv.v_NBQGC),
    length_B=cache.length_B + count_B,
  )


def refill(cache: Cache, row_R: Int[Array, "R"], kv: KV, length_R: Int[Array, "R"]) -> Cache:
  """Start rows anew with the first tokens of a call; what they held does not count any more.

  Args:
    cache: of B rows.
    row_R: which to start anew, different ones; B and more drop what is for them.
    kv: of a call with R rows after nothing; Q ≤ S tokens.
    length_R: how many of these count, 0 … Q.
  """
  queries = kv.k_NBQGC.shape[2]
  write = lambda old, new: old.at[:, row_R, :queries].set(new.astype(old.dtype), mode="drop")  # noqa: E731
  return cache.replace(
    k_NBSGC=write(cache.k_NBSGC, kv.k_NBQGC),
    v_NBSGC=write(cache.v_NBSGC, kv.v_NBQGC),
    length_B=cache.length_B.at[row_R].set(length_R, mode="drop"),
  )
