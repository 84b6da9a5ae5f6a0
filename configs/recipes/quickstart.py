# SPDX-License-Identifier: Apache-2.0
"""The quick start: Python source text, three million parameters; its networks were shipped."""

from dlm_jax.configs.base import base


def quickstart(tests, directory="data/quickstart", tokenizer="bpe:2048"):
  """Return all fields: the source of the standard library, and the network of all runs.

  `tests`: the source of its tests too, three times the text. The shipped networks saw both.
  """
  c = base()
  c.data.directory = directory
  c.data.source = "stdlib"
  c.data.options.tests = tests
  c.data.tokenizer = tokenizer
  c.data.length = 128
  c.model.dim = 192
  c.model.layers = 5
  c.model.heads = 6
  return c


def training(c, ema_decay, steps, evaluate_every):
  """Train as the shipped networks were, in minutes of one accelerator."""
  _falling_rate(c)
  c.loader.batch_size = 512
  c.objective.ema_decay = ema_decay
  c.optim.warmup = 500
  c.train.steps = steps
  c.train.checkpoint_every = 2000
  c.evaluate.every = evaluate_every
  c.evaluate.samples = 2048
  c.evaluate.batch_size = 512


def training_on_cpu(c, ema_decay, steps, warmup):
  """Train in about an hour of two cores."""
  _falling_rate(c)
  c.model.dtype = "float32"
  c.loader.batch_size = 64
  c.objective.ema_decay = ema_decay
  c.optim.warmup = warmup
  c.train.steps = steps
  c.train.checkpoint_every = 100
  c.evaluate.every = steps // 5
  c.evaluate.samples = 128
  c.evaluate.batch_size = 64


def _falling_rate(c):
  c.optim.lr = 2e-3
  c.optim.schedule = "cosine"
  c.optim.final = 0.02
  c.optim.b2 = 0.98
  c.optim.weight_decay = 0.05
  c.train.log_every = 100


def student():
  """Return all fields, for a student of the shipped teacher in float32 and minutes of two cores."""
  c = quickstart(tests=False, directory="data/quickstart_student", tokenizer="shipped:teacher")
  c.model.cond_dim = 16
  c.model.dtype = "float32"
  c.model.dropout = 0.0
  c.objective.ema_decay = 0.9  # the run is short
  c.optim.b2 = 0.99
  c.train.steps = 60
  c.train.log_every = 1
  c.evaluate.samples = 64
  c.evaluate.batch_size = 64
  c.evaluate.select = "genppl"  # as the student that is shipped was chosen
  c.evaluate.max_entropy_drop = 0.2
  return c
