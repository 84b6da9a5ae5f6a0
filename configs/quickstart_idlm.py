# SPDX-License-Identifier: Apache-2.0
"""The distillation of the quick start: minutes on two CPU cores.

`dlm-jax quickstart` runs it with the shipped teacher and judge. By hand:

  dlm-jax train --config=quickstart_idlm --workdir=runs/quickstart_idlm

Reference: IDLM, arXiv 2602.19066.
"""

from dlm_jax.configs.recipes import idlm, quickstart


def get_config():
  c = quickstart.student()
  idlm.of_steps(c, 4, 8, teacher="shipped:teacher", judge="shipped:judge")
  c.loader.batch_size = 32
  c.optim.lr = 2.5e-5
  c.optim.warmup = 10
  c.optim.final = 0.02
  c.train.checkpoint_every = 20
  c.evaluate.every = 20
  c.evaluate.samples = 128
  c.evaluate.select = "matched"
  c.evaluate.max_entropy_drop = 0.3
  c.evaluate.temperatures = (0.8, 1.0)
  return c
