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

from dlm_jax import models
from dlm_jax.decode.loop import Decoder
from dlm_jax.decode.passes import block_logits, extend
from dlm_jax.decode.progress import advance, at_positions, begin, record
from dlm_jax.decode.rule import BlockOptions, reveal
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


def block_decoder(model, options: BlockOptions, max_length: int) -> Decoder:
  """Return a decoder for `sample.decode` that decides one block per row and round.

  Args:
    model: a `models.Decoder` trained on blocks of this length, or any network with its config and
      its methods `extend` and `head`, whose logits are for the token at a position itself.
    options: how a block is decided.
    max_length: the window L: most tokens of a row, prompt included. A row's own limit may be any
      number up to it; its last block is decided as a whole and cut.

  Raises:
    InputError: the window is empty or longer than the network's positions, or the mask or a stop id
      is not in the vocabulary.

  Reference: SDAR, arXiv 2510.06303; BD3-LM, arXiv 2503.09573.
  """
  config = model.config
  if not 1 <= max_length <= config.length:
    raise InputError(f"max_length={max_length} must be in 1 … {config.length}, the network's.")
  highest = max(options.mask_id, *options.stop_ids, 0)
  if highest >= config.vocab_size:
    raise InputError(f"mask_id or stop id {highest} is not below vocab_size={config.vocab_size}.")
  return Decoder(
    init=functools.partial(_init, model, options, max_length),
    round=functools.partial(_round, model, options),
    done=_done,
  )


def _done(state):
  return ~state.progress.running_B


def _init(model, options, window, params, prompt, rng, lengths=None, max_length=None):
  size = options.block_length
  progress = begin(
    prompt,
    rng,
    lengths,
    max_length,
    window=window,
    block_length=size,
    mask_id=options.mask_id,
  )
  batch, width = progress.tokens_BW.shape
  capacity = max(width - size, 1)  # the last block is never stored
  cache = models.Cache.make(model.config, batch, capacity)
  start_B = progress.prompt_B // size * size
  cache = _prefill(model, params, progress, cache, start_B, size, jnp.shape(prompt)[1])
  return BlockState(progress, cache, start_B)


def _prefill(model, params, progress, cache, start_B, size, columns):
  """Store the whole blocks of the prompts; shorter rows compute garbage that nobody keeps."""
  columns = min(columns, progress.tokens_BW.shape[1] - size) // size * size
  if not columns:
    return cache
  given_BQ = progress.tokens_BW[:, :columns]
  visible_QQ = masks.block_causal(masks.sequence_slots(jnp.arange(columns), size))
  kv = extend(model, params, given_BQ, None, visible_QQ[None], cache)[1]
  return models.commit(cache, kv, jnp.where(progress.running_B, start_B, 0))


def _round(model, options, params, state):
  """Decide one block of every running row, and store what is to be stored."""
  size, progress = options.block_length, state.progress
  position_BK = state.start_B[:, None] + jnp.arange(size)[None, :]
  running_B1 = progress.running_B[:, None]

  def passes_left(carry):
    progress, _, step = carry
    return jnp.any(_masked(progress, position_BK) & running_B1) & (step < size)

  def one_pass(carry, first=False):
    progress, cache, step = carry
    masked_BK = _masked(progress, position_BK) & running_B1
    tokens_BK = at_positions(progress.tokens_BW, position_BK)
    logits_BKV, cache = block_logits(
      model, params, progress, cache, tokens_BK, position_BK, folded=first
    )
    step_of_row = functools.partial(reveal, options)
    revealed = jax.vmap(step_of_row, in_axes=(0, 0, 0, 0, None, 0))(
      progress.rng_B, tokens_BK, masked_BK, logits_BKV, step, position_BK
    )
    progress = record(
      progress,
      position_BK,
      revealed.revealed_K,
      revealed.tokens_K,
      jnp.full_like(tokens_BK, step),
      revealed.log_prob_K,
    )
    took_part_B = jnp.any(masked_BK, axis=-1).astype(jnp.int32)
    return progress.replace(passes_B=progress.passes_B + took_part_B), cache, step + 1

  carry = (progress, state.cache, jnp.zeros((), jnp.int32))
  if options.fold:
    carry = one_pass(carry, first=True)
  progress, cache, _ = jax.lax.while_loop(passes_left, one_pass, carry)
  progress = advance(progress, options.stop_ids)
  if not options.fold:
    progress, cache = _store(model, params, progress, cache, position_BK)
  start_B = jnp.where(progress.running_B, state.start_B + size, state.start_B)
  return BlockState(progress, cache, start_B)


def _masked(progress, position_BK):
  return at_positions(progress.masked_BW, position_BK)


def _store(model, params, progress, cache, position_BK):
  """Encode the finished blocks of rows that go on, if any does."""

  def encode(cache):
    tokens_BK = at_positions(progress.tokens_BW, position_BK)
    kv = extend(model, params, tokens_BK, position_BK, None, cache)[1]
    return models.commit(cache, kv, jnp.where(progress.running_B, tokens_BK.shape[1], 0))

  cache = jax.lax.cond(jnp.any(progress.running_B), encode, lambda cache: cache, cache)
  passes_B = progress.passes_B + progress.running_B.astype(jnp.int32)
  return progress.replace(passes_B=passes_B), cache
