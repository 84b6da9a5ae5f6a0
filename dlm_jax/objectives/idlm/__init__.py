# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation (IDLM) of discrete diffusion teachers into few-step students."""

from dlm_jax.objectives.idlm.absorbing import HardStates
from dlm_jax.objectives.idlm.groups import GroupedStates
from dlm_jax.objectives.idlm.method import (
  MASK_NOISE,
  NETWORK,
  PASSES,
  TIME_COUPLINGS,
  TRAINED,
  Options,
  couple_times,
  cross_entropy,
  fake_loss,
  gap,
  make,
  student_loss,
)
from dlm_jax.objectives.idlm.uniform import SoftStates

__all__ = [
  "MASK_NOISE",
  "NETWORK",
  "PASSES",
  "TIME_COUPLINGS",
  "TRAINED",
  "GroupedStates",
  "HardStates",
  "Options",
  "SoftStates",
  "couple_times",
  "cross_entropy",
  "fake_loss",
  "gap",
  "make",
  "student_loss",
]
