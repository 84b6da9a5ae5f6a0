# SPDX-License-Identifier: Apache-2.0
"""Reveal masks: what every sampler of an absorbing process does once it knows which are due.

The moves of those samplers do not depend on the network, so the vocabulary head runs only on the
positions that are due, gathered, and a step in which none is due evaluates nothing, unless it is
all but certain beforehand that some are: see `_counts`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax import draw
from dlm_jax.arrays import BoolBL, FloatB, FloatBKD, FloatBKV, FloatBLD, IntBL
from dlm_jax.process import Absorbing
from dlm_jax.sample._request import Truncation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revealer:
  """Put clean tokens in place of masks.

  Attributes:
    denoiser: has `head`.
    process: absorbing.
    capacity: positions per row that are gathered at a time, see `capacity_for`.
    truncation: of the draw of a token.
    at_once: whether no row ever has more than `capacity` due.
    asks: whether to ask first if any are due, and evaluate nothing where none are.
  """

  denoiser: Any
  process: Absorbing
  capacity: int
  truncation: Truncation
  at_once: bool = False
  asks: bool = True

  def reveal(
    self,
    x_BL: IntBL,
    due_BL: BoolBL,
    draws_BL2: Float[Array, "B L 2"],
    sigma_B: FloatB,
    greedy: bool = False,
    *,
    trunk: Callable[[IntBL, FloatB], FloatBLD],
  ) -> IntBL:
    """Return the state with the due masks revealed.

    Args:
      x_BL: state.
      due_BL: masks to reveal.
      draws_BL2: uniforms of the tokens, see `draw.categorical`.
      sigma_B: what the denoiser is told.
      greedy: take the most probable token.
      trunk: of the denoiser, see `Request.trunk`.
    """

    def fill(x_BL):
      hidden_BLD = trunk(x_BL, sigma_B)
      return self.fill(x_BL, hidden_BLD, due_BL, draws_BL2, sigma_B, greedy)

    return jax.lax.cond(due_BL.any(), fill, lambda x_BL: x_BL, x_BL) if self.asks else fill(x_BL)

  def fill(
    self,
    x_BL: IntBL,
    hidden_BLD: FloatBLD,
    due_BL: BoolBL,
    draws_BL2: Float[Array, "B L 2"],
    sigma_B: FloatB,
    greedy: bool = False,
    change: Callable | None = None,
  ) -> IntBL:
    """Return what `reveal` returns, from hidden states of the trunk.

    `change(logits_BKV, position_BK)` may replace the predictions of the gathered positions.
    """

    def predict(hidden_BKD, position_BK):
      logits_BKV = self.predict(hidden_BKD, sigma_B)
      if change is not None:
        logits_BKV = change(logits_BKV, position_BK)
      if greedy:
        return draw.most_probable(logits_BKV).astype(x_BL.dtype)
      uniform_BK2 = jnp.take_along_axis(draws_BL2, position_BK[..., None], axis=1)
      return self.truncation.draw(logits_BKV, uniform_BK2).astype(x_BL.dtype)

    return fill_due(x_BL, hidden_BLD, due_BL, predict, self.capacity, at_once=self.at_once)

  def predict(self, hidden_BKD: FloatBKD, sigma_B: FloatB) -> FloatBKV:
    """Return logits whose softmax is p(x₀) of masks with these hidden states."""
    return self.process.clean_logits(self.denoiser.head(hidden_BKD, sigma_B))


def capacity_for(mean: float, length: int) -> int:
  """Return how many positions per row to gather: four deviations above the mean, in eights."""
  return in_eights(mean + 4 * math.sqrt(mean), length)


def in_eights(count: float | int, length: int) -> int:
  """Return a count rounded up to a multiple of eight, the length at most."""
  return min(length, 8 * math.ceil(count / 8))


def fill_due(
  x_BL: IntBL,
  hidden_BLD: FloatBLD,
  due_BL: BoolBL,
  predict: Callable,
  capacity: int,
  *,
  at_once: bool = False,
) -> IntBL:
  """Set the due positions, `capacity` per row at a time, in as many turns as the fullest row needs.

  The first turn is taken in any case; whether there is another is asked after each, a question that
  holds up a GPU.

  Args:
    x_BL: state.
    hidden_BLD: of the trunk.
    due_BL: positions to set.
    predict: (hidden_BKD, position_BK) -> tokens [B, K]; whatever it gives where nothing is due is
      dropped.
    capacity: K.
    at_once: whether no row has more than K due: nothing is asked then.
  """
  length = x_BL.shape[1]

  def some_left(carry):
    return carry[1].any()

  def turn(carry):
    x_BL, due_BL = carry
    # stable order: due positions first, in place order
    position_BK = jnp.argsort(~due_BL, axis=1)[:, :capacity]
    taken_BK = jnp.take_along_axis(due_BL, position_BK, axis=1)
    hidden_BKD = jnp.take_along_axis(hidden_BLD, position_BK[..., None], axis=1)
    tokens_BK = predict(hidden_BKD, position_BK)
    target_BK = jnp.where(taken_BK, position_BK, length)  # out of range: dropped
    put = jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))
    x_BL = put(x_BL, target_BK, tokens_BK)
    done = jax.vmap(lambda row, at: row.at[at].set(False, mode="drop"))
    return x_BL, done(due_BL, target_BK)

  carry = turn((x_BL, due_BL))
  return (carry if at_once or capacity >= length else jax.lax.while_loop(some_left, turn, carry))[0]
