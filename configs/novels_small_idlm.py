# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the small novels teacher; needs runs/novels_small_teacher and -_judge.

Shipped as "novels-student"; see dlm_jax/assets/README.md. 160 updates took 87 s on one H100, beside
another run; the student after 140 was kept. GenPPL / entropy by the shipped judge (128 samples):
teacher 340 / 4.88 with 8 evaluations and 209 / 4.88 with 16, student 195 / 4.75 and 119 / 4.73, not
at equal entropy: a lower temperature brings the teacher about as far. At a learning rate of 1e-6,
400 updates led to the same: 192 / 4.75 and 119 / 4.72. The shipped one saw 20 MB of the text and
started from the shipped, bfloat16 teacher.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_small_idlm --workdir=runs/novels_small_idlm
"""

from dlm_jax.configs.recipes import brief, idlm, novels


def get_config():
  c = novels.novels(dim=256, layers=6, heads=4)
  idlm.of_steps(c, 4, 8, teacher="runs/novels_small_teacher", judge="runs/novels_small_judge")
  brief.matched_distillation(c, steps=400, every=50, lr=1e-5)
  c.model.cond_dim = 64
  return c
