# SPDX-License-Identifier: Apache-2.0
"""Autoregressive judge of the protein runs, 14 M parameters.

1,000 steps took 109 s on one H100, beside the teacher, on 15,480 sequences (see the teacher).

dlm-jax prepare --config=proteins_judge
dlm-jax train --config=proteins_judge --workdir=runs/proteins_judge
"""

from dlm_jax.configs import common, proteins_teacher


def get_config():
  c = proteins_teacher.get_config()
  c.model = common.base().model
  c.model.name = "causal"
  c.model.dim = 384
  c.model.layers = 8
  c.model.heads = 6
  c.model.dropout = 0.1
  c.objective.name = "ar"
  c.train.steps = 1000
  return c
