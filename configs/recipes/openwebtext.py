# SPDX-License-Identifier: Apache-2.0
"""OpenWebText at the papers' size: 170 M parameters, GPT-2's tokens, sequences of 1,024."""

from dlm_jax.configs.base import base


def openwebtext():
  """Return all fields: data/openwebtext/, the tokenizer of data/gpt2/, the public networks' shape.

  The vocabulary has 50,257 tokens and the mask.
  """
  c = base()
  c.data.directory = "data/owt_packed"
  c.data.source = "files:data/openwebtext/*.jsonl*"
  c.data.options.validation_fraction = 0.0125
  c.data.tokenizer = "data/gpt2"
  c.data.length = 1024
  c.model.vocab_size = 50258
  c.model.unroll = 12  # all layers
  return c


def training(c):
  """Train for a million updates of 512 sequences."""
  c.loader.batch_size = 512
  c.train.steps = 1_000_000
  c.train.checkpoint_every = 5000


def measured(c, every, nfes):
  """Measure 256 samples while a student is distilled; `nfes` are the evaluations of each."""
  c.evaluate.every = every
  c.evaluate.nfes = nfes
  c.evaluate.samples = 256
  c.evaluate.batch_size = 32
