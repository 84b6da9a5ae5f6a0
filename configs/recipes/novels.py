# SPDX-License-Identifier: Apache-2.0
"""English novels: plain-text books of your own, with a network and a training in minutes."""

from dlm_jax.configs.base import base
from dlm_jax.configs.recipes import brief


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


def training(c, steps, evaluate_every, lr=1e-3, **options):
  """Train as `brief.training` does, in batches of 256."""
  options |= {"steps": steps, "evaluate_every": evaluate_every, "lr": lr}
  brief.training(c, batch_size=256, samples=1024, **options)
