# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the novels Duo teacher.

Needs runs/novels_duo and runs/novels_judge. 250 updates took 139 s on one H100. Of the teacher's
GenPPL / entropy 331 / 4.49 in 8 steps and 228 / 4.51 in 16 they left 264 / 4.82 and 198 / 4.83 (512
samples; with the greedy tail 9 and 17 evaluations), and it still improved: docs/results.md says
what the temperature does.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm_duo --workdir=runs/novels_idlm_duo
"""

from dlm_jax.configs.recipes import brief, idlm, novels


def get_config():
  c = novels.novels()
  idlm.uniform(c, teacher="runs/novels_duo", judge="runs/novels_judge", tau=0.0316)  # the teacher's
  brief.distillation(c, steps=250, every=25, checkpoint_every=50)
  c.objective.accumulate = 4  # gradients pass through three trunks: 38 GiB at 128 sequences at once
  return c
