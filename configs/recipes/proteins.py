# SPDX-License-Identifier: Apache-2.0
"""Proteins: FASTA files of your own, and a network of 17 M parameters."""

from dlm_jax.configs.base import base
from dlm_jax.configs.recipes import brief


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
  """Train as `brief.training` does, in batches of 128."""
  brief.training(c, batch_size=128, steps=steps, evaluate_every=250, samples=512, lr=5e-4)
