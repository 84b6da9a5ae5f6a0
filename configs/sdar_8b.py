# SPDX-License-Identifier: Apache-2.0
"""The shape of SDAR-8B, 8.2 B parameters: for continued training and benchmarks.

Put the public checkpoint with its tokenizer into models/SDAR-8B-Chat and your text into
data/text/. Not run by us.

Reference: SDAR, arXiv 2510.06303.

  dlm-jax prepare --config=sdar_8b
  dlm-jax train --config=sdar_8b --workdir=runs/sdar_8b
"""

from dlm_jax.configs import common


def get_config():
  c = common.sdar_shape(dim=4096, layers=36, heads=32, kv_heads=8, mlp_dim=12_288)
  c.start.path = c.data.tokenizer = "models/SDAR-8B-Chat"
  return c
