# SPDX-License-Identifier: Apache-2.0
"""Text from networks that decode blocks: requests, checks, streaming."""

from dlm_jax.decoding.requests import VERIFY, Plan
from dlm_jax.decoding.text import Generation, TextDecoder, open_decoder

__all__ = ["VERIFY", "Generation", "Plan", "TextDecoder", "open_decoder"]
