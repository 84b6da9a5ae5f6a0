# SPDX-License-Identifier: Apache-2.0
"""Passes of a network after a cache: what decoding alone, drafts and verification share.

A network is a `models.Decoder`, or whatever has its methods `extend` and `head`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax import models
from dlm_jax.arrays import Params
from dlm_jax.decode.progress import Progress, at_positions
from dlm_jax.models import masks


def extend(model: Any, params: Params, tokens_BQ, position_BQ, visible_BQQ, cache):
  """Return hidden states and K/V of tokens after a cache; see `models.Decoder.extend`."""
  arguments = (tokens_BQ, position_BQ, visible_BQQ, cache)
  return model.apply({"params": params}, *arguments, method="extend")


def head(model: Any, params: Params, hidden: Float[Array, "B K D"]) -> Float[Array, "B K V"]:
  """Return float32 logits of hidden states."""
  return model.apply({"params": params}, hidden, method="head")


def block_logits(
  model: Any,
  params: Params,
  progress: Progress,
  cache: models.Cache,
  tokens_BK: Int[Array, "B K"],
  position_BK: Int[Array, "B K"],
  *,
  folded: bool = False,
) -> tuple[Float[Array, "B K V"], models.Cache]:
  """Return the logits of a block that sees itself and the cache; and the cache.

  Args:
    model: the network.
    params: its parameters.
    progress: of the rows.
    cache: of the blocks before, all of them unless folded.
    tokens_BK: the block as it stands.
    position_BK: its positions.
    folded: the block before rides along and is stored, in rows whose cache lacks it.
  """
  if folded:
    hidden_BKD, cache = _folded(model, params, progress, cache, tokens_BK, position_BK)
  else:
    hidden_BKD, _ = extend(model, params, tokens_BK, position_BK, None, cache)
  return head(model, params, hidden_BKD), cache


def _folded(model, params, progress, cache, tokens_BK, position_BK):
  """Return the hidden states of the block, and the cache with the block before it.

  Rows whose cache is complete, after the prefill, pass over padding in the place of that block.
  """
  size = tokens_BK.shape[1]
  pending_B = progress.running_B & (cache.length_B < position_BK[:, 0])
  before_BK = jnp.maximum(position_BK - size, 0)
  both_BQ = jnp.concatenate([before_BK, position_BK], axis=1)
  kind_BK = jnp.broadcast_to(
    jnp.where(pending_B, masks.CLEAN, masks.PAD)[:, None], position_BK.shape
  )
  kind_BQ = jnp.concatenate([kind_BK, jnp.full_like(kind_BK, masks.NOISY)], axis=1)
  visible_BQQ = masks.block_causal(masks.Slots.make(kind_BQ, block=jnp.arange(2 * size) // size))
  before = at_positions(progress.tokens_BW, before_BK)
  tokens_BQ = jnp.concatenate([before, tokens_BK], axis=1)
  hidden_BQD, kv = extend(model, params, tokens_BQ, both_BQ, visible_BQQ, cache)
  return hidden_BQD[:, size:], models.commit(cache, kv, jnp.where(pending_B, size, 0))
