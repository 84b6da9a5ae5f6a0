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
Scalar = Float[Array, ""] | float
RngKey = Key[Array, ""]

# log 0. Finite, so that 0 · log 0 = 0 and gradients through unreachable tokens are 0, not NaN.
# The value is the one of the public MDLM and Duo code: golden vectors compare to the last digit.
NEG_INF = -1e6
