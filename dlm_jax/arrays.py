# SPDX-License-Identifier: Apache-2.0
"""Axis letters, array aliases and the one finite stand-in for minus infinity.

A tensor carries its shape in its name: `log_x0_BLV` is [batch, length, vocabulary].

  B  batch                L  length (positions)      V  vocabulary, the mask token included
  D  width                H  attention heads         C  channels of a head
  F  feed-forward width   N  samples, layers, states K  gathered positions, steps, keys
  Q  queries of a call    S  slots of a cache        G  key/value heads, each serves H/G queries
  E  experts              R  queries of one key head, rows admitted to a batch
"""

from typing import Any

from jax import Array
from jaxtyping import Float, Key

Params = Any  # a plain pytree of float32 arrays
Metrics = dict[str, Array]  # flat, float32 scalars, "tree/name"
# What data is made of, and a loader yields: a feature by name, all of one shape [B, L].
#   tokens    int32; ids.
#   valid     bool; False on what is given: prompts, frames, padding. Such a token is an input, but
#             never noised, drawn or scored. Absent: every token is valid.
#   position  int32; from 0 in each of several sequences that share a row. Absent: 0 … L − 1.
#   segment   int32; number of the sequence in its row, from 1; 0: padding. Absent: all are one.
Record = dict[str, Any]
Scalar = Float[Array, ""] | float
RngKey = Key[Array, ""]

# log 0. Finite, so that 0 · log 0 = 0 and gradients through unreachable tokens are 0, not NaN.
# The value is the one of the public MDLM and Duo code: golden vectors compare to the last digit.
NEG_INF = -1e6
