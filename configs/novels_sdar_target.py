# SPDX-License-Identifier: Apache-2.0
"""Block diffusion with SDAR's noise, 39 M parameters, blocks of four tokens; a target to decode.

Continues `novels_ar_target` on the data of `novels_teacher`. Blocks of eight are trained the same
way, from the same start.

900 steps took 172 s on one H100: validation bound 59.9 per token, with blocks of eight 65.4; see
docs/decoding.md.

Reference: SDAR, arXiv 2510.06303.

  dlm-jax train --config=novels_sdar_target --workdir=runs/novels_sdar_target
  dlm-jax train --config=novels_sdar_target --workdir=runs/novels_sdar_target_b8 \\
    --config.objective.block_length=8
"""

from dlm_jax.configs.recipes import block_diffusion, next_token, novels


def get_config():
  c = novels.corpus()
  novels.training(c, steps=900, evaluate_every=300, lr=6e-4)
  next_token.decoder(c, dim=512, layers=11, heads=8, kv_heads=4)
  block_diffusion.sdar(c, start="runs/novels_ar_target")
  c.loader.batch_size = 128  # of twice the tokens: noisy and clean
  c.objective.accumulate = 2  # attention scores of one piece would take 36 GiB
  c.optim.warmup = 100
  return c
