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

from dlm_jax.configs import common, novels_ar_target


def get_config():
  c = common.sdar(novels_ar_target.get_config(), start="runs/novels_ar_target")
  c.loader.batch_size = 128  # of twice the tokens: noisy and clean
  c.objective.accumulate = 2  # attention scores of one piece would take 36 GiB
  c.optim.lr = 6e-4
  c.optim.warmup = 100
  c.train.steps = 900
  c.evaluate.every = 300
  return c
