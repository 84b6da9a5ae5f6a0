# SPDX-License-Identifier: Apache-2.0
"""The rule of one denoising step of a block: its options and the one function that applies it.

Whoever decodes with a block-diffusion network, alone or as the target of a draft, calls `reveal`.
It is pure and knows one block of one row: `vmap` it over rows and over stacked copies.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax import draw
from dlm_jax.arrays import RngKey
from dlm_jax.decode import select
from dlm_jax.errors import InputError, check_choice

CONFIDENCES = ("unfiltered", "filtered")
_HITTING_TIME = 2**31 - 1  # no step has this number: a child of the position's key of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
  """How a block is decoded: when which position is revealed, and how its token is drawn.

  Attributes:
    block_length: tokens per block; what the network was trained with.
    mask_id: the mask token. It is never drawn.
    steps: T, the most network passes a block takes, 1 … block_length; None: block_length. Every
      strategy reveals at least ⌈masked / (T − step)⌉ positions a step, so T = block_length asks
      for no more than one.
    strategy: which masked positions a step reveals; confidence is the drawn token's probability.
      "sequential": the leftmost.
      "low_confidence_static": the most confident.
      "low_confidence_dynamic": all above `threshold`.
      "entropy_bounded": the surest, as long as their entropies sum to less than `entropy_bound`.
      "factor": the m most confident, (m + 1)(1 − c) < `factor` for each of them.
      "first_hitting": one at random, that of the next reveal time; needs T = block_length.
    threshold: of "low_confidence_dynamic"; above 1 it is the static strategy.
    entropy_bound: of "entropy_bounded", nats.
    factor: of "factor".
    temperature: divides the logits; 0 takes the most probable token, and confidence is then that of
      temperature 1.
    top_k: draw from the k most probable tokens and their ties; 0: all.
    top_p: draw from the smallest set of this mass; 1: all.
    stop_ids: tokens after which a row ends; those of the prompt do not count. Kept as a tuple.
    confidence: "unfiltered": probabilities after temperature, before top-k and top-p. "filtered":
      after them, as SDAR's generate.py has it.
    budget: "remaining", see `steps`; "block": K / T, rounded up in the first K mod T steps, as in
      the SDAR release.
    count_mask: the mask's probability counts in confidences and entropies, as in the SDAR release.
    fold: the finished block is encoded in the first pass of the next one; otherwise in a pass of
      its own. Changes the passes, not the tokens.

  Raises:
    InputError: an option is out of range.
  """

  block_length: int
  mask_id: int
  steps: int | None = None
  strategy: str = "low_confidence_dynamic"
  threshold: float = 0.9
  entropy_bound: float = 0.35
  factor: float = 1.0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop_ids: Sequence[int] = ()
  confidence: str = "unfiltered"
  budget: str = "remaining"
  count_mask: bool = False
  fold: bool = True

  def __post_init__(self):
    if self.block_length < 1:
      raise InputError(f"block_length={self.block_length}: a block needs at least 1 token.")
    if self.steps is None:
      object.__setattr__(self, "steps", self.block_length)
    object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
    check_choice("strategy", self.strategy, select.STRATEGIES)
    check_choice("confidence", self.confidence, CONFIDENCES)
    check_choice("budget", self.budget, select.BUDGETS)
    self._check_numbers()

  def _check_numbers(self):
    if not 1 <= self.steps <= self.block_length:
      raise InputError(
        f"steps={self.steps} must be in 1 … block_length={self.block_length}: every step reveals "
        "at least one token."
      )
    if self.strategy == "first_hitting" and self.steps != self.block_length:
      raise InputError(
        f"strategy='first_hitting' reveals one token a step, so steps={self.steps} must be "
        f"block_length={self.block_length}; leave steps out."
      )
    if self.mask_id < 0 or self.mask_id in self.stop_ids or min(self.stop_ids, default=0) < 0:
      raise InputError(
        f"mask_id={self.mask_id} and stop_ids={self.stop_ids} must be token ids, 0 or more, and "
        "the mask must not be a stop id."
      )
    if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise InputError(
        f"temperature={self.temperature} must be 0 or more, top_k={self.top_k} 0 (off) or more, "
        f"and top_p={self.top_p} in (0, 1]."
      )
    if min(self.threshold, self.entropy_bound, self.factor) < 0:
      raise InputError(
        f"threshold={self.threshold}, entropy_bound={self.entropy_bound} and "
        f"factor={self.factor} must be 0 or more."
      )


class Revealed(NamedTuple):
  """What a step does to a block.

  Attributes:
    tokens_K: the block afterwards.
    revealed_K: which positions it decided.
    log_prob_K: log-probability of the tokens decided, nats; 0 elsewhere. Of the distribution after
      temperature (1 if that is 0), before top-k and top-p.
  """

  tokens_K: Int[Array, "K"]
  revealed_K: Bool[Array, "K"]
  log_prob_K: Float[Array, "K"]


def reveal(
  options: BlockOptions,
  rng: RngKey,
  tokens_K: Int[Array, "K"],
  masked_K: Bool[Array, "K"],
  logits_KV: Float[Array, "K V"],
  step: Int[Array, ""] | int,
  position_K: Int[Array, "K"],
) -> Revealed:
  """Apply one denoising step to one block.

  Pure: the outcome depends on the arguments only, and noise on (rng, position, step) only. Two
  decoding paths that ask about the same state of a block at the same step get the same tokens at
  the same positions, however they got there and whatever else they computed.

  Args:
    options: the rule.
    rng: the row's key, the same in every step and block.
    tokens_K: the block; what it holds where it is masked is not read.
    masked_K: undecided positions; a block without any stays as it is.
    logits_KV: the network's at this state, float32, for these positions.
    step: reveal steps that this block has behind it, from 0. An undecided block after T steps
      reveals everything at once.
    position_K: absolute positions.
  """
  step = jnp.asarray(step, jnp.int32)
  drawable_KV = law(options, logits_KV, filtered=False)
  filtered_KV = law(options, logits_KV)
  if options.temperature == 0:
    drawn_K = jnp.argmax(drawable_KV, axis=-1).astype(jnp.int32)
  else:
    drawn_K = jax.vmap(draw.gumbel_max)(filtered_KV, _keys(rng, position_K, step))

  plain_KV = _tempered(options, logits_KV) if options.count_mask else drawable_KV
  log_prob_K = _log_prob(plain_KV, drawn_K)
  weighed_KV = filtered_KV if options.confidence == "filtered" else plain_KV
  confidence_K = jnp.exp(_log_prob(weighed_KV, drawn_K))
  chosen_K = _choose(options, rng, masked_K, confidence_K, plain_KV, step, position_K)
  return Revealed(
    jnp.where(chosen_K, drawn_K.astype(tokens_K.dtype), tokens_K),
    chosen_K,
    jnp.where(chosen_K, log_prob_K, 0.0),
  )


def law(options: BlockOptions, logits: Float[Array, "*any V"], filtered: bool = True):
  """Return logits of what `reveal` draws a token from; the mask has none of it.

  Args:
    options: temperature (0: as 1), top_k and top_p.
    logits: of the network.
    filtered: apply top_k and top_p.
  """
  logits = _tempered(options, logits)
  shape = (1,) * (logits.ndim - 1) + (logits.shape[-1],)
  is_mask = jnp.arange(logits.shape[-1]).reshape(shape) == options.mask_id
  logits = jnp.where(is_mask, -jnp.inf, logits)
  return draw.sharpen(logits, nucleus=options.top_p, top_k=options.top_k) if filtered else logits


def _tempered(options, logits):
  return draw.sharpen(logits.astype(jnp.float32), options.temperature or 1.0)


def _keys(rng, position_K, number):
  """Return a key per position, a function of the row's key, the position and the number only."""
  fold = jax.random.fold_in
  return jax.vmap(lambda position: fold(fold(rng, position), number))(position_K)


