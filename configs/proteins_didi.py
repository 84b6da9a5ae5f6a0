# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct student of the proteins teacher; needs runs/proteins_teacher and proteins_judge.

Not run by us yet.

Reference: DiDi-Instruct, arXiv 2509.25035, section 4.4.

  dlm-jax train --config=proteins_didi --workdir=runs/proteins_didi
"""

from dlm_jax.configs import common, proteins_teacher


def get_config():
  c = proteins_teacher.get_config()
  c = common.didi(c, teacher="runs/proteins_teacher", judge="runs/proteins_judge")
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
