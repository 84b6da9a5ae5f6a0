# SPDX-License-Identifier: Apache-2.0
"""The distillation of the quick start: minutes on two CPU cores.

`dlm-jax quickstart` runs it with the shipped teacher and judge. By hand:

  dlm-jax train --config=quickstart_idlm --workdir=runs/quickstart_idlm

Reference: IDLM, arXiv 2602.19066.
"""

from dlm_jax.configs.recipes import idlm, quickstart


def get_config():
  c = quickstart.student()
  idlm.masked(c, teacher="shipped:teacher", judge="shipped:judge")
  c.loader.batch_size = 32
  c.optim.lr = 6e-6
  c.optim.warmup = 10
  c.optim.final = 0.02
  c.train.checkpoint_every = 10
  c.evaluate.every = 10
  return c
