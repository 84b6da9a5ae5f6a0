# SPDX-License-Identifier: Apache-2.0
"""Autoregressive decoder of the Qwen3 kind, 39 M parameters: where `novels_sdar_target` starts.

The data of `novels_teacher`. The embedding has a row for the mask, which is never a target.

1,300 steps took 205 s on one H100: validation perplexity 35.1; see docs/decoding.md.

Reference: Qwen3, arXiv 2505.09388.

  dlm-jax prepare --config=novels_ar_target
  dlm-jax train --config=novels_ar_target --workdir=runs/novels_ar_target
"""

from dlm_jax.configs.recipes import next_token, novels


def get_config():
  c = novels.corpus()
  novels.training(c, steps=1300, evaluate_every=400)
  next_token.decoder(c, dim=512, layers=11, heads=8, kv_heads=4)
  next_token.training(c)
  return c
