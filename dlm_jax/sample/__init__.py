# SPDX-License-Identifier: Apache-2.0
"""Sampling: pure functions for other people's pipelines. Imports jax, flax and numpy only."""

from dlm_jax import draw
from dlm_jax.sample import grids
from dlm_jax.sample._decode import Decoder, Info, decode, finish, pad_prompts
from dlm_jax.sample._generate import evaluations, generate
from dlm_jax.sample._progress import LENGTH, RUNNING, STOP
from dlm_jax.sample._rule import BlockOptions, Revealed, hitting_times, reveal
from dlm_jax.sample.block import block_decoder
from dlm_jax.sample.simsd import SpeculativeOptions, fitting_acceptance, speculative_decoder

__all__ = [
  "LENGTH",
  "RUNNING",
  "STOP",
  "BlockOptions",
  "Decoder",
  "Info",
  "Revealed",
  "SpeculativeOptions",
  "block_decoder",
  "decode",
  "draw",
  "evaluations",
  "finish",
  "fitting_acceptance",
  "generate",
  "grids",
  "hitting_times",
  "pad_prompts",
  "reveal",
  "speculative_decoder",
]
