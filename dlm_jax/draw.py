# SPDX-License-Identifier: Apache-2.0
"""Every categorical draw of the library: exact inverse-CDF draws in float32.

Why not `jax.random.categorical`: in its default mode a float32 Gumbel never exceeds about 16, so
a token 17 nats below the top is almost never drawn (a tail of total mass 0.1 % came up 0.0024 % of
the time). A race over tokens *and* mask has the same defect, which is where the low entropies of
1000-step samples in the literature come from. Here a draw is an inverse CDF in two levels: block
sums first, then inside the block with a fresh uniform. One uniform for both levels would reach
only a sixth of the tail tokens: its 2⁻²⁴ grid is spent on finding the block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import RngKey

_BLOCK = 256  # of the order of √V for the vocabularies in use


def uniforms(rng: RngKey, shape: tuple[int, ...]) -> Float[Array, "*shape 2"]:
  """Return two independent uniforms in [0, 1) per draw, for `categorical`."""
  return jax.random.uniform(rng, (*shape, 2))


def _first_above(cdf, threshold):
  """Return the first index whose cumulative weight exceeds the threshold, along the last axis."""
  # The last index is reached only by rounding; the caller makes sure that it has weight.
  return jnp.sum(cdf <= threshold[..., None], axis=-1, dtype=jnp.int32)


def _last_positive(weights):
  size = weights.shape[-1]
  return size - 1 - jnp.argmax(weights[..., ::-1] > 0, axis=-1).astype(jnp.int32)


def categorical(
  weights: Float[Array, "*draws V"], uniform: Float[Array, "*draws 2"]
) -> Int[Array, "*draws"]:
  """Draw one token per row by two-level inverse CDF.

  Args:
    weights: nonnegative float32, rows need not be normalised but must have a positive sum.
    uniform: two independent uniforms per row, see `uniforms`.

  Returns:
    int32 token ids; a token of weight 0 is never returned. A token's probability is exact up to
    float32 rounding of its block's sum (about 1e-7 of the total) and of its share in the block.
  """
  vocabulary = weights.shape[-1]
  block = min(_BLOCK, vocabulary)
  blocks = -(-vocabulary // block)
  padding = [(0, 0)] * (weights.ndim - 1) + [(0, blocks * block - vocabulary)]
  tiled = jnp.pad(weights, padding).reshape(*weights.shape[:-1], blocks, block)
  sums = tiled.sum(axis=-1)
  cdf = jnp.cumsum(sums, axis=-1)
  which = _first_above(cdf, uniform[..., 0] * cdf[..., -1])
  which = jnp.minimum(which, _last_positive(sums))
  inside = jnp.take_along_axis(tiled, which[..., None, None], axis=-2)[..., 0, :]
  cdf = jnp.cumsum(inside, axis=-1)
  token = _first_above(cdf, uniform[..., 1] * cdf[..., -1])
  return which * block + jnp.minimum(token, _last_positive(inside))


def race(
  weights: Float[Array, "*draws V"], uniform: Float[Array, "*draws V"]
) -> Int[Array, "*draws"]:
  """Draw as the public MDLM code does: argmax of w / (1e-10 − log(u + 1e-10)), in float32.

  Kept for parity with published numbers only. It cannot draw tokens of weight below about 6e-8 of
  the total, and on top of that loses tokens to the mask: see the module's docstring.
  """
  exponential = 1e-10 - jnp.log(uniform + 1e-10)
  return jnp.argmax(weights / exponential, axis=-1).astype(jnp.int32)


def sharpen(
  log_probs: Float[Array, "*draws V"], temperature: float = 1.0, nucleus: float = 1.0
) -> Float[Array, "*draws V"]:
  """Return weights of the tempered, nucleus-truncated distribution.

  Both options act on the prediction of the clean token, never on a posterior that includes the
  mask. Nucleus keeps the smallest set of most probable tokens whose mass reaches `nucleus`; ties
  with the last kept token are kept too.

  Args:
    log_probs: normalised log-probabilities, float32.
    temperature: > 0; 1 leaves the distribution as it is.
    nucleus: in (0, 1]; 1 keeps everything.
  """
  if temperature != 1.0:
    log_probs = log_probs / temperature
  probs = jax.nn.softmax(log_probs, axis=-1)
  if nucleus >= 1.0:
    return probs
  descending = -jnp.sort(-probs, axis=-1)
  before = jnp.cumsum(descending, axis=-1) - descending
  smallest = jnp.min(jnp.where(before < nucleus, descending, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(probs >= smallest, probs, 0.0)
