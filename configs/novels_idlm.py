# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the novels teacher; needs runs/novels_teacher and runs/novels_judge.

120 updates took 103 s on one H100, beside other runs; the student after 60 was kept. Of the
teacher's GenPPL / entropy 391 / 4.88 with 8 evaluations and 250 / 4.86 with 16 it left 209 / 4.75
and 136 / 4.72 (512 samples); with 1,024 the teacher has 164 / 4.85. After 120 updates 16
evaluations had lost 0.32 nats.

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
