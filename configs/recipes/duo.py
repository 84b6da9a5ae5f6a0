# SPDX-License-Identifier: Apache-2.0
"""Duo: a teacher on uniform states, trained on soft inputs first."""

from dlm_jax.configs.base import optional


def duo(c):
  """Train as the released scripts do.

  Reference: Duo, arXiv 2506.10892, section 4.
  """
  c.process.name = "uniform"
  c.model.time_conditioning = True
  c.objective.name = "duo"
  c.objective.curriculum_start = 0  # step from which the temperature falls
  c.objective.curriculum_end = 500_000  # first step on hard tokens; 0: UDLM from the start
  c.objective.gamma_min = -3.55  # window of the soft inputs
  c.objective.gamma_max = -1.85
  c.objective.tau_log10_start = -3.0  # log10 of the softmax temperature
  c.objective.tau_log10_end = -3.0
  c.objective.chunk = optional(int, 0)  # positions per chunk of dense arrays; 0: chosen by size
