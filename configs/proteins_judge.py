# SPDX-License-Identifier: Apache-2.0
"""Autoregressive judge of the protein runs, 14 M parameters.

1,000 steps took 109 s on one H100, beside the teacher, on 15,480 sequences (see the teacher).

dlm-jax prepare --config=proteins_judge
dlm-jax train --config=proteins_judge --workdir=runs/proteins_judge
"""

from dlm_jax.configs.recipes import next_token, proteins


def get_config():
  c = proteins.proteins()
  proteins.training(c, steps=1000)
  next_token.judge(c)
  return c
