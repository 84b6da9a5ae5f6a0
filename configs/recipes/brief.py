# SPDX-License-Identifier: Apache-2.0
"""Minutes of one accelerator: a small teacher, or few updates of its student, watched closely."""


def training(
  c, *, batch_size, steps, evaluate_every, samples, lr, weight_decay=0.03, checkpoint_every=1000
):
  """Train at a rate that falls; `samples` are measured after every `evaluate_every` updates."""
  c.loader.batch_size = batch_size
  c.objective.ema_decay = 0.999
  c.optim.lr = lr
  c.optim.warmup = 300
  c.optim.schedule = "cosine"
  c.optim.b2 = 0.98
  c.optim.weight_decay = weight_decay
  c.train.steps = steps
  c.train.checkpoint_every = checkpoint_every
  c.evaluate.every = evaluate_every
  c.evaluate.samples = samples


def distillation(
  c, *, steps, every, lr=3e-6, b2=0.99, nfes=(8, 16), max_entropy_drop=0.25, checkpoint_every=100
):
  """Train at a constant rate in batches of 128, measure 128 samples after every `every` updates.

  The rate and b2 are those of IDLM; what trains the student on tokens takes other ones.
  """
  _watched(c, steps, every, lr, b2, checkpoint_every)
  c.optim.schedule = "constant"
  c.evaluate.nfes = nfes
  c.evaluate.samples = 128
  c.evaluate.select = "genppl"  # as the students of the figures in the docstrings were chosen
  c.evaluate.max_entropy_drop = max_entropy_drop


def matched_distillation(c, *, steps, every, lr):
  """Train at a rate that falls in batches of 128, measure 256 samples after every `every` updates.

  The student furthest below the teacher's temperature curve is kept.
  """
  _watched(c, steps, every, lr, b2=0.99, checkpoint_every=100)
  c.optim.schedule = "cosine"
  c.evaluate.samples = 256
  c.evaluate.select = "matched"
  c.evaluate.max_entropy_drop = 0.25


def _watched(c, steps, every, lr, b2, checkpoint_every):
  c.loader.batch_size = 128
  c.objective.ema_decay = 0.98
  c.optim.lr = lr
  c.optim.warmup = 20
  c.optim.b2 = b2
  c.train.steps = steps
  c.train.log_every = 10
  c.train.checkpoint_every = checkpoint_every
  c.evaluate.every = every
  c.evaluate.batch_size = 128
