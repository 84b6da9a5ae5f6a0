# SPDX-License-Identifier: Apache-2.0
"""Text files of your own: a small network, and training in minutes of one accelerator."""

from dlm_jax.configs.base import base
from dlm_jax.configs.recipes import brief


def own_text(dropout):
  """Return all fields: text/*.txt, of which the last twentieth of every file is held out."""
  c = base()
  c.data.source = "files:text/*.txt"
  c.data.options.validation_tail = 0.05
  c.data.directory = "data/own_text"
  c.data.tokenizer = "bpe:2048"
  c.data.length = 128
  c.model.dim = 256
  c.model.layers = 6
  c.model.heads = 4
  c.model.dropout = dropout  # few texts are long enough for none
  return c


def training(c):
  """Train on tokens."""
  brief.training(c, batch_size=128, steps=4000, evaluate_every=500, samples=256, lr=2e-3)
