# SPDX-License-Identifier: Apache-2.0
"""Reveal orders: at which step an absorbing sampler reveals each position.

The forward process does not care which positions a step reveals: any partition of them into K
ordered groups, drawn without looking at the tokens, is a generative order, with the law

  Π_k Π_{i in group k} p(x_i | x of the groups before).

What a few-step sampler loses is the dependence between tokens that are revealed together, and text
depends mostly on what is near. Reveal times drawn independently ("random": the reverse process to
the letter) put neighbours into one group as often as any other pair; a spaced order keeps the
members of every group, and of all groups so far, far apart.

A spaced order is a permutation of low discrepancy: the position l has the rank of frac(l φ), φ the
golden ratio, which spreads every prefix of the order evenly, for any length and any number of
steps. Each sequence turns the ranks by an offset of its own, and half of the sequences reverse
them, so that no position is privileged: at every position the reveal step has the same law. Given
positions are left out of the ranking; the free ones keep their true distances.

Reference: the Halton scheduler, arXiv 2503.17076, has such a sequence for images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import BoolBL, IntBL, KeyB, RngKey
from dlm_jax.errors import InputError, check_choice
from dlm_jax.fields import shown
from dlm_jax.process import grids
from dlm_jax.process.absorbing import Absorbing
from dlm_jax.process.uniform import Uniform

PLANNED = ("random", "spaced")  # known before the first evaluation
ADAPTIVE = ("confidence", "margin", "entropy", "spaced_confidence")
NAMES = (*PLANNED, *ADAPTIVE)
GOLDEN = (5**0.5 - 1) / 2


def check(order: Any) -> None:
  """Raise InputError unless it names an order, or is a function or an array of integers."""
  if isinstance(order, str):
    check_choice("order", order, NAMES)
  elif not callable(order) and not _whole(order):
    raise InputError(
      f"order={shown(order)} is unknown; use one of {', '.join(NAMES)}, integers [L] that give "
      "the step of each position, or a function (rng, length, steps) -> integers [L]."
    )


def grid(order: Any) -> str:
  """Return the name of the grid that a sampler takes with an order, unless it is given one."""
  return "rising" if isinstance(order, str) and order.startswith("spaced") else "uniform"


def times(
  process: Absorbing | Uniform, order: Any, steps: int, length: int, named: str | None = None
) -> Float[Array, "K"]:
  """Return the times of a sampler's grid, one more than there are steps.

  Args:
    process: whose schedule says when how much is revealed: "rising" is of shares, not of times.
    order: whose own grid is taken where none is named.
    steps: K.
    length: L.
    named: in `grids`.
  """
  name = named or grid(order)
  t_K = grids.make(name, steps, length=length)
  if name != "rising":
    return t_K
  schedule = process.schedule
  t_K = schedule.inverse(1 - t_K * (1 - schedule.alpha(1.0)))
  return jnp.clip(t_K, grids.END, 1.0)


def spaced(free_BL: BoolBL, uniform_B2: Float[Array, "B 2"]) -> tuple[IntBL, Int[Array, "B"]]:
  """Return the rank of every free position in a spaced order, and how many are free.

  The highest rank is revealed first. At a free position every rank has the same probability.

  Args:
    free_BL: positions to be revealed; the ranks of others mean nothing.
    uniform_B2: uniforms in [0, 1) that turn and reverse the order of a sequence.
  """
  place_L = np.arange(free_BL.shape[1])
  key_L = jnp.asarray(_rank(place_L * GOLDEN % 1.0))
  count_B = free_BL.sum(1, dtype=jnp.int32)

  def one(free_L, uniform_2, count):
    rank_L = jnp.argsort(jnp.argsort(jnp.where(free_L, key_L, key_L.size)))
    rank_L = jnp.where(uniform_2[1] < 0.5, rank_L, count - 1 - rank_L)
    turn = jnp.minimum((uniform_2[0] * count).astype(jnp.int32), count - 1)
    return ((rank_L + turn) % jnp.maximum(count, 1)).astype(jnp.int32)

  return jax.vmap(one)(free_BL, uniform_B2, count_B), count_B


def spread(eligible_BL: BoolBL, uniform_B3: Float[Array, "B 3"]) -> Float[Array, "B L"]:
  """Return a uniform per eligible position, of which those below any p are spaced.

  For samplers that decide anew in every step: each position's number is uniform, and of n eligible
  ones n p are below p, rounded at random.

  Args:
    eligible_BL: positions to decide; the numbers of others mean nothing.
    uniform_B3: uniforms in [0, 1).
  """
  rank_BL, count_B = spaced(eligible_BL, uniform_B3[:, :2])
  return (rank_BL + uniform_B3[:, 2:]) / jnp.maximum(count_B, 1)[:, None]


def survives(process: Absorbing, t_K: Float[Array, "K"]) -> Float[Array, "K-1"]:
  """Return the share of masks that is left after every step of a grid."""
  return (1 - process.schedule.alpha(t_K[1:])) / (1 - process.schedule.alpha(t_K[0]))


def left(
  count_B: Int[Array, "B"], survives_K: Float[Array, "K"], uniform_B: Float[Array, "B"]
) -> Int[Array, "B K"]:
  """Return how many masks are left after every step; none after the last.

  Counts are rounded at random, the same for a whole sequence; with as many equal steps as
  positions each step reveals exactly one. What outlives a grid, an expected 1e-5, is shared out.

  Args:
    count_B: positions to reveal.
    survives_K: share of masks that is left after every step.
    uniform_B: uniforms in [0, 1).
  """
  survives_K = (survives_K - survives_K[-1]) / (1 - survives_K[-1])
  left_BK = count_B[:, None] * survives_K[None]
  whole_BK = jnp.round(left_BK)
  near_BK = jnp.abs(left_BK - whole_BK) < 1e-3  # whole but for rounding errors: it stays whole
  left_BK = jnp.where(near_BK, whole_BK, jnp.floor(left_BK + uniform_B[:, None]))
  return left_BK.astype(jnp.int32)


def steps_of(rank_BL: IntBL, left_BK: Int[Array, "B K"]) -> IntBL:
  """Return the step that reveals each rank, 0 … K − 1, the highest first; see `left`."""
  return jnp.sum(rank_BL[..., None] < left_BK[:, None], axis=-1, dtype=jnp.int32)


def given(order: Callable | Array | Sequence[int], rng_B: KeyB, length: int, steps: int) -> IntBL:
  """Return the reveal steps of a user's own order.

  Args:
    order: int [L] or [B, L], or a function (rng, length, steps) -> int [L].
    rng_B: one key per sequence, for the function.
    length: L.
    steps: K.

  Raises:
    InputError: another shape or type, or a step outside 0 … K − 1.
  """
  if callable(order):
    order = jax.vmap(lambda rng: order(rng, length, steps))(rng_B)
  elif isinstance(order, Sequence):
    order = np.asarray(order)
  shapes = ((length,), (rng_B.shape[0], length))
  if order.shape not in shapes or not _whole(order):
    raise InputError(
      f"order gives {order.dtype} {list(order.shape)}; it must give integers [{length}], the step "
      "of each position."
    )
  if not isinstance(order, jax.core.Tracer):
    wrong = np.asarray(order)
    wrong = wrong[(wrong < 0) | (wrong >= steps)]
    if wrong.size:
      raise InputError(f"order reveals at step {wrong[0]}; steps={steps} have 0 to {steps - 1}.")
  return jnp.broadcast_to(jnp.asarray(order, jnp.int32), shapes[1])


def _whole(order):
  if isinstance(order, Sequence):
    return all(isinstance(step, int) for step in order)
  return hasattr(order, "dtype") and jnp.issubdtype(order.dtype, jnp.integer)


def dilated(rng: RngKey, length: int, steps: int) -> Int[Array, "L"]:
  """Return steps of groups of one stride: positions of equal l mod K, halves of halves.

  A contender of the spaced order, as are jittered steps. By the reversed bits of the residue;
  turned by a random offset. Its marginals are uniform where K divides the length.

  Reference: dilated unmasking, arXiv 2506.19037.
  """
  bits = max(steps - 1, 1).bit_length()
  residue = np.arange(steps)
  step_K = _rank(sum(((residue >> i) & 1) << (bits - 1 - i) for i in range(bits)))
  offset = jax.random.randint(rng, (), 0, steps)
  return jnp.asarray(step_K)[(jnp.arange(length) + offset) % steps]


def jittered(rng: RngKey, length: int, steps: int) -> Int[Array, "L"]:
  """Return steps of which every window of K neighbours holds each once, in random order."""
  windows = -(-length // steps)
  step_WK = jax.vmap(lambda rng: jax.random.permutation(rng, steps))(jax.random.split(rng, windows))
  return step_WK.reshape(-1)[:length]


def _rank(key: np.ndarray) -> np.ndarray:
  return np.argsort(np.argsort(key, kind="stable"), kind="stable").astype(np.int32)
