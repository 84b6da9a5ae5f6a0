# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the Hugging Face layout ↔ our networks. Strict: nothing is skipped silently.

An architecture is a file of `families/`; what this package exports knows none of them.
"""

from dlm_jax.convert.network import (
  Network,
  block_length,
  fingerprint,
  from_tensors,
  load,
  load_beside,
  open_network,
  read_config,
  to_tensors,
  writes,
)
from dlm_jax.convert.weights import Weights
from dlm_jax.convert.writing import save, save_beside

__all__ = [
  "Network",
  "Weights",
  "block_length",
  "fingerprint",
  "from_tensors",
  "load",
  "load_beside",
  "open_network",
  "read_config",
  "save",
  "save_beside",
  "to_tensors",
  "writes",
]
