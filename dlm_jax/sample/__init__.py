# SPDX-License-Identifier: Apache-2.0
"""Sampling: pure functions for other people's pipelines. Imports jax, flax and numpy only."""

from dlm_jax import decode as _rounds
from dlm_jax import draw
from dlm_jax.decode import *  # noqa: F403
from dlm_jax.process import grids, orders
from dlm_jax.sample._generate import SAMPLERS, check_options, evaluations, generate
from dlm_jax.sample._logits import from_logits
from dlm_jax.sample._request import NOISE_REMOVALS, Request

__all__ = [
  "NOISE_REMOVALS",
  "SAMPLERS",
  "Request",
  "check_options",
  "draw",
  "evaluations",
  "from_logits",
  "generate",
  "grids",
  "orders",
]
__all__ += _rounds.__all__
