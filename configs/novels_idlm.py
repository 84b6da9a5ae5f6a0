# SPDX-License-Identifier: Apache-2.0
"""IDLM students of the novels teacher; need runs/novels_teacher and runs/novels_judge.

By default of samplers with 4 and 8 spaced steps. 300 updates took three minutes on one H200, beside
three other runs; with 8 evaluations GenPPL came to 10 to 17 % below that of the teacher's exact
limit of 256, at equal entropy (512 samples, three seeds).

The variant "published" has the paper's loss, of the whole prediction, and random masks. 100 updates
took 54 s on one H100; the student after 40 was kept. In random order, of the teacher's GenPPL /
entropy 395 / 4.88 with 8 evaluations and 254 / 4.87 with 16 it left 253 / 4.79 and 162 / 4.77 (512
samples); at equal entropy, by temperature, its GenPPL is 8 % below the teacher's with 8.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm --workdir=runs/novels_idlm
"""

from dlm_jax.configs.recipes import brief, idlm, novels

VARIANTS = ("published",)
_MEASURED = {"teacher": "runs/novels_teacher", "judge": "runs/novels_judge"}


def get_config(variant=""):
  c = novels.novels()
  if variant == "published":
    idlm.masked(c, **_MEASURED)
    brief.distillation(c, steps=120, every=20, max_entropy_drop=0.15, checkpoint_every=60)
    c.evaluate.order = "random"
  else:
    idlm.of_steps(c, 4, 8, **_MEASURED)
    brief.matched_distillation(c, steps=300, every=50, lr=9e-6)
  return c
