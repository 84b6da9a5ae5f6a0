# SPDX-License-Identifier: Apache-2.0
"""Block diffusion with SDAR's noise, 8 M parameters, blocks of four tokens; a draft for decoding.

Continues `novels_ar_draft` on the data of `novels_teacher`. Blocks of eight are trained the same
way, from the same start.

2,200 steps took 149 s on one H100: validation bound 58.9 per token, with blocks of eight 63.4
(step 2,000); see docs/decoding.md.

Reference: SDAR, arXiv 2510.06303.

  dlm-jax train --config=novels_sdar_draft --workdir=runs/novels_sdar_draft
  dlm-jax train --config=novels_sdar_draft --workdir=runs/novels_sdar_draft_b8 \\
    --config.objective.block_length=8
"""

from dlm_jax.configs.recipes import block_diffusion, next_token, novels


def get_config():
  c = novels.corpus()
  novels.training(c, steps=2200, evaluate_every=500)
  next_token.decoder(c, dim=256, layers=8, heads=4, kv_heads=2)
  block_diffusion.sdar(c, start="runs/novels_ar_draft")
  c.loader.batch_size = 128  # of twice the tokens: noisy and clean
  c.optim.warmup = 100
  return c
