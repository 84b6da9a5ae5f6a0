# SPDX-License-Identifier: Apache-2.0
"""Autoregressive judge small enough to ship, 3.4 M parameters, on English novels.

The data of `novels_teacher`. Shipped as "novels-judge"; see dlm_jax/assets/README.md. 6,000 steps
took 220 s on one H100, beside two other runs; the best network, validation perplexity 39.9 per
token, came after 4,000.

  dlm-jax prepare --config=novels_small_judge
  dlm-jax train --config=novels_small_judge --workdir=runs/novels_small_judge
"""

from dlm_jax.configs import novels_judge


def get_config():
  c = novels_judge.get_config()
  c.model.dim = 192
  c.model.layers = 6
  c.model.unroll = c.model.layers
  c.model.heads = 3
  c.optim.lr = 2e-3
  c.optim.weight_decay = 0.01
  c.train.steps = 6000
  c.train.checkpoint_every = 2000
  c.evaluate.every = 1000
  return c
