# SPDX-License-Identifier: Apache-2.0
"""Corruption under a reveal order: what a loss masks is what a sampler of that order meets.

Under "random" every position is masked for itself, the forward process to the letter. Under
"spaced" the masks are those that a sampler with a spaced order has left at that time: of n tokens
n (1 − α(t)), rounded at random, the lowest ranks of an order that every sequence draws anew. A
position is masked with the same probability under both, so weights of losses stay what they are;
which positions are masked *together* differs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
  rank_BL, count_B, rounding_B = ranks(rng_B, valid_BL)
  left_B = remaining(count_B, 1 - process.schedule.alpha(t_B), rounding_B)
  return jnp.where(valid_BL & (rank_BL < left_B[:, None]), process.mask_id, tokens_BL)


def ranks(rng_B: KeyB, valid_BL: BoolBL) -> tuple[IntBL, Int[Array, "B"], FloatB]:
  """Draw a spaced order per sequence: ranks, how many positions are valid, and its rounding.

  One rounding serves all times of a sequence, so that masks only ever get fewer.
  """
  uniform_B3 = jax.vmap(lambda rng: jax.random.uniform(rng, (3,)))(rng_B)
  return *orders.spaced(valid_BL, uniform_B3[:, :2]), uniform_B3[:, 2]


def remaining(
  count_B: Int[Array, "B"], share_B: FloatB | Float[Array, ""], rounding_B: FloatB
) -> Int[Array, "B"]:
  """Return how many masks a share of so many positions is: those of the lowest ranks."""
  return jnp.floor(count_B * share_B + rounding_B).astype(jnp.int32)
