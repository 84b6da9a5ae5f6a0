# SPDX-License-Identifier: Apache-2.0
"""Proteins: FASTA files of your own, and a network of 17 M parameters."""

from dlm_jax.configs.base import base


def proteins():
  """Return all fields: data/proteins/, one sequence per record, and the network of all runs."""
  c = base()
  c.data.directory = "data/proteins_packed"
  c.data.source = "fasta:data/proteins/*.fa*"
  c.data.options.min_length = 30  # residues
  c.data.options.validation_fraction = 0.05
  c.data.tokenizer = "esm"
  c.data.packing = "documents"
  c.data.length = 512
  c.data.buckets = (128, 256, 512)
  c.model.dim = 384
  c.model.layers = 8
  c.model.heads = 6
  return c


def training(c, steps):
  """Train for minutes, at a rate that falls."""
  c.loader.batch_size = 128
  c.objective.ema_decay = 0.999
  c.optim.lr = 5e-4
  c.optim.warmup = 300
  c.optim.schedule = "cosine"
  c.optim.b2 = 0.98
  c.optim.weight_decay = 0.03
  c.train.steps = steps
  c.train.checkpoint_every = 1000
  c.evaluate.every = 250
  c.evaluate.samples = 512
