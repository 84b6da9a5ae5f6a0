# SPDX-License-Identifier: Apache-2.0
"""Axis letters, array aliases and the one finite stand-in for minus infinity.

A tensor carries its shape in its name: `log_x0_BLV` is [batch, length, vocabulary].

  B  batch                L  length (positions)      V  vocabulary, the mask token included
  D  width                H  attention heads         C  channels of a head
  F  feed-forward width   N  samples, layers, states K  gathered positions, steps, keys
  Q  queries of a call    S  slots of a cache        G  key/value heads, each serves H/G queries
  E  experts              R  queries of one key head, rows admitted to a batch

Signatures name arrays by what they hold and their axes: `FloatBLV` is `Float[Array, "B L V"]`.
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int, Key

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

IntL = Int[Array, "L"]
FloatL = Float[Array, "L"]
FloatLV = Float[Array, "L V"]
BoolL = Bool[Array, "L"]
KeyB = Key[Array, "B"]
FloatB = Float[Array, "B"]
IntBL = Int[Array, "B L"]
BoolBL = Bool[Array, "B L"]
FloatBL = Float[Array, "B L"]
FloatBLD = Float[Array, "B L D"]
FloatBLV = Float[Array, "B L V"]
IntBK = Int[Array, "B K"]
BoolBK = Bool[Array, "B K"]
FloatBK = Float[Array, "B K"]
FloatBKD = Float[Array, "B K D"]
FloatBKV = Float[Array, "B K V"]

# log 0. Finite, so that 0 · log 0 = 0 and gradients through unreachable tokens are 0, not NaN.
# The value is the one of the public MDLM and Duo code: golden vectors compare to the last digit.
NEG_INF = -1e6
