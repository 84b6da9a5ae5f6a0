# SPDX-License-Identifier: Apache-2.0
"""Discrete consistency distillation of the novels Duo teacher.

Needs runs/novels_duo and runs/novels_judge. 500 steps took 67 s on one H100. Of the
teacher's GenPPL / entropy 711 / 4.44 in 4 steps, 331 / 4.49 in 8 and 198 / 4.53 in 32 they left
362 / 4.36, 224 / 4.41 and 169 / 4.46 (512 samples; the greedy tail is one evaluation more).

Reference: Duo, arXiv 2506.10892, section 5.

  dlm-jax train --config=novels_dcd --workdir=runs/novels_dcd
"""

from dlm_jax.configs.recipes import brief, dcd, novels


def get_config():
  c = novels.novels()
  dcd.dcd(c, teacher="runs/novels_duo", judge="runs/novels_judge", update_teacher_every=100)
  brief.distillation(c, steps=500, every=100, lr=2e-4, b2=0.98, nfes=(4, 8), max_entropy_drop=0.5)
  return c
