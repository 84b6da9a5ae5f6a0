# SPDX-License-Identifier: Apache-2.0
"""Sampling: pure functions for other people's pipelines. Imports jax, flax and numpy only."""

from dlm_jax import draw
from dlm_jax.sample import grids
from dlm_jax.sample._generate import evaluations, generate

__all__ = ["draw", "evaluations", "generate", "grids"]
