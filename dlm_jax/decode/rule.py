# SPDX-License-Identifier: Apache-2.0
"""The rule of one denoising step of a block, and the one function that applies it.

Whoever decodes with a block-diffusion network, alone or as the target of a draft, calls `reveal`.
It knows one block of every row; `vmap` it over copies of the block, not over rows: see `law`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax import draw
from dlm_jax.arrays import RngKey
from dlm_jax.decode import law, select
from dlm_jax.decode.interfaces import LAWS, RowOptions
from dlm_jax.errors import InputError, check_choice

CONFIDENCES = ("unfiltered", "filtered", "untempered")
_HITTING_TIME = 2**31 - 1  # no step has this number: a child of the position's key of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockRule:
  """What shapes the program that decodes a block; what a request chooses is in `RowOptions`.

  Attributes:
    block_length: tokens per block; what the network was trained with.
    mask_id: the mask token. It is never drawn.
    steps: T, the most network passes a block takes, 1 … block_length; None: block_length. Every
      strategy reveals at least ⌈masked / (T − step)⌉ positions a step, so T = block_length asks
      for no more than one.
    strategy: which masked positions a step reveals; confidence is the drawn token's probability.
      "sequential": the leftmost.
      "low_confidence_static": the most confident.
      "low_confidence_dynamic": all above the row's threshold.
      "entropy_bounded": the surest, as long as their entropies sum to less than `entropy_bound`.
      "factor": the m most confident, (m + 1)(1 − c) < `factor` for each of them.
      "first_hitting": one at random, that of the next reveal time; needs T = block_length.
    entropy_bound: of "entropy_bounded", nats.
    factor: of "factor".
    confidence: "unfiltered": probabilities after temperature, before top-k and top-p. "filtered":
      after them, as SDAR's generate.py has it. Both go to 1 with the temperature to 0, which has
      the order of temperature 1; "untempered": that at any temperature.
    budget: "remaining", see `steps`; "block": K / T, rounded up in the first K mod T steps, as in
      the SDAR release.
    count_mask: the mask's probability counts in confidences and entropies, as in the SDAR release.
    fold: the finished block is encoded in the first pass of the next one; otherwise in a pass of
      its own. Changes the passes, not the tokens.

  Raises:
    InputError: a field is out of range.
  """

  block_length: int
  mask_id: int
  steps: int | None = None
  strategy: str = "low_confidence_dynamic"
  entropy_bound: float = 0.35
  factor: float = 1.0
  confidence: str = "unfiltered"
  budget: str = "remaining"
  count_mask: bool = False
  fold: bool = True

  def __post_init__(self):
    if self.block_length < 1:
      raise InputError(f"block_length={self.block_length}: a block needs at least 1 token.")
    if self.steps is None:
      object.__setattr__(self, "steps", self.block_length)
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
    if self.mask_id < 0:
      raise InputError(f"mask_id={self.mask_id} must be a token id, 0 or more.")
    if not min(self.entropy_bound, self.factor) >= 0:
      raise InputError(
        f"entropy_bound={self.entropy_bound} and factor={self.factor} must be 0 or more."
      )


class Block(NamedTuple):
  """One block of every row as it stands.

  Attributes:
    position_BK: absolute positions.
    tokens_BK: what it holds; where it is masked that is not read.
    masked_BK: undecided positions of rows that take part; without any the block stays as it is.
    early_BK: positions where a stop id may not come yet.
  """

  position_BK: Int[Array, "B K"]
  tokens_BK: Int[Array, "B K"]
  masked_BK: Bool[Array, "B K"]
  early_BK: Bool[Array, "B K"]


class Revealed(NamedTuple):
  """What a step does to blocks.

  Attributes:
    tokens_BK: the blocks afterwards.
    revealed_BK: which positions it decided.
    log_prob_BK: log-probability of the tokens decided, nats; 0 elsewhere. Of the distribution after
      temperature (1 if that is 0), before top-k and top-p.
  """

  tokens_BK: Int[Array, "B K"]
  revealed_BK: Bool[Array, "B K"]
  log_prob_BK: Float[Array, "B K"]


class _View(NamedTuple):
  """What a step thinks of every position."""

  drawn_BK: Array
  log_prob_BK: Array
  confidence_BK: Array
  entropy_BK: Array


def reveal(
  rule: BlockRule,
  options: RowOptions,
  block: Block,
  logits_BKV: Float[Array, "B K V"],
  step_B: Int[Array, "B"],
) -> Revealed:
  """Apply one denoising step to a block of every row.

  Pure: the outcome of a row depends on its arguments only, and noise on (key, position, step) only.
  Two decoding paths that ask about the same state of a block at the same step get the same tokens
  at the same positions, however they got there and whatever else they computed. Where no row draws
  nothing is drawn, and where none truncates nothing is sorted.

  Args:
    rule: which positions are revealed.
    options: of the rows; the key of a row is the same in every step and block.
    block: the blocks.
    logits_BKV: the network's at this state, for these positions.
    step_B: reveal steps that the block has behind it, from 0. An undecided block after T steps
      reveals everything at once.
  """
  views = [
    functools.partial(_view, rule, draws=draws, narrows=narrows)
    for draws, narrows in ((False, False), (True, False), (True, True))  # of LAWS
  ]
  if options.law == "any":
    kind = _asked(rule, options, block)
    view = jax.lax.switch(kind, views, options, block, logits_BKV, step_B)
  else:
    view = views[LAWS.index(options.law)](options, block, logits_BKV, step_B)
  chosen_BK = _choose(rule, options, block, view, step_B)
  return Revealed(
    jnp.where(chosen_BK, view.drawn_BK.astype(block.tokens_BK.dtype), block.tokens_BK),
    chosen_BK,
    jnp.where(chosen_BK, view.log_prob_BK, 0.0),
  )


def _asked(rule, options, block):
  """Return the number of the least law that the batch needs in this pass."""
  truncates_B = options.truncates_B
  if rule.confidence != "filtered":
    truncates_B &= options.draws_B
  narrows = jnp.any(truncates_B) | jnp.any(block.early_BK)
  return jnp.where(narrows, 2, jnp.any(options.draws_B).astype(jnp.int32))


def _view(rule, options, block, logits_BKV, step_B, *, draws, narrows):
  """Return the view of rows; the flags say what some row of the batch needs."""
  tempered_BKV = law.tempered(options, logits_BKV)
  drawable_BKV = law.without_mask(rule.mask_id, tempered_BKV)
  if narrows:
    drawable_BKV = law.without_stops(options, drawable_BKV, block.early_BK)
  truncated_BKV = law.truncate(options, drawable_BKV) if narrows else drawable_BKV
  if draws:
    keys_BK = jax.vmap(_keys)(options.rng_B, block.position_BK, step_B)
    of_block = jax.vmap(draw.gumbel_max, in_axes=(0, 0, None))
    drawn_BK = jax.vmap(of_block)(truncated_BKV, keys_BK, options.draws_B)
  else:
    drawn_BK = jnp.argmax(drawable_BKV, axis=-1).astype(jnp.int32)
  plain_BKV = tempered_BKV if rule.count_mask else drawable_BKV
  log_prob_BK = _log_prob(plain_BKV, drawn_BK)
  weighed_BK = log_prob_BK
  if rule.confidence == "filtered":
    weighed_BK = _log_prob(truncated_BKV, drawn_BK)
  if rule.confidence == "untempered":
    plain = logits_BKV.astype(jnp.float32)
    plain = plain if rule.count_mask else law.without_mask(rule.mask_id, plain)
    weighed_BK = _log_prob(plain, drawn_BK)
  bounded = rule.strategy == "entropy_bounded"
  entropy_BK = _entropy(plain_BKV) if bounded else jnp.zeros_like(log_prob_BK)
  return _View(drawn_BK, log_prob_BK, jnp.exp(weighed_BK), entropy_BK)


def _keys(rng, position_K, number):
  """Return a key per position, a function of the row's key, the position and the number only."""
  fold = jax.random.fold_in
  return jax.vmap(lambda position: fold(fold(rng, position), number))(position_K)


