# SPDX-License-Identifier: Apache-2.0
"""How many positions the steps of an order reveal, as far as that is known before anything runs.

A question that a program asks itself on the way (is any position due? is one left?) stops it on a
GPU until the host has read the answer: a twentieth of a forward pass of 170 M parameters at batch
1. So samplers of masks ask what may well be answered either way, and nothing else.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from dlm_jax.sample._reveal import capacity_for, in_eights

_SPARED = 1 / 32  # of the steps: expected to reveal nothing where it is worth while to ask


class Counts(NamedTuple):
  """What is known of the steps of one sequence.

  Attributes:
    most: positions that one step reveals, at most; None: unknown.
    spared: steps that are expected to reveal nothing, of a sequence without a prompt.
    remains: whether masks may be left after the last step.
  """

  most: int | None
  spared: float
  remains: bool

  def capacity(self, steps: int, length: int) -> int:
    """Return how many positions per row to gather at a time."""
    if self.most is None:
      return capacity_for(length / steps, length)
    return self.most if self.most < 8 else in_eights(self.most, length)

  def asks(self, steps: int, length: int, prompted: bool) -> bool:
    """Return whether steps are to ask if they reveal anything.

    With a prompt always: it may leave few tokens to reveal. With more steps than tokens always, so
    that no more evaluations than tokens are made.
    """
    return prompted or steps > length or self.spared > _SPARED * steps


ONE_EACH = Counts(most=1, spared=0.0, remains=False)  # of as many steps as positions


def of_order(
  order: Any, survives_K: Float[Array, "K"] | Float[np.ndarray, "K"], length: int
) -> Counts:
  """Return what is known of a planned order, or of one of the user's own.

  Args:
    order: as `Ancestral` has it.
    survives_K: share of masks that is left after every step, see `orders.survives`; may be traced,
      and little is known then.
    length: L.
  """
  known = not isinstance(survives_K, jax.core.Tracer)
  if not isinstance(order, str):
    known = known and not callable(order) and not isinstance(order, jax.core.Tracer)
    return _given(np.asarray(order), len(survives_K)) if known else _unknown(len(survives_K))
  if not known:
    return _unknown(len(survives_K), remains=order == "random")
  left_K = np.concatenate([[1.0], np.asarray(survives_K, np.float64)])
  if order == "random":
    return Counts(None, float(np.sum((1 - _falls(left_K)) ** length)), True)
  # Of n free positions ⌊n a + u⌋ − ⌊n b + u⌋ are revealed: n (a − b), rounded up or down, also
  # where `orders.left` takes a count for a whole number. What float32 adds is a little to the
  # shares, and one position where n is too long for u to count.
  mean_K = length * _falls((left_K - left_K[-1]) / (1 - left_K[-1]))
  most = math.ceil(mean_K.max() + length * 2.0**-18) + 1
  return Counts(min(most, length), float(np.sum(np.maximum(1 - mean_K, 0))), False)


def _falls(left_K):
  """Return by how much the shares fall in every step; from rounding none rises."""
  return np.clip(-np.diff(left_K), 0.0, 1.0)


def _unknown(steps, remains=True):
  return Counts(None, float(steps), remains)


def _given(order, steps):
  """Return the counts of steps [L] or [B, L]; what is wrong with them is said elsewhere."""
  if order.ndim not in (1, 2) or not order.size or order.min() < 0 or order.max() >= steps:
    return _unknown(steps)
  order = np.atleast_2d(order).astype(np.int64)
  rows = [np.bincount(row, minlength=steps) for row in order]
  return Counts(int(np.max(rows)), float(np.max(np.sum(np.equal(rows, 0), axis=1))), False)
