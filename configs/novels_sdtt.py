# SPDX-License-Identifier: Apache-2.0
"""Self-distillation through time of the novels teacher.

Needs runs/novels_teacher and runs/novels_judge. 600 steps took 75 s on one H100. Of the
teacher's GenPPL / entropy 861 / 4.90, 395 / 4.88 and 254 / 4.87 with 4, 8 and 16 evaluations they
left 595 / 4.79, 299 / 4.76 and 217 / 4.74 (512 samples), most of it in the last 200 steps.

Reference: SDTT, arXiv 2410.21035.

  dlm-jax train --config=novels_sdtt --workdir=runs/novels_sdtt
"""

from dlm_jax.configs import common, novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c = common.sdtt(c, teacher="runs/novels_teacher", judge="runs/novels_judge")
  c = common.brief(c, steps=600)
  c.objective.num_steps_original = 256
  c.objective.update_teacher_every = 100
  c.optim.lr = 2e-4
  c.evaluate.every = 100
  c.evaluate.nfes = (8, 16)
  c.evaluate.max_entropy_drop = 0.5
  return c
