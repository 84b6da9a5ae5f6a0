# SPDX-License-Identifier: Apache-2.0
"""Decoding with a block-diffusion network: one block after the other, a few tokens per pass.

Blocks lie on a grid anchored at position 0 of each row, so a prompt may end inside a block. Whole
blocks of the prompt are encoded at once under the block-causal mask. Then, per round, each running
row decides one block: passes over the block, which sees itself in both directions and the cache of
all blocks before it, alternate with `reveal` until nothing is masked.

The finished block has to be encoded once more, clean, for the cache. Folded, that rides along with
the first pass over the next block: queries [clean block; masked block] under the block-causal mask,
which is exact and takes T passes per block; otherwise it is a pass of its own, T + 1. The last
block of a row is never encoded: nobody would read it.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dlm_jax import models
from dlm_jax.decode.interfaces import STOP_WIDTH, Rounds, known
from dlm_jax.decode.passes import Bound, block_at, block_logits
from dlm_jax.decode.progress import Progress, advance, at_positions, begin, free, place, record
from dlm_jax.decode.rule import BlockRule, reveal
from dlm_jax.errors import InputError
from dlm_jax.models import masks


@flax.struct.dataclass
class BlockState:
  """Rows between two rounds.

  Attributes:
    progress: tokens and their history.
    cache: the network's, of the first `cache.length_B` tokens of each row: all blocks before
      `start_B`, or all but the last of them if that one is to be folded into the next round.
    start_B: first position of the block that is decided next.
  """

  progress: Any
  cache: Any
  start_B: Any


def block_decoder(model: Any, rule: BlockRule, max_length: int) -> Rounds:
  """Return rounds that decide one block of every running row each.

  Args:
    model: a `models.Decoder` trained on blocks of this length, or any network with its config and
      its methods `extend` and `head`, whose logits are for the token at a position itself.
    rule: how a block is decided.
    max_length: the window L: most tokens of a row, prompt included. A row's own limit may be any
      number up to it; its last block is decided as a whole and cut.

  Raises:
    InputError: the window is empty or longer than the network's positions, or the mask is not in
      the vocabulary; when rows are admitted: a stop id is not, or see `decode`.

  Reference: SDAR, arXiv 2510.06303; BD3-LM, arXiv 2503.09573.
  """
  config = model.config
  if not 1 <= max_length <= config.length:
    raise InputError(f"max_length={max_length} must be in 1 … {config.length}, the network's.")
  if rule.mask_id >= config.vocab_size:
    raise InputError(f"mask_id={rule.mask_id} is not below vocab_size={config.vocab_size}.")
  return Rounds(
    init=functools.partial(_init, model, rule, max_length),
    admit=functools.partial(_admit, model, rule),
    round=functools.partial(_round, model, rule),
    done=done,
  )


def done(state: Any) -> Bool[Array, "B"]:
  """Return which rows of a state have ended."""
  return ~state.progress.running_B


def _init(model, rule, window, slots, stop_width=STOP_WIDTH, law="any"):
  shape = {"window": window, "block_length": rule.block_length, "mask_id": rule.mask_id}
  progress = free(slots, stop_width, law, **shape)
  capacity = max(progress.tokens_BW.shape[1] - rule.block_length, 1)  # the last is never stored
  cache = models.Cache.make(model.config, slots, capacity)
  return BlockState(progress, cache, jnp.zeros(slots, jnp.int32))


def _admit(model, rule, params, state, row_R, prompt_RP, lengths_R, options):
  """Put prompts into rows: their progress is replaced, their part of the cache is started anew."""
  size, progress = rule.block_length, state.progress
  highest = np.asarray(options.stop_BS).max(initial=0) if known(options.stop_BS) else 0
  if highest >= model.config.vocab_size:
    raise InputError(f"stop id {highest} is not below vocab_size={model.config.vocab_size}.")
  options = options.widen(progress.options.stop_BS.shape[1], progress.options.law)
  shape = {"window": progress.window, "block_length": size, "mask_id": rule.mask_id}
  new = begin(prompt_RP, lengths_R, options, **shape)
  start_R = new.prompt_B // size * size
  columns = min(jnp.shape(prompt_RP)[1], new.tokens_BW.shape[1] - size) // size * size
  kv = _prefill(Bound(model, params), new, columns, size)
  length_R = jnp.where(new.running_B, start_R, 0)
  return BlockState(
    progress=place(progress, row_R, new),
    cache=models.refill(state.cache, row_R, kv, length_R),
    start_B=place(state.start_B, row_R, start_R),
  )


def _prefill(network, new: Progress, columns, size):
  """Return K/V of the whole blocks of prompts; of shorter rows some of it is garbage."""
  if not columns:
    nothing = models.Cache.make(network.model.config, new.tokens_BW.shape[0], 0)
    return models.KV(nothing.k_NBSGC, nothing.v_NBSGC)
  visible_QQ = masks.block_causal(masks.sequence_slots(jnp.arange(columns), size))
  return network.extend(new.tokens_BW[:, :columns], None, visible_QQ[None], None)[1]


def _round(model, rule, params, state):
  """Decide one block of every running row, and store what is to be stored."""
  network, size, progress = Bound(model, params), rule.block_length, state.progress
  options = progress.options.only(progress.running_B)

  def passes_left(carry):
    progress, _, step = carry
    return jnp.any(block_at(progress, state.start_B, size).masked_BK) & (step < size)

  def one_pass(carry, first=False):
    progress, cache, step = carry
    block = block_at(progress, state.start_B, size)
    logits_BKV, cache = block_logits(
      network, progress, cache, block.tokens_BK, block.position_BK, folded=first
    )
    step_B = jnp.full_like(state.start_B, step)
    out = reveal(rule, options, block, logits_BKV, step_B)
    step_BK = jnp.full_like(block.tokens_BK, step)
    progress = record(
      progress, block.position_BK, out.revealed_BK, out.tokens_BK, step_BK, out.log_prob_BK
    )
    took_part_B = jnp.any(block.masked_BK, axis=-1).astype(jnp.int32)
    return progress.replace(passes_B=progress.passes_B + took_part_B), cache, step + 1

  carry = (progress, state.cache, jnp.zeros((), jnp.int32))
  if rule.fold:
    carry = one_pass(carry, first=True)
  progress, cache, _ = jax.lax.while_loop(passes_left, one_pass, carry)
  progress = advance(progress)
  if not rule.fold:
    progress, cache = _store(network, progress, cache, state.start_B, size)
  start_B = jnp.where(progress.running_B, state.start_B + size, state.start_B)
  return BlockState(progress, cache, start_B)


def _store(network, progress, cache, start_B, size):
  """Encode the finished blocks of rows that go on, if any does."""
  position_BK = start_B[:, None] + jnp.arange(size)[None, :]

  def encode(cache):
    tokens_BK = at_positions(progress.tokens_BW, position_BK)
    kv = network.extend(tokens_BK, position_BK, None, cache)[1]
    return models.commit(cache, kv, jnp.where(progress.running_B, size, 0))

  cache = jax.lax.cond(jnp.any(progress.running_B), encode, lambda cache: cache, cache)
  passes_B = progress.passes_B + progress.running_B.astype(jnp.int32)
  return progress.replace(passes_B=passes_B), cache
