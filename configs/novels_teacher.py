# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion teacher, 35 M parameters, on about 90 MB of English novels.

Put your own plain-text books into data/novels/; documents are split at four line ends.

2,200 steps took 184 s on one H100: validation bound 64.4 per token; see docs/results.md.

Reference: MDLM, arXiv 2406.07524.

  dlm-jax prepare --config=novels_teacher
  dlm-jax train --config=novels_teacher --workdir=runs/novels_teacher
"""

from dlm_jax.configs import common


def get_config():
  c = common.base()
  c.data.directory = "data/novels_packed"
  c.data.source = "files:data/novels/train*.txt*"
  c.data.options.validation = "data/novels/valid*.txt*"
  c.data.options.document_separator = "\n\n\n\n"
  c.data.tokenizer = "bpe:4096"
  c.data.length = 256
  c.model.dim = 512
  c.model.layers = 9
  c.model.heads = 8
  c.model.unroll = c.model.layers
  c.model.dropout = 0.0
  c.loader.batch_size = 256
  c.objective.ema_decay = 0.999
  c.optim.lr = 1e-3
  c.optim.warmup = 300
  c.optim.schedule = "cosine"
  c.optim.b2 = 0.98
  c.optim.weight_decay = 0.03
  c.train.steps = 2200
  c.train.checkpoint_every = 1000
  c.evaluate.every = 400
  c.evaluate.samples = 1024
  return c
