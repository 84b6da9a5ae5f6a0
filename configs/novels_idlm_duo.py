# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the novels Duo teacher. Not run by us yet.

Needs runs/novels_duo and runs/novels_judge.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm_duo --workdir=runs/novels_idlm_duo
"""

from dlm_jax.configs import common, novels_duo


def get_config():
  c = novels_duo.get_config()
  c.objective = common.base().objective
  c = common.distill_uniform(c, teacher="runs/novels_duo", judge="runs/novels_judge")
  c = common.brief(c, steps=300)
  c.objective.accumulate = 4  # gradients pass through three trunks: 38 GiB at 128 sequences at once
  c.optim.lr = 3e-6
  c.optim.b2 = 0.99
  c.train.checkpoint_every = 50
  c.evaluate.every = 50
  c.evaluate.nfes = (4, 8)
  c.evaluate.max_entropy_drop = 0.25
  return c
