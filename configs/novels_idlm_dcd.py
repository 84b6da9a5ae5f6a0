# SPDX-License-Identifier: Apache-2.0
"""IDLM student that starts from the novels DCD student.

Needs runs/novels_dcd and runs/novels_judge. 200 updates took 81 s on one H100. GenPPL / entropy
went from 224 / 4.41 in 8 steps and 178 / 4.45 in 16 to 201 / 4.71 and 167 / 4.73 (512 samples; with
the greedy tail 9 and 17 evaluations). A DCD student repeats itself, so a state is kept only if its
entropy is higher than that by 0.1 nats.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm_dcd --workdir=runs/novels_idlm_dcd
"""

from dlm_jax.configs.recipes import brief, idlm, novels


def get_config():
  c = novels.novels()
  idlm.uniform(c, teacher="runs/novels_dcd", judge="runs/novels_judge", tau=0.0316)  # Duo's
  brief.distillation(c, steps=200, every=25, max_entropy_drop=-0.1, checkpoint_every=50)
  c.objective.accumulate = 4  # gradients pass through three trunks: 38 GiB at 128 sequences at once
  c.evaluate.patience = 9  # the entropy rises slowly
  return c
