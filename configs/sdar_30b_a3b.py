# SPDX-License-Identifier: Apache-2.0
"""The shape of SDAR-30B-A3B, 30.5 B parameters: for continued training and benchmarks.

Of 128 experts per layer a token visits eight. Put the public checkpoint with its tokenizer into
models/SDAR-30B-A3B-Chat and your text into data/text/. Not run by us.

Reference: SDAR, arXiv 2510.06303.

  dlm-jax prepare --config=sdar_30b_a3b
  dlm-jax train --config=sdar_30b_a3b --workdir=runs/sdar_30b_a3b
"""

from dlm_jax.configs import common


def get_config():
  c = common.sdar_shape(dim=2048, layers=48, heads=32, kv_heads=4, mlp_dim=6144)
  c.model.experts = 128
  c.model.experts_per_token = 8
  c.model.expert_dim = 768
  c.start.path = c.data.tokenizer = "models/SDAR-30B-A3B-Chat"
  return c
