# SPDX-License-Identifier: Apache-2.0
"""Every categorical draw of the library: inverse CDF, or Gumbel-max from a key.

Exact up to float32 rounding of sums, about 1e-7 of the total: see `categorical` for what that means
where one token holds nearly everything. Values cannot be checked while a program runs, so of
weights or logits that are no law, with NaN or +inf among them, the token is `NONE`.

Why not `jax.random.categorical`: in its default mode a float32 Gumbel never exceeds about 16, so
a token 17 nats below the top is almost never drawn (a tail of total mass 0.1 % came up 0.0024 % of
the time). A race over tokens *and* mask has the same defect, which is where the low entropies of
1000-step samples in the literature come from. Here a draw is an inverse CDF in two levels: block
sums first, then inside the block with a fresh uniform. One uniform for both levels would reach
only a sixth of the tail tokens: its 2⁻²⁴ grid is spent on finding the block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.arrays import NEG_INF, KeyB, RngKey, Scalar

NONE = -1  # no token: there was no law to draw from
_BLOCK = 256  # of the order of √V for the vocabularies in use
_COLD = float(np.finfo(np.float32).tiny)  # temperatures below are 0, as arithmetic has them


def key(seed: int) -> RngKey:
  """Return the key of a seed of 64 bits, negative or not; one of 32 bits has the key of jax."""
  low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
  rng = jax.random.key(np.uint32(low))
  return rng if -(2**31) <= seed < 2**32 else jax.random.fold_in(rng, np.uint32(high))


def fold_32(seed: int) -> int:
  """Return 32 bits of a seed of 64, for generators that take no more; one below 2³² is as it was.

  The upper half times 2³² / φ, which is odd, is added without carry: seeds that differ in one half
  only never become the same.
  """
  low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
  return low ^ (high * 0x9E3779B1 & 0xFFFFFFFF)


def uniforms(rng: RngKey, shape: tuple[int, ...]) -> Float[Array, "*shape 2"]:
  """Return two independent uniforms in [0, 1) per draw, for `categorical`."""
  return jax.random.uniform(rng, (*shape, 2))


def mask_noise(rng_B: KeyB, masked_BL: Bool[Array, "B L"], width: int) -> Float[Array, "B L N"]:
  """Return standard Gaussian noise of every mask, and zeros elsewhere; one key per sequence."""
  shape = (masked_BL.shape[1], width)
  noise_BLN = jax.vmap(lambda rng: jax.random.normal(rng, shape))(rng_B)
  return jnp.where(masked_BL[..., None], noise_BLN, 0.0)


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
    float32 rounding of its block's sum (about 1e-7 of the total) and of its share in the block. So
    blocks of less than that are drawn too often or never: with a top token of 1 − 1e-5 and
    V = 50,258, 110 of 197 blocks never, 6e-6 in total variation. `NONE` where the weights are not
    finite.
  """
  tiled, block = _tile(weights, 0.0)
  inside = lambda which: jnp.take_along_axis(tiled, which[..., None, None], axis=-2)[..., 0, :]  # noqa: E731
  return _two_levels(tiled.sum(axis=-1), inside, block, uniform)


class Softmax(NamedTuple):
  """A softmax of logits as far as a draw needs it: no array of probabilities is ever written.

  Attributes:
    logits: float32 [..., V].
    peak: their maximum [...].
    sums: exp(logits − peak), summed over blocks of the vocabulary [..., V / block].
  """

  logits: Float[Array, "*draws V"]
  peak: Float[Array, "*draws"]
  sums: Float[Array, "*draws blocks"]

  def probability(self, ids: Int[Array, "*draws"]) -> Float[Array, "*draws"]:
    """Return the probability of one token per row."""
    at_ids = jnp.take_along_axis(self.logits, ids[..., None], axis=-1)[..., 0]
    return jnp.exp(at_ids - self.peak) / self.sums.sum(axis=-1)

  def draw(self, uniform: Float[Array, "*draws 2"]) -> Int[Array, "*draws"]:
    """Draw one token per row, as `categorical` does from the weights exp(logits − peak)."""
    size = self.logits.shape[-1]
    block = min(_BLOCK, size)

    def inside(which):
      ids = which[..., None] * block + _along_last(block, which.ndim)
      logits = jnp.take_along_axis(self.logits, jnp.minimum(ids, size - 1), axis=-1)
      return jnp.where(ids < size, jnp.exp(logits - self.peak[..., None]), 0.0)

    return _two_levels(self.sums, inside, block, uniform)


def softmax(logits: Float[Array, "*draws V"]) -> Softmax:
  """Read logits twice, for their maximum and for the sums over blocks; −inf is weight 0.

  Logits must be finite or −inf, one of a row finite: a row with NaN or +inf draws `NONE`.

  On a GPU a uniform-state sampler's step spent 7 ms on a written softmax and its sums where the
  vocabulary head took 2 (32 × 1024 tokens, V = 50,258, 43 % of the positions).
  """
  peak = logits.max(axis=-1)
  tiled, _ = _tile(logits, -jnp.inf)
  return Softmax(logits, peak, jnp.exp(tiled - peak[..., None, None]).sum(axis=-1))


def _along_last(size, ndim):
  """Return 0 … size − 1 with `ndim` leading axes."""
  return jnp.arange(size).reshape((1,) * ndim + (size,))


