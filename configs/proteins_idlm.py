# SPDX-License-Identifier: Apache-2.0
"""IDLM student of the proteins teacher; needs runs/proteins_teacher and runs/proteins_judge.

Not run by us yet.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=proteins_idlm --workdir=runs/proteins_idlm
"""

from dlm_jax.configs import common, proteins_teacher


def get_config():
  c = proteins_teacher.get_config()
  c = common.distill(c, teacher="runs/proteins_teacher", judge="runs/proteins_judge")
  c = common.brief_idlm(c, steps=120)
  c.train.checkpoint_every = 60
  c.evaluate.every = 20
  c.evaluate.nfes = (8, 16)
  c.evaluate.max_entropy_drop = 0.15
  return c
