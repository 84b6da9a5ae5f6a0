# SPDX-License-Identifier: Apache-2.0
"""Passes of a network after a cache: what decoding alone, drafts and verification share."""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax import models
from dlm_jax.arrays import Params
from dlm_jax.decode.progress import Progress, at_positions
from dlm_jax.decode.rule import Block
from dlm_jax.models import masks


@flax.struct.dataclass
class Bound:
  """A network that reads a cache, with its parameters.

  Attributes:
    model: a `models.Decoder`, or whatever has its methods `extend` and `head`; static.
    params: its parameters.
  """

  model: Any = flax.struct.field(pytree_node=False)
  params: Params = None

  def extend(self, tokens_BQ, position_BQ, visible_BQQ, cache):
    """Return hidden states and K/V of tokens after a cache; see `models.Decoder.extend`."""
    arguments = (tokens_BQ, position_BQ, visible_BQQ, cache)
    return self.model.apply({"params": self.params}, *arguments, method="extend")

  def head(self, hidden: Float[Array, "B K D"]) -> Float[Array, "B K V"]:
    """Return float32 logits of hidden states."""
    return self.model.apply({"params": self.params}, hidden, method="head")


def block_at(progress: Progress, start_B: Int[Array, "B"], size: int) -> Block:
  """Return the block from a position on; only running rows have anything masked."""
  position_BK = start_B[:, None] + jnp.arange(size)[None, :]
  from_B = progress.prompt_B + jnp.where(progress.running_B, progress.options.minimum_B, 0)
  return Block(
    position_BK=position_BK,
    tokens_BK=at_positions(progress.tokens_BW, position_BK),
    masked_BK=at_positions(progress.masked_BW, position_BK) & progress.running_B[:, None],
    early_BK=(position_BK >= progress.prompt_B[:, None]) & (position_BK < from_B[:, None]),
  )


def block_logits(
  network: Bound,
  progress: Progress,
  cache: models.Cache,
  tokens_BK: Int[Array, "B K"],
  position_BK: Int[Array, "B K"],
  *,
  folded: bool = False,
) -> tuple[Float[Array, "B K V"], models.Cache]:
  """Return the logits of a block that sees itself and the cache; and the cache.

  Args:
    network: the network.
    progress: of the rows.
    cache: of the blocks before, all of them unless folded.
    tokens_BK: the block as it stands.
    position_BK: its positions.
    folded: the block before rides along and is stored, in rows whose cache lacks it.
  """
  if folded:
    hidden_BKD, cache = _folded(network, progress, cache, tokens_BK, position_BK)
  else:
    hidden_BKD, _ = network.extend(tokens_BK, position_BK, None, cache)
  return network.head(hidden_BKD), cache


def _folded(network, progress, cache, tokens_BK, position_BK):
  """Return the hidden states of the block, and the cache with the block before it.

  Rows whose cache is complete, after the prefill, pass over padding in the place of that block.
  """
  size = tokens_BK.shape[1]
  pending_B = progress.running_B & (cache.length_B < position_BK[:, 0])
  before_BK = jnp.maximum(position_BK - size, 0)
  both_BQ = jnp.concatenate([before_BK, position_BK], axis=1)
  before = at_positions(progress.tokens_BW, before_BK)
  tokens_BQ = jnp.concatenate([before, tokens_BK], axis=1)
  hidden_BQD, kv = network.extend(tokens_BQ, both_BQ, _folded_view(pending_B, size), cache)
  return hidden_BQD[:, size:], models.commit(cache, kv, jnp.where(pending_B, size, 0))


def _folded_view(pending_B, size) -> Bool[Array, "B Q Q"]:
  """Return what [block before; block] see: the first itself, the second both; Q = 2 K."""
  before_BK = jnp.where(pending_B, masks.CLEAN, masks.PAD)[:, None] + jnp.zeros(
    (1, size), jnp.int32
  )
  kind_BQ = jnp.concatenate([before_BK, jnp.full_like(before_BK, masks.NOISY)], axis=1)
  return masks.block_causal(masks.Slots.make(kind_BQ, block=jnp.arange(2 * size) // size))
