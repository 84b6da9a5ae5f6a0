# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the novels SEDD teacher.

Needs runs/novels_sedd and runs/novels_judge. Only 20 of the updates below were run, on one H100:
GenPPL / entropy with 8 evaluations from 465 / 4.87 to 433 / 4.89 (128 samples).
The paper's learning rate is 0.3 of the one for MDLM.

Reference: IDLM, arXiv 2602.19066, appendix A.

  dlm-jax train --config=novels_idlm_sedd --workdir=runs/novels_idlm_sedd
"""

from dlm_jax.configs.recipes import brief, idlm, novels


def get_config():
  c = novels.novels()
  idlm.masked(c, teacher="runs/novels_sedd", judge="runs/novels_judge")
  brief.distillation(c, steps=120, every=20, lr=1e-6, max_entropy_drop=0.15, checkpoint_every=60)
  c.process.name = "absorbing_score"
  return c
