# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct student of the novels teacher. Not run by us yet.

Needs runs/novels_teacher and runs/novels_judge.

Reference: DiDi-Instruct, arXiv 2509.25035.

  dlm-jax train --config=novels_didi --workdir=runs/novels_didi
  dlm-jax sample --checkpoint=runs/novels_didi --sampler=rgas --steps=16
"""

from dlm_jax.configs import common, novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c = common.didi(c, teacher="runs/novels_teacher", judge="runs/novels_judge")
  c = common.brief(c, steps=600)
  c.objective.shared_time = True  # rewards of one noise level are compared, see `DiDiOptions`
  c.objective.group_size = 8
  c.objective.warmup = 50
  c.optim.lr = 1e-5
  c.optim.discriminator.lr = 5e-5
  c.evaluate.every = 50
  c.evaluate.nfes = (8, 16)
  c.evaluate.max_entropy_drop = 0.25
  return c
