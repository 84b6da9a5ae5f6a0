# SPDX-License-Identifier: Apache-2.0
"""English novels: plain-text books of your own, with a network and a training in minutes."""

from dlm_jax.configs.base import base


def corpus():
  """Return all fields, with data/novels/; documents are split at four line ends."""
  c = base()
  c.data.directory = "data/novels_packed"
  c.data.source = "files:data/novels/train*.txt*"
  c.data.options.validation = "data/novels/valid*.txt*"
  c.data.options.document_separator = "\n\n\n\n"
  c.data.tokenizer = "bpe:4096"
  c.data.length = 256
  return c


def novels(dim=512, layers=9, heads=8, unrolled=False):
  """Return the same with a network without dropout, of 35 M parameters unless asked otherwise.

  `unrolled`: it compiles for longer and trains a quarter faster.
  """
  c = corpus()
  c.model.dim = dim
  c.model.layers = layers
  c.model.unroll = layers if unrolled else 1
  c.model.heads = heads
  c.model.dropout = 0.0
  return c


def training(c, steps, evaluate_every, checkpoint_every=1000, lr=1e-3, weight_decay=0.03):
  """Train for minutes, at a rate that falls."""
  c.loader.batch_size = 256
  c.objective.ema_decay = 0.999
  c.optim.lr = lr
  c.optim.warmup = 300
  c.optim.schedule = "cosine"
  c.optim.b2 = 0.98
  c.optim.weight_decay = weight_decay
  c.train.steps = steps
  c.train.checkpoint_every = checkpoint_every
  c.evaluate.every = evaluate_every
  c.evaluate.samples = 1024
