# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct student of the novels teacher; needs runs/novels_teacher and runs/novels_judge.

The discriminator's rate is as low as the student's, and the teacher's divergence counts: without
either the student collapsed (docs/results.md).

Reference: DiDi-Instruct, arXiv 2509.25035.

  dlm-jax train --config=novels_didi --workdir=runs/novels_didi
  dlm-jax sample --checkpoint=runs/novels_didi --sampler=rgas --steps=16
"""

from dlm_jax.configs import common, novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c = common.didi(c, teacher="runs/novels_teacher", judge="runs/novels_judge")
  c = common.brief_didi(c)
  c.objective.kl_beta = 50.0
  c.optim.discriminator.lr = 1e-5
  c.train.steps = 300
  c.evaluate.every = 25
  return c
