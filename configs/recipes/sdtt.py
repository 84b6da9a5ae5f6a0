# SPDX-License-Identifier: Apache-2.0
"""Self-distillation through time of a masked teacher.

Reference: SDTT, arXiv 2410.21035.
"""

from dlm_jax.configs.base import optional
from dlm_jax.configs.recipes import rounds


def sdtt(c, teacher, judge, *, num_steps=1024, update_teacher_every=rounds.STEPS, chunk=0):
  """Distil with the released hyper-parameters of the method."""
  c.objective.name = "sdtt"
  c.objective.num_steps_original = num_steps  # the first round's time step is 1 over this
  c.objective.min_num_steps = 8  # the time step never exceeds 1 over this
  c.objective.num_distill_steps = 2  # teacher steps that the student learns to take at once
  c.objective.update_teacher_every = update_teacher_every  # steps; each round doubles that time
  c.objective.divergence = "kl-bwd"  # kl-bwd, kl-fwd, mse or tvd
  c.objective.published_times = False  # True: the released code's second teacher time
  c.objective.order = "random"  # random or spaced: which positions are masked together
  c.objective.chunk = optional(int, chunk)  # positions per chunk of dense arrays; 0: by size
  c.teacher.path = teacher
  c.evaluate.judge = judge


def published(c):
  """Train as the released scripts do: seven rounds."""
  rounds.published(c, number=7, ema_decay=0.9999)
