# SPDX-License-Identifier: Apache-2.0
"""Sampling: pure functions for other people's pipelines. Imports jax, flax and numpy only."""

from dlm_jax import draw
from dlm_jax.sample import grids
from dlm_jax.sample._generate import evaluations, generate
from dlm_jax.sample._rule import BlockOptions, Revealed, hitting_times, reveal

__all__ = [
  "BlockOptions", "Revealed", "draw", "evaluations", "generate", "grids", "hitting_times", "reveal",
]  # fmt: skip
