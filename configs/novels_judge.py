# SPDX-License-Identifier: Apache-2.0
"""Autoregressive judge of the novels runs, 30 M parameters.

1,600 steps took 137 s on one H100: validation perplexity 35.1 per token.

dlm-jax prepare --config=novels_judge
dlm-jax train --config=novels_judge --workdir=runs/novels_judge
"""

from dlm_jax.configs.recipes import next_token, novels


def get_config():
  c = novels.novels(unrolled=True)
  novels.training(c, steps=1600, evaluate_every=400)
  next_token.judge(c)
  return c
