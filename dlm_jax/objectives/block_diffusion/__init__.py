# SPDX-License-Identifier: Apache-2.0
"""Block diffusion: a decoder learns to denoise blocks, each after the clean ones before it."""

from dlm_jax.objectives.block_diffusion.method import (
  NETWORK,
  TRAINED,
  Options,
  loss,
  make,
  search,
  token_nll,
  with_noise,
)

__all__ = ["NETWORK", "TRAINED", "Options", "loss", "make", "search", "token_nll", "with_noise"]
