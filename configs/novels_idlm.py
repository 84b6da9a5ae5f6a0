# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the novels teacher; needs runs/novels_teacher and runs/novels_judge.

A minute on one H100. Of the teacher's GenPPL / entropy 390 / 4.88 with 8 evaluations and 259 / 4.87
with 16, 40 updates left 252 / 4.78 and 166 / 4.77, 60 left 202 / 4.71 and 132 / 4.69; at step 100
the entropy collapsed and the run stopped (128 samples).

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm --workdir=runs/novels_idlm
"""

from dlm_jax.configs import common, novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c = common.distill(c, teacher="runs/novels_teacher", judge="runs/novels_judge")
  c = common.brief_idlm(c, steps=120)
  c.train.checkpoint_every = 60
  c.evaluate.every = 20
  c.evaluate.nfes = (8, 16)
  c.evaluate.max_entropy_drop = 0.15
  return c
