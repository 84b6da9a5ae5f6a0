# SPDX-License-Identifier: Apache-2.0
"""The shape of a public SDAR network: for continued training on your own text, and benchmarks.

Put the public checkpoint with its tokenizer into models/SDAR-8B-Chat, or that of another size, and
your text into data/text/. Trained as its authors tune it. Not run by us.

  variant   checkpoint             parameters
  1b7       SDAR-1.7B-Chat              2.0 B
  4b        SDAR-4B-Chat                4.4 B
  8b        SDAR-8B-Chat                8.2 B
  30b_a3b   SDAR-30B-A3B-Chat          30.5 B, of 128 experts per layer a token visits eight

Reference: SDAR, arXiv 2510.06303; released code.

  dlm-jax prepare --config=sdar:8b
  dlm-jax train --config=sdar:8b --workdir=runs/sdar_8b
"""

from dlm_jax.configs.base import base
from dlm_jax.configs.recipes import block_diffusion

_EXPERTS = {"experts": 128, "experts_per_token": 8, "expert_dim": 768}
VARIANTS = {
  "1b7": {"dim": 2048, "layers": 28, "heads": 16, "kv_heads": 8, "mlp_dim": 6144},
  "4b": {"dim": 2560, "layers": 36, "heads": 32, "kv_heads": 8, "mlp_dim": 9728},
  "8b": {"dim": 4096, "layers": 36, "heads": 32, "kv_heads": 8, "mlp_dim": 12_288},
  "30b_a3b": {"dim": 2048, "layers": 48, "heads": 32, "kv_heads": 4, "mlp_dim": 6144, **_EXPERTS},
}
_CHECKPOINTS = {
  "1b7": "models/SDAR-1.7B-Chat",
  "4b": "models/SDAR-4B-Chat",
  "8b": "models/SDAR-8B-Chat",
  "30b_a3b": "models/SDAR-30B-A3B-Chat",
}


def get_config(variant):
  c = base()
  block_diffusion.sdar(c, start=_CHECKPOINTS[variant], first_given=False)
  c.data.directory = "data/sdar_packed"
  c.data.source = "files:data/text/*.txt*"
  c.data.tokenizer = _CHECKPOINTS[variant]
  c.data.length = 2048
  c.loader.batch_size = 64
  c.model.name = "decoder"
  c.model.vocab_size = 151_936
  c.model.update(VARIANTS[variant])
  c.model.head_dim = 128
  c.model.rope_theta = 1e6
  c.model.remat = "full"
  c.process.mask_id = 151_669  # <|MASK|>
  c.objective.accumulate = 8
  c.objective.ema_decay = 0.0
  c.optim.lr = 1e-5
  c.optim.warmup = 300
  c.train.steps = 10_000
  c.mesh.data = 1
  c.mesh.fsdp = -1
  return c
