# SPDX-License-Identifier: Apache-2.0
"""Autoregressive judge small enough to ship, 3.4 M parameters, on English novels.

The data of `novels_teacher`. Shipped as "novels-judge"; see dlm_jax/assets/README.md. 6,000 steps
took 220 s on one H100, beside two other runs; the best network, validation perplexity 39.9 per
token, came after 4,000.

  dlm-jax prepare --config=novels_small_judge
  dlm-jax train --config=novels_small_judge --workdir=runs/novels_small_judge
"""

from dlm_jax.configs.recipes import next_token, novels


def get_config():
  c = novels.novels(dim=192, layers=6, heads=3, unrolled=True)
  novels.training(
    c, steps=6000, evaluate_every=1000, checkpoint_every=2000, lr=2e-3, weight_decay=0.01
  )
  next_token.judge(c)
  return c
