# SPDX-License-Identifier: Apache-2.0
"""Distillation of a small teacher in minutes: few updates at a constant rate, watched closely."""


def distillation(
  c, *, steps, every, lr=3e-6, b2=0.99, nfes=(8, 16), max_entropy_drop=0.25, checkpoint_every=100
):
  """Train in batches of 128, measure 128 samples after every `every` updates.

  The rate and b2 are those of IDLM; what trains the student on tokens takes other ones.
  """
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
