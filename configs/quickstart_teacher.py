# SPDX-License-Identifier: Apache-2.0
"""The masked diffusion teacher that ships with the package, on Python source text.

Reference: MDLM, arXiv 2406.07524.

Five minutes on one H100, beside the judge: validation bound 19.8 per token.

  dlm-jax prepare --config=quickstart_teacher
  dlm-jax train --config=quickstart_teacher --workdir=runs/quickstart_teacher
"""

from dlm_jax.configs import common


def get_config():
  c = common.base()
  c.data.directory = "data/quickstart"
  c.data.source = "stdlib"
  c.data.options.tests = (
    True  # the shipped networks saw the library's tests too: three times the text
  )
  c.data.tokenizer = "bpe:2048"
  c.data.length = 128
  c.model.dim = 192
  c.model.layers = 5
  c.model.heads = 6
  c.model.cond_dim = 16
  c.loader.batch_size = 512
  c.objective.ema_decay = 0.9995
  c.optim.lr = 2e-3
  c.optim.warmup = 500
  c.optim.schedule = "cosine"
  c.optim.final = 0.02
  c.optim.b2 = 0.98
  c.optim.weight_decay = 0.05
  c.train.steps = 7500
  c.train.log_every = 100
  c.train.checkpoint_every = 2000
  c.evaluate.every = 1000
  c.evaluate.samples = 2048
  c.evaluate.batch_size = 512
  return c
