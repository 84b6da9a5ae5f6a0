# SPDX-License-Identifier: Apache-2.0
"""Distillation of a small teacher in minutes: few updates at a constant rate, watched closely."""


def distillation(c, *, lr, b2, steps, every, nfes, max_entropy_drop, checkpoint_every=100):
  """Train in batches of 128, measure 128 samples after every `every` updates."""
  c.loader.batch_size = 128
  c.objective.ema_decay = 0.98
  c.optim.lr = lr
  c.optim.warmup = 20
  c.optim.schedule = "constant"
  c.optim.b2 = b2
  c.train.steps = steps
  c.train.log_every = 10
  c.train.checkpoint_every = checkpoint_every
  c.evaluate.every = every
  c.evaluate.nfes = nfes
  c.evaluate.samples = 128
  c.evaluate.batch_size = 128
  c.evaluate.max_entropy_drop = max_entropy_drop
