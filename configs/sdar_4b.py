# SPDX-License-Identifier: Apache-2.0
"""The shape of SDAR-4B, 4.4 B parameters: for continued training and benchmarks.

Put the public checkpoint with its tokenizer into models/SDAR-4B-Chat and your text into
data/text/. Not run by us.

Reference: SDAR, arXiv 2510.06303.

  dlm-jax prepare --config=sdar_4b
  dlm-jax train --config=sdar_4b --workdir=runs/sdar_4b
"""

from dlm_jax.configs import common


def get_config():
  c = common.sdar_shape(dim=2560, layers=36, heads=32, kv_heads=8, mlp_dim=9728)
  c.start.path = c.data.tokenizer = "models/SDAR-4B-Chat"
  return c