def _log_prob(logits_BKV, ids_BK):
  at_ids_BK = jnp.take_along_axis(logits_BKV, ids_BK[..., None], axis=-1)[..., 0]
  return at_ids_BK - jax.nn.logsumexp(logits_BKV, axis=-1)


def _entropy(logits_BKV):
  log_probs_BKV = jax.nn.log_softmax(logits_BKV, axis=-1)
  probs_BKV = jnp.exp(log_probs_BKV)
  return -jnp.sum(jnp.where(probs_BKV > 0, probs_BKV * log_probs_BKV, 0.0), axis=-1)


def _choose(rule, options, block, view, step_B):
  masked_BK, confidence_BK = block.masked_BK, view.confidence_BK
  count_B = select.budget(masked_BK, step_B, rule.steps, rule.budget)
  if rule.strategy == "sequential":
    return select.sequential(masked_BK, count_B)
  if rule.strategy == "low_confidence_static":
    return select.best(masked_BK, confidence_BK, count_B)
  if rule.strategy == "low_confidence_dynamic":
    return select.dynamic(masked_BK, confidence_BK, count_B, options.threshold_B[:, None])
  if rule.strategy == "entropy_bounded":
    return select.entropy_bounded(masked_BK, view.entropy_BK, count_B, rule.entropy_bound)
  if rule.strategy == "factor":
    return select.factor(masked_BK, confidence_BK, count_B, rule.factor)
  times_BK = jax.vmap(hitting_times)(options.rng_B, block.position_BK)
  return select.best(masked_BK, times_BK, count_B, tie=0.0)  # a draw, and not rounded


def hitting_times(rng: RngKey, position_K: Int[Array, "K"]) -> Float[Array, "K"]:
  """Return the time in [0, 1) at which "first_hitting" reveals each position, the latest first.

  Independent uniforms: under a log-linear schedule a position is masked at t with probability t.
  Their order statistics are the times t ← t u^(1/m) of the sequential description, m positions
  being masked, and the position of the next one is uniform among these.

  Reference: BD3-LM, arXiv 2503.09573; first hitting, arXiv 2409.02908.
  """
  return jax.vmap(jax.random.uniform)(_keys(rng, position_K, _HITTING_TIME))