def _log_prob(logits_KV, ids_K):
  at_ids_K = jnp.take_along_axis(logits_KV, ids_K[:, None], axis=-1)[:, 0]
  return at_ids_K - jax.nn.logsumexp(logits_KV, axis=-1)


def _entropy(logits_KV):
  log_probs_KV = jax.nn.log_softmax(logits_KV, axis=-1)
  probs_KV = jnp.exp(log_probs_KV)
  return -jnp.sum(jnp.where(probs_KV > 0, probs_KV * log_probs_KV, 0.0), axis=-1)


def _choose(options, rng, masked_K, confidence_K, plain_KV, step, position_K):
  count = select.budget(masked_K, step, options.steps, options.budget)
  if options.strategy == "sequential":
    return select.sequential(masked_K, count)
  if options.strategy == "low_confidence_static":
    return select.best(masked_K, confidence_K, count)
  if options.strategy == "low_confidence_dynamic":
    return select.dynamic(masked_K, confidence_K, count, options.threshold)
  if options.strategy == "entropy_bounded":
    return select.entropy_bounded(masked_K, _entropy(plain_KV), count, options.entropy_bound)
  if options.strategy == "factor":
    return select.factor(masked_K, confidence_K, count, options.factor)
  return select.best(masked_K, hitting_times(rng, position_K), count)


def hitting_times(rng: RngKey, position_K: Int[Array, "K"]) -> Float[Array, "K"]:
  """Return the time in [0, 1) at which "first_hitting" reveals each position, the latest first.

  Independent uniforms: under a log-linear schedule a position is masked at t with probability t.
  Their order statistics are the times t ← t u^(1/m) of the sequential description, m positions
  being masked, and the position of the next one is uniform among these.

  Reference: BD3-LM, arXiv 2503.09573; first hitting, arXiv 2409.02908.
  """
  return jax.vmap(jax.random.uniform)(_keys(rng, position_K, _HITTING_TIME))
