# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the small novels teacher; needs runs/novels_small_teacher and runs/novels_judge.

Shipped as "novels-student"; see dlm_jax/assets/README.md.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_small_idlm --workdir=runs/novels_small_idlm
"""

from dlm_jax.configs import common, novels_small_teacher


def get_config():
  c = novels_small_teacher.get_config()
  c = common.distill(c, teacher="runs/novels_small_teacher", judge="runs/novels_judge")
  c = common.brief_idlm(c, steps=400)
  c.optim.lr = 1e-5
  c.train.checkpoint_every = 50
  c.evaluate.every = 20
  c.evaluate.samples = 256
  c.evaluate.nfes = (8, 16)
  c.evaluate.max_entropy_drop = 0.15
  return c
