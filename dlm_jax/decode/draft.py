# SPDX-License-Identifier: Apache-2.0
"""What a draft proposes for a block: tokens, the step that revealed each, and with what law."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlm_jax import models
from dlm_jax.arrays import Params
from dlm_jax.decode.passes import block_logits
from dlm_jax.decode.progress import Progress
from dlm_jax.decode.rule import BlockOptions, law, reveal
from dlm_jax.models import masks


class Draft(NamedTuple):
  """A proposal for one block of every row.

  Attributes:
    tokens_BK: the block; the mask where nothing was drafted.
    time_BK: the step that revealed each position, from 1; `masks.CARRIED` where it was known,
      `masks.UNDRAFTED` where the steps did not suffice.
    probs_BKV: the law each token was drawn from, all 0 where none was; None if not asked for.
    cache: the draft's, with the block before if it lacked it.
    passes_B: network passes the row took part in.
  """

  tokens_BK: Int[Array, "B K"]
  time_BK: Int[Array, "B K"]
  probs_BKV: Float[Array, "B K V"] | None
  cache: models.Cache
  passes_B: Int[Array, "B"]


def propose(
  model: Any,
  params: Params,
  options: BlockOptions,
  rng_B: Key[Array, "B"],
  progress: Progress,
  cache: models.Cache,
  position_BK: Int[Array, "B K"],
  tokens_BK: Int[Array, "B K"],
  masked_BK: Bool[Array, "B K"],
  step_B: Int[Array, "B"],
  *,
  want_probs: bool = False,
) -> Draft:
  """Denoise the blocks as `block_decoder` does, and remember the order.

  With the key and the step that the target's decoding has at this state, a token is drawn with the
  noise that the target would use.

  Args:
    model: the draft.
    params: its parameters.
    options: its rule; at most `options.steps` passes.
    rng_B: see `reveal`.
    progress: of the text; it is not changed.
    cache: the draft's.
    position_BK: of the blocks.
    tokens_BK: the blocks, masks included.
    masked_BK: what is to be drafted; rows without any take no part.
    step_B: the number of the first step.
    want_probs: return the laws too.
  """
  shape = masked_BK.shape
  probs = jnp.zeros((*shape, model.config.vocab_size), jnp.float32) if want_probs else None
  time_BK = jnp.where(masked_BK, masks.UNDRAFTED, masks.CARRIED)
  carry = Draft(tokens_BK, time_BK, probs, cache, jnp.zeros(shape[0], jnp.int32))

  def left_BK(draft):
    return draft.time_BK == masks.UNDRAFTED

  def one_pass(carry, first=False):
    draft, count = carry
    logits_BKV, cache = block_logits(
      model, params, progress, draft.cache, draft.tokens_BK, position_BK, folded=first
    )
    out = jax.vmap(functools.partial(reveal, options))(
      rng_B, draft.tokens_BK, left_BK(draft), logits_BKV, step_B + count, position_BK
    )
    probs = draft.probs_BKV
    if want_probs:
      law_BKV = jax.nn.softmax(law(options, logits_BKV), axis=-1)
      probs = jnp.where(out.revealed_K[..., None], law_BKV, probs)
    passes_B = draft.passes_B + jnp.any(left_BK(draft), axis=-1)
    time_BK = jnp.where(out.revealed_K, count + 1, draft.time_BK)
    return Draft(out.tokens_K, time_BK, probs, cache, passes_B), count + 1

  def some_left(carry):
    return jnp.any(left_BK(carry[0])) & (carry[1] < options.steps)

  carry = one_pass((carry, jnp.zeros((), jnp.int32)), first=True)
  return jax.lax.while_loop(some_left, one_pass, carry)[0]
