# SPDX-License-Identifier: Apache-2.0
"""Which masked positions of a block a step reveals: pure functions along the last axis.

Each takes `masked` and a `count` of positions to reveal, and returns bool like `masked`: at least
min(count, masked positions), never one that is not masked. Ties go to the lowest index. So with the
count of `budget` any strategy empties a block in as many steps as it was given.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

STRATEGIES = (
  "sequential",
  "low_confidence_static",
  "low_confidence_dynamic",
  "entropy_bounded",
  "factor",
  "first_hitting",
)
BUDGETS = ("remaining", "block")
TIE = 1e-5  # of the score: what is nearer than rounding of a float32 network counts as equal


def budget(
  masked: Bool[Array, "*batch K"], step: Int[Array, "*batch"], steps: int, kind: str = "remaining"
) -> Int[Array, "*batch"]:
  """Return how many positions a step has to reveal so that the last step leaves none masked.

  Args:
    masked: what is still undecided.
    step: the number of this step in its block, from 0.
    steps: T of a block.
    kind: "remaining": ⌈masked / (T − step)⌉. "block": as the SDAR release does, K / T rounded up in
      the first K mod T steps and down in the others, however few masks a partial block has.
  """
  if kind == "block":
    size = masked.shape[-1]
    return size // steps + (step < size % steps)
  left = jnp.maximum(steps - step, 1)
  return (jnp.sum(masked, axis=-1, dtype=jnp.int32) + left - 1) // left


def ranks(
  masked: Bool[Array, "*batch K"], score: Float[Array, "*batch K"]
) -> Int[Array, "*batch K"]:
  """Return each masked position's rank by score, the highest 0; those not masked come last.

  Of equal ones the leftmost is first. All pairs are compared: for a block that is one small kernel,
  where sorting twice is several.
  """
  score = jnp.where(masked, score, -jnp.inf)
  mine, other = score[..., :, None], score[..., None, :]
  number = jnp.arange(score.shape[-1])
  left = (number[None, :] < number[:, None]).reshape((1,) * (score.ndim - 1) + (number.size,) * 2)
  return jnp.sum((other > mine) | ((other == mine) & left), axis=-1, dtype=jnp.int32)


def best(masked, score, count, tie=TIE):
  """Reveal the `count` masked positions of highest score, of equal ones the leftmost.

  Equal to the last one chosen is what differs from it by `tie` of it at most, so that passes that
  round in other ways choose the same. A score that is no number comes last: there are always
  `count`, if so many are masked.
  """
  least = jnp.finfo(score.dtype).min
  score = jnp.where(masked, jnp.where(jnp.isnan(score), least, score), -jnp.inf)
  last = jnp.where(ranks(masked, score) == count[..., None] - 1, score, least)
  last = jnp.max(last, axis=-1, keepdims=True)
  slack = tie * jnp.abs(last)
  above = score > last + slack
  equal = masked & ~above & (score >= last - slack)
  left = count[..., None] - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
  leftmost = equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= left)
  return (above & (count[..., None] > 0)) | leftmost


def sequential(masked, count):
  """Reveal the leftmost `count` masked positions."""
  return masked & (jnp.cumsum(masked, axis=-1, dtype=jnp.int32) <= count[..., None])


def dynamic(masked, confidence, count, threshold):
  """Reveal every masked position of confidence above the threshold, but at least the best."""
  return best(masked, confidence, count) | (masked & (confidence > threshold))


def entropy_bounded(masked, entropy, count, bound):
  """Reveal the surest masked positions as long as their entropies sum to less than the bound.

  Reference: EB-Sampler, arXiv 2505.24857, as SDAR means it.
  """
  ascending = jnp.sort(jnp.where(masked, entropy, jnp.inf), axis=-1)
  total = jnp.cumsum(ascending, axis=-1)
  fitting = jnp.sum(total < bound, axis=-1, dtype=jnp.int32)
  return best(masked, -entropy, jnp.maximum(fitting, count))


def factor(masked, confidence, count, limit):
  """Reveal the m best, m the largest with (i + 1)(1 − cᵢ) < limit for the i-th best, i = 1 … m.

  Reference: Fast-dLLM, arXiv 2505.22618, factor-based parallel decoding.
  """
  rank = ranks(masked, confidence)
  passing = masked & ((rank + 2) * (1 - confidence) < limit)
  first_failing = jnp.min(jnp.where(masked & ~passing, rank, masked.shape[-1]), axis=-1)
  return best(masked, confidence, jnp.maximum(first_failing, count))
