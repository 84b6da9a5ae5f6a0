# SPDX-License-Identifier: Apache-2.0
"""The distillation of the quick start: minutes on two CPU cores.

`dlm-jax quickstart` runs it with the shipped teacher and judge. By hand:

  dlm-jax train --config=quickstart_idlm --workdir=runs/quickstart_idlm

Reference: IDLM, arXiv 2602.19066.
"""

from dlm_jax.configs import common, quickstart_teacher


def get_config():
  c = quickstart_teacher.get_config()
  c = common.distill(c, teacher="shipped:teacher", judge="shipped:judge")
  c.data.directory = "data/quickstart_student"
  c.data.options.tests = False
  c.data.tokenizer = "shipped:teacher"
  c.model.dtype = "float32"
  c.model.dropout = 0.0
  c.loader.batch_size = 32
  c.objective.ema_decay = 0.9  # the run is short
  c.optim.lr = 6e-6
  c.optim.warmup = 10
  c.optim.schedule = "constant"
  c.optim.b2 = 0.99
  c.optim.weight_decay = 0.0
  c.train.steps = 60
  c.train.log_every = 1
  c.train.checkpoint_every = 10
  c.evaluate.every = 10
  c.evaluate.nfes = (8,)
  c.evaluate.samples = 64
  c.evaluate.batch_size = 64
  c.evaluate.max_entropy_drop = 0.2
  return c
