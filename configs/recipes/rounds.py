# SPDX-License-Identifier: Apache-2.0
"""Distillation in rounds, after each of which the student is the next teacher: DCD and SDTT."""

STEPS = 10_000  # of a round


def published(c, number, ema_decay):
  """Train so many rounds as the released scripts of both methods do."""
  c.loader.batch_size = 128
  c.objective.ema_decay = ema_decay
  c.optim.lr = 6e-5
  c.optim.warmup = 500
  c.train.steps = number * STEPS
  c.train.checkpoint_every = STEPS // 2