def _tile(rows, fill):
  """Return rows [..., V] as [..., blocks, block], filled up, and the block."""
  size = rows.shape[-1]
  block = min(_BLOCK, size)
  blocks = -(-size // block)
  padding = [(0, 0)] * (rows.ndim - 1) + [(0, blocks * block - size)]
  tiled = jnp.pad(rows, padding, constant_values=fill)
  return tiled.reshape(*rows.shape[:-1], blocks, block), block


def _two_levels(sums, inside, block, uniform):
  """Draw a block by its sum, then a token by `inside(block)`, the weights within."""
  cdf = jnp.cumsum(sums, axis=-1)
  which = _first_above(cdf, uniform[..., 0] * cdf[..., -1])
  which = jnp.minimum(which, _last_positive(sums))
  weights = inside(which)
  cdf = jnp.cumsum(weights, axis=-1)
  token = _first_above(cdf, uniform[..., 1] * cdf[..., -1])
  token = which * block + jnp.minimum(token, _last_positive(weights))
  return jnp.where(jnp.isfinite(sums.sum(axis=-1)), token, NONE)


def most_probable(logits: Float[Array, "*draws V"]) -> Int[Array, "*draws"]:
  """Return the first of the most probable tokens of each row, `NONE` of one that is no law."""
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jnp.where(jnp.isfinite(logits.max(axis=-1)), best, NONE)


def gumbel_max(
  logits_V: Float[Array, "V"], rng: RngKey, noisy: Bool[Array, ""] | bool = True
) -> Int[Array, ""]:
  """Draw one token from softmax(logits) as argmax(logits + Gumbel noise): exact, one key a token.

  For draws that two programs must share. The noise depends on the key alone, so paths that reach
  the same state with the same key draw the same token even where their logits differ by rounding;
  an inverse CDF would move with every sum. It costs V Gumbels a token: where nothing is shared,
  `categorical` and `softmax` are cheaper.

  `jax.random.gumbel` has the defect of the module's first paragraph in its default mode, a float32
  uniform that is never below 2⁻²³; mode="high" draws the small uniforms as finely as the others.

  Args:
    logits_V: float32, need not be normalised; −inf is never drawn if one other is finite. +inf
      always is; NaN means nothing.
    rng: a key used for nothing else; `vmap` over rows of logits and keys.
    noisy: False takes the most probable token instead, at the same cost.
  """
  noise_V = jax.random.gumbel(rng, logits_V.shape, jnp.float32, mode="high")
  return jnp.argmax(logits_V + jnp.where(noisy, noise_V, 0.0), axis=-1).astype(jnp.int32)


def race(
  weights: Float[Array, "*draws V"], uniform: Float[Array, "*draws V"]
) -> Int[Array, "*draws"]:
  """Draw as the public MDLM code does: argmax of w / (1e-10 − log(u + 1e-10)), in float32.

  Kept for parity with published numbers only. It cannot draw tokens of weight below about 6e-8 of
  the total, and on top of that loses tokens to the mask: see the module's docstring.
  """
  exponential = 1e-10 - jnp.log(uniform + 1e-10)
  return most_probable(weights / exponential)


def _tempered(logits, temperature):
  """Return logits over a temperature: 0 for the largest of a row, so that nothing overflows."""
  if isinstance(temperature, jax.Array):
    warm = temperature >= _COLD
    divided = _divided(logits, jnp.where(warm, temperature, 1.0))
    return jnp.where(warm, divided, _first_of_largest(logits))
  if temperature == 1.0:
    return logits
  return _divided(logits, temperature) if temperature >= _COLD else _first_of_largest(logits)


def _divided(logits, temperature):
  possible = logits > NEG_INF / 2
  below = (logits - logits.max(axis=-1, keepdims=True)) / temperature
  return jnp.where(possible, jnp.maximum(below, NEG_INF / 2), logits)  # above the impossible


def _first_of_largest(logits):
  best = jnp.argmax(logits, axis=-1, keepdims=True)
  ids = _along_last(logits.shape[-1], logits.ndim - 1)
  below = logits - logits.max(axis=-1, keepdims=True)  # not 0, so that what is no law stays none
  return jnp.where(ids == best, below, -jnp.inf)


def sharpen(
  logits: Float[Array, "*draws V"],
  temperature: Scalar = 1.0,
  nucleus: Scalar = 1.0,
  top_k: int = 0,
) -> Float[Array, "*draws V"]:
  """Return logits of the tempered, truncated distribution; by default those given.

  All options act on the prediction of the clean token, never on a posterior that includes the
  mask, in this order: temperature, top-k, nucleus. Top-k keeps what is not below the k-th largest
  logit. Nucleus keeps the smallest set of most probable tokens whose mass reaches `nucleus`. Ties
  with the last kept token are kept too, and the others become −inf.

  Args:
    logits: float32; need not be normalised. Those of half of `NEG_INF` and less are impossible
      tokens, which no temperature makes possible.
    temperature: ≥ 0; 1 leaves the distribution as it is. 0 keeps the most probable token alone,
      the first of several; a small one tends to that, with ties kept. May be traced.
    nucleus: in (0, 1]; 1 keeps everything. May be traced; then rows are sorted whatever it is.
    top_k: how many tokens to keep; 0, or V and more, keeps everything.
  """
  logits = _tempered(logits, temperature)
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  traced = isinstance(nucleus, jax.Array)
  if not traced and nucleus >= 1.0:
    return logits
  probs = jax.nn.softmax(logits, axis=-1)
  descending = -jnp.sort(-probs, axis=-1)
  before = jnp.cumsum(descending, axis=-1) - descending
  smallest = jnp.min(jnp.where(before < nucleus, descending, jnp.inf), axis=-1, keepdims=True)
  kept = probs >= smallest
  if traced:
    kept |= nucleus >= 1.0  # the sum of what comes before a rare token may round to 1
  return jnp.where(kept, logits, -jnp.inf)
