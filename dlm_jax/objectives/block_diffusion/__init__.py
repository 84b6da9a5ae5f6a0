# SPDX-License-Identifier: Apache-2.0
"""Block diffusion: a decoder learns to denoise blocks, each after the clean ones before it."""

from dlm_jax.objectives.block_diffusion.method import TRAINED, loss, make, token_nll, with_noise

__all__ = ["TRAINED", "loss", "make", "token_nll", "with_noise"]
