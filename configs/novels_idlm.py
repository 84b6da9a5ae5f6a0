# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the novels teacher; needs runs/novels_teacher and runs/novels_judge.

A minute on one H100. Of the teacher's 431 GenPPL at entropy 4.88 with 8 evaluations 60 updates left
218 at 4.75; with 16, 139 at 4.71 of 275 at 4.87 (128 samples; the teacher's 512).

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm --workdir=runs/novels_idlm
"""

from dlm_jax.configs import common, novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c = common.distill(c, teacher="runs/novels_teacher", judge="runs/novels_judge")
  c = common.brief(c, steps=120)
  c.optim.lr = 3e-6
  c.optim.b2 = 0.99
  c.train.checkpoint_every = 60
  c.evaluate.every = 20
  c.evaluate.nfes = (8, 16)
  c.evaluate.max_entropy_drop = 0.15
  return c
