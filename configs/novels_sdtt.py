# SPDX-License-Identifier: Apache-2.0
"""Self-distillation through time of the novels teacher.

Needs runs/novels_teacher and runs/novels_judge. 600 steps took 75 s on one H100. Of the
teacher's GenPPL / entropy 861 / 4.90, 395 / 4.88 and 254 / 4.87 with 4, 8 and 16 evaluations they
left 595 / 4.79, 299 / 4.76 and 217 / 4.74 (512 samples), most of it in the last 200 steps.

Reference: SDTT, arXiv 2410.21035.

  dlm-jax train --config=novels_sdtt --workdir=runs/novels_sdtt
"""

from dlm_jax.configs.recipes import brief, novels, sdtt


def get_config():
  c = novels.novels()
  sdtt.sdtt(
    c,
    teacher="runs/novels_teacher",
    judge="runs/novels_judge",
    num_steps=256,
    update_teacher_every=100,
  )
  brief.distillation(c, steps=600, every=100, lr=2e-4, b2=0.98, max_entropy_drop=0.5)
  return c
