# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the novels Duo teacher.

Needs runs/novels_duo and runs/novels_judge. 300 updates took 191 s on one H100. At this size, of a
teacher of 1,600 steps, they did not help: GenPPL / entropy with 4 evaluations went from 783 / 4.44
over 948 / 4.51 at step 100 to 1316 / 4.60 (128 samples, greedy tail), so the network that is kept
is the teacher. The gradient through the states had norms of 2,000 to 11,000, against 11 to 43 for a
masked teacher; we suspect its noise at a temperature of 1e-3 and 33,000 tokens per update. The
released scripts have 524,000 tokens per update, and thousands of updates at a lower rate.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm_duo --workdir=runs/novels_idlm_duo
"""

from dlm_jax.configs import common, novels_duo


def get_config():
  c = novels_duo.get_config()
  c.objective = common.base().objective
  c = common.distill_uniform(c, teacher="runs/novels_duo", judge="runs/novels_judge")
  c = common.brief_idlm(c, steps=150)
  c.objective.tau = 0.0316  # the teacher's
  c.objective.accumulate = 4  # gradients pass through three trunks: 38 GiB at 128 sequences at once
  c.train.checkpoint_every = 50
  c.evaluate.every = 25
  c.evaluate.nfes = (8, 16)
  c.evaluate.max_entropy_drop = 0.25
  return c
