# SPDX-License-Identifier: Apache-2.0
"""The shape of SDAR-1.7B, 2.0 B parameters: for continued training and benchmarks.

Put the public checkpoint with its tokenizer into models/SDAR-1.7B-Chat and your text into
data/text/. Not run by us.

Reference: SDAR, arXiv 2510.06303.

  dlm-jax prepare --config=sdar_1b7
  dlm-jax train --config=sdar_1b7 --workdir=runs/sdar_1b7
"""

from dlm_jax.configs import common


def get_config():
  c = common.sdar_shape(dim=2048, layers=28, heads=16, kv_heads=8, mlp_dim=6144)
  c.start.path = c.data.tokenizer = "models/SDAR-1.7B-Chat"
  return c
