# SPDX-License-Identifier: Apache-2.0
"""Networks. Linen lives in this folder and nowhere else."""

from dlm_jax.models.block_dit import BlockDiT, BlockDiTConfig
from dlm_jax.models.cache import KV, Cache, commit, refill
from dlm_jax.models.causal import Causal, CausalConfig, next_token_logits
from dlm_jax.models.decoder import Decoder, DecoderConfig
from dlm_jax.models.denoiser import Denoiser
from dlm_jax.models.discriminator import Critic, Discriminator
from dlm_jax.models.dit import DiT, DiTConfig
from dlm_jax.models.gpt2 import GPT2, GPT2Config
from dlm_jax.models.storage import STORAGES, default_storage, regroup
from dlm_jax.models.yarn import Yarn

__all__ = [
  "GPT2",
  "KV",
  "STORAGES",
  "BlockDiT",
  "BlockDiTConfig",
  "Cache",
  "Causal",
  "CausalConfig",
  "Critic",
  "Decoder",
  "DecoderConfig",
  "Denoiser",
  "DiT",
  "DiTConfig",
  "Discriminator",
  "GPT2Config",
  "Yarn",
  "commit",
  "default_storage",
  "next_token_logits",
  "refill",
  "regroup",
]
