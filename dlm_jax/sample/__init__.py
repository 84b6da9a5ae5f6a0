# SPDX-License-Identifier: Apache-2.0
"""Sampling: pure functions for other people's pipelines. Imports jax, flax and numpy only."""

from dlm_jax import draw
from dlm_jax.decode import (
  LENGTH,
  RUNNING,
  STOP,
  Block,
  BlockRule,
  Info,
  Revealed,
  Rounds,
  RowOptions,
  SpeculativeOptions,
  block_decoder,
  decode,
  finish,
  hitting_times,
  pad_prompts,
  reveal,
  speculative_decoder,
  start,
)
from dlm_jax.sample import grids
from dlm_jax.sample._generate import evaluations, generate
from dlm_jax.sample._logits import from_logits
from dlm_jax.sample._request import Request

__all__ = [
  "LENGTH",
  "RUNNING",
  "STOP",
  "Block",
  "BlockRule",
  "Info",
  "Request",
  "Revealed",
  "Rounds",
  "RowOptions",
  "SpeculativeOptions",
  "block_decoder",
  "decode",
  "draw",
  "evaluations",
  "finish",
  "from_logits",
  "generate",
  "grids",
  "hitting_times",
  "pad_prompts",
  "reveal",
  "speculative_decoder",
  "start",
]
