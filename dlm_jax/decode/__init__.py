# SPDX-License-Identifier: Apache-2.0
"""Rounds over a cache: blocks alone or with a draft. Imports jax, flax and numpy only."""

from dlm_jax.decode.block import block_decoder
from dlm_jax.decode.interfaces import Rounds, RowOptions
from dlm_jax.decode.loop import Info, decode, finish, pad_prompts, start
from dlm_jax.decode.progress import LENGTH, RUNNING, STOP
from dlm_jax.decode.rule import Block, BlockRule, Revealed, hitting_times, reveal
from dlm_jax.decode.speculative import speculative_decoder
from dlm_jax.decode.speculative_options import SpeculativeOptions

__all__ = [
  "LENGTH",
  "RUNNING",
  "STOP",
  "Block",
  "BlockRule",
  "Info",
  "Revealed",
  "Rounds",
  "RowOptions",
  "SpeculativeOptions",
  "block_decoder",
  "decode",
  "finish",
  "hitting_times",
  "pad_prompts",
  "reveal",
  "speculative_decoder",
  "start",
]
