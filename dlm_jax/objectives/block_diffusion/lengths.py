# SPDX-License-Identifier: Apache-2.0
"""Block lengths that change while a network trains."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from dlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthCurriculum:
  """Block lengths by step.

  Attributes:
    lengths: one more than there are steps.
    steps: rising; the step from which the next length holds.

  Raises:
    InputError: the numbers do not fit.
  """

  lengths: tuple[int, ...]
  steps: tuple[int, ...] = ()

  def __post_init__(self):
    *earlier, final = self.lengths
    if final < 1 or min(earlier, default=1) < 1:
      raise InputError(
        f"objective.block_length={final} and objective.earlier_lengths={tuple(earlier)} must be at "
        "least 1."
      )
    rising = all(a < b for a, b in zip((0, *self.steps), self.steps, strict=False))
    if len(earlier) != len(self.steps) or not rising:
      raise InputError(
        f"objective.earlier_steps={self.steps} must rise from 1 or more and be as many as "
        f"objective.earlier_lengths={tuple(earlier)}: the step at which each ends."
      )

  def __call__(self, step: Int[Array, ""]) -> Int[Array, ""] | int:
    """Return the block length at a step; a plain number if there is but one."""
    if not self.steps:
      return self.lengths[0]
    stage = jnp.sum(step >= jnp.asarray(self.steps))
    return jnp.asarray(self.lengths)[stage]
