# SPDX-License-Identifier: Apache-2.0
"""What a draft proposes for a block: tokens, the step that revealed each, and with what law."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax import models
from dlm_jax.decode.interfaces import RowOptions
from dlm_jax.decode.passes import Bound, block_logits
from dlm_jax.decode.progress import Progress
from dlm_jax.decode.rule import Block, BlockRule, reveal
from dlm_jax.models import masks


class Draft(NamedTuple):
  """A proposal for one block of every row.

  Attributes:
    tokens_BK: the block; the mask where nothing was drafted.
    time_BK: the step that revealed each position, from 1; `masks.CARRIED` where it was known,
      `masks.UNDRAFTED` where the steps did not suffice.
    logits_BKV: of the step that revealed each position, 0 where none did; None if not asked for.
    cache: the draft's, with the block before if it lacked it.
    passes_B: network passes the row took part in.
  """

  tokens_BK: Int[Array, "B K"]
  time_BK: Int[Array, "B K"]
  logits_BKV: Float[Array, "B K V"] | None
  cache: models.Cache
  passes_B: Int[Array, "B"]

  @property
  def drafted_BK(self):
    """Positions that a step of the draft revealed."""
    return (self.time_BK > masks.CARRIED) & (self.time_BK < masks.UNDRAFTED)


def propose(
  network: Bound,
  rule: BlockRule,
  options: RowOptions,
  progress: Progress,
  cache: models.Cache,
  block: Block,
  step_B: Int[Array, "B"],
  *,
  want_logits: bool = False,
) -> Draft:
  """Denoise the blocks as `block_decoder` does, and remember the order.

  With the keys and the steps that the target's decoding has at this state, a token is drawn with
  the noise that the target would use.

  Args:
    network: the draft.
    rule: its rule; at most `rule.steps` passes.
    options: of the rows, for the draft.
    progress: of the text; it is not changed.
    cache: the draft's.
    block: what is to be drafted: the masked positions; rows without any take no part.
    step_B: the number of the first step.
    want_logits: return the logits too.
  """
  shape = block.masked_BK.shape
  vocabulary = network.model.config.vocab_size
  logits_BKV = jnp.zeros((*shape, vocabulary), jnp.float32) if want_logits else None
  time_BK = jnp.where(block.masked_BK, masks.UNDRAFTED, masks.CARRIED)
  carry = Draft(block.tokens_BK, time_BK, logits_BKV, cache, jnp.zeros(shape[0], jnp.int32))

  def left_BK(draft):
    return draft.time_BK == masks.UNDRAFTED

  def one_pass(carry, first=False):
    draft, count = carry
    logits_BKV, cache = block_logits(
      network, progress, draft.cache, draft.tokens_BK, block.position_BK, folded=first
    )
    now = block._replace(tokens_BK=draft.tokens_BK, masked_BK=left_BK(draft))
    out = reveal(rule, options, now, logits_BKV, step_B + count)
    kept_BKV = draft.logits_BKV
    if want_logits:
      kept_BKV = jnp.where(out.revealed_BK[..., None], logits_BKV, kept_BKV)
    passes_B = draft.passes_B + jnp.any(left_BK(draft), axis=-1)
    time_BK = jnp.where(out.revealed_BK, count + 1, draft.time_BK)
    return Draft(out.tokens_BK, time_BK, kept_BKV, cache, passes_B), count + 1

  def some_left(carry):
    return jnp.any(left_BK(carry[0])) & (carry[1] < rule.steps)

  carry = one_pass((carry, jnp.zeros((), jnp.int32)), first=True)
  return jax.lax.while_loop(some_left, one_pass, carry)[0]
