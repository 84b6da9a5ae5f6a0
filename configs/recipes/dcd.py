# SPDX-License-Identifier: Apache-2.0
"""Discrete consistency distillation of a uniform-state teacher.

Reference: Duo, arXiv 2506.10892, section 5.
"""

from dlm_jax.configs.base import optional


def dcd(c, teacher, judge, update_teacher_every=10_000):
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
  c.loader.batch_size = 128
  c.objective.ema_decay = 0.999
  c.optim.lr = 6e-5
  c.optim.warmup = 500
  c.train.steps = 50_000
  c.train.checkpoint_every = 5000
