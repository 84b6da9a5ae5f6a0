# SPDX-License-Identifier: Apache-2.0
"""Discrete consistency distillation of a uniform-state teacher.

Reference: Duo, arXiv 2506.10892, section 5.
"""

from dlm_jax.configs.base import optional
from dlm_jax.configs.recipes import rounds


def dcd(c, teacher, judge, update_teacher_every=rounds.STEPS):
  """Distil with the released hyper-parameters of the method."""
  c.process.name = "uniform"
  c.model.time_conditioning = True
  c.objective.name = "dcd"
  c.objective.num_steps = 512  # the first round's time step is 1 over this
  c.objective.update_teacher_every = update_teacher_every  # steps; each round doubles that time
  c.objective.gamma_min = -4.0
  c.objective.gamma_max = -1.0
  c.objective.divergence = "kl-bwd"  # kl-bwd or kl-fwd
  c.objective.chunk = optional(int, 0)  # positions per chunk of dense arrays; 0: chosen by size
  c.teacher.path = teacher
  c.evaluate.judge = judge
  c.evaluate.noise_removal = "greedy"


def published(c):
  """Train as the released scripts do: five rounds."""
  rounds.published(c, number=5, ema_decay=0.999)
