# SPDX-License-Identifier: Apache-2.0
"""Autoregressive judge of the novels runs, 30 M parameters.

1,600 steps took 137 s on one H100: validation perplexity 35.1 per token.

dlm-jax prepare --config=novels_judge
dlm-jax train --config=novels_judge --workdir=runs/novels_judge
"""

from dlm_jax.configs import common, novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c.model = common.base().model
  c.model.name = "causal"
  c.model.dim = 512
  c.model.layers = 9
  c.model.heads = 8
  c.model.unroll = c.model.layers
  c.model.dropout = 0.0
  c.objective.name = "ar"
  c.train.steps = 1600
  return c
