# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct: a student distilled on the integral KL, with a discriminator's rewards."""

from dlm_jax.objectives.didi_instruct.method import (
  NETWORK,
  TRAINED,
  discriminator_loss,
  draw_times,
  make,
  noised,
  policy_loss,
  reward,
  share_prompts,
)
from dlm_jax.objectives.didi_instruct.options import Options

__all__ = [
  "NETWORK",
  "TRAINED",
  "Options",
  "discriminator_loss",
  "draw_times",
  "make",
  "noised",
  "policy_loss",
  "reward",
  "share_prompts",
]
