# SPDX-License-Identifier: Apache-2.0
"""Corruption under a reveal order: what a loss masks is what a sampler of that order meets.

Under "random" every position is masked for itself, the forward process to the letter. Under
"spaced" the masks are those that a sampler with a spaced order has left at that time: of n tokens
n (1 − α(t)), rounded at random, the lowest ranks of an order that every sequence draws anew. A
position is masked with the same probability under both, so weights of losses stay what they are;
which positions are masked *together* differs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dlm_jax.arrays import BoolBL, FloatB, IntBL, KeyB
from dlm_jax.errors import check_choice
from dlm_jax.process import Absorbing, orders

ORDERS = orders.PLANNED


def check(order: str) -> None:
  """Raise InputError unless an objective takes this order."""
  check_choice("objective.order", order, ORDERS)


def masked(
  order: str, process: Absorbing, rng_B: KeyB, tokens_BL: IntBL, valid_BL: BoolBL, t_B: FloatB
) -> IntBL:
  """Return tokens with the masks that an order leaves at time t, among the valid positions.

  Args:
    order: "random" or "spaced".
    process: its schedule says how many.
    rng_B: a key per sequence.
    tokens_BL: clean.
    valid_BL: False on what is given: never masked.
    t_B: times.
  """
  if order == "random":
    xt_BL = jax.vmap(process.corrupt)(rng_B, tokens_BL, t_B)
    return jnp.where(valid_BL, xt_BL, tokens_BL)
  masked_BL = draw(rng_B, valid_BL).masks(process, t_B)
  return jnp.where(valid_BL & masked_BL, process.mask_id, tokens_BL)


class Spaced(NamedTuple):
  """A spaced order of every sequence, see `process.orders`.

  Attributes:
    rank: of every valid position; the highest is revealed first.
    count: valid positions.
    rounding: a uniform that rounds how many are masked. One serves all times, so that masks only
      ever get fewer.
  """

  rank: IntBL
  count: Int[Array, "B"]
  rounding: FloatB

  def masks(self, process: Absorbing, t_B: FloatB) -> BoolBL:
    """Return which valid positions are masked at times; what it says of others means nothing."""
    left_B = jnp.floor(self.count * (1 - process.schedule.alpha(t_B)) + self.rounding)
    return self.rank < left_B[:, None]


def draw(rng_B: KeyB, valid_BL: BoolBL) -> Spaced:
  """Draw a spaced order of the valid positions of every sequence."""
  uniform_B3 = jax.vmap(lambda rng: jax.random.uniform(rng, (3,)))(rng_B)
  return Spaced(*orders.spaced(valid_BL, uniform_B3[:, :2]), uniform_B3[:, 2])
