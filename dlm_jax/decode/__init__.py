# SPDX-License-Identifier: Apache-2.0
"""Rounds over a cache: blocks alone or with a draft. Imports jax, flax and numpy only."""

from dlm_jax.decode.block import block_decoder
from dlm_jax.decode.loop import Decoder, Info, decode, finish, pad_prompts
from dlm_jax.decode.progress import LENGTH, RUNNING, STOP
from dlm_jax.decode.rule import BlockOptions, Revealed, hitting_times, reveal
from dlm_jax.decode.speculative import (
  SpeculativeOptions,
  fitting_acceptance,
  speculative_decoder,
)

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
  "finish",
  "fitting_acceptance",
  "hitting_times",
  "pad_prompts",
  "reveal",
  "speculative_decoder",
]
