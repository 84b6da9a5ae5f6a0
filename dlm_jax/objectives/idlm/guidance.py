# SPDX-License-Identifier: Apache-2.0
"""A teacher sharpened against what it says of nothing.

A lower temperature sharpens all that a teacher says, how frequent tokens are as well: its texts
lose rare ones. What is visible is told apart from that by the teacher's own prediction for a
sequence of masks alone, ∅:

  log q_w(v | z) = (1 + w) log q(v | z) − w log q(v | ∅) + const.

Guidance w > 0 sharpens what z adds and leaves the frequencies as they are; w = 0 is the teacher.

Reference: classifier-free guidance, arXiv 2207.12598, with the visible tokens as condition.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.arrays import FloatBKV, FloatBLD, Params
from dlm_jax.errors import InputError
from dlm_jax.objectives.idlm.absorbing import HardStates
from dlm_jax.process import AbsorbingScore, Process


def check(process: Process, weight: float) -> None:
  """Raise InputError where a prediction is no distribution, or there are no masks."""
  if weight and (not hasattr(process, "mask_id") or isinstance(process, AbsorbingScore)):
    raise InputError(f"objective.guidance={weight} needs process.name='absorbing'; use 0.")


def of_nothing(states: HardStates, teacher: Params, length: int) -> FloatBLD:
  """Return the teacher's trunk output [1, L, D] for masks alone."""
  masks_1L = jnp.full((1, length), states.process.mask_id, jnp.int32)
  return states.trunk(teacher, masks_1L, jnp.ones(1))


def sharpened(logits_BKV: FloatBKV, nothing_1KV: Float[Array, "1 K V"], weight: float) -> FloatBKV:
  """Return logits of q_w, up to a constant per position."""
  return logits_BKV + weight * (logits_BKV - nothing_1KV)
