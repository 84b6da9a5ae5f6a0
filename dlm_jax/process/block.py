# SPDX-License-Identifier: Apache-2.0
"""Noise of block diffusion: which tokens of a sequence become masks, and what a mask counts.

A sequence is cut into blocks, several documents may share it. Blocks and documents are numbered
along the sequence; everything below takes one sequence, callers `vmap`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.arrays import BoolL, FloatL, IntL, RngKey
from dlm_jax.errors import InputError
from dlm_jax.process.absorbing import Absorbing

LEVELS = ("block", "document")
WEIGHTS = ("nelbo", "one")
FULL = (1e-3, 1.0)  # the times of evaluation
_TRIES = 10
_GOLDEN = 0.6180339887498949  # its multiples mod 1 spread the documents of a sequence over [0, 1)


class Noised(NamedTuple):
  """A noisy sequence: its tokens, the time and the loss weight of every position."""

  tokens_L: IntL
  time_L: FloatL
  weight_L: FloatL


def number_blocks(position_L: IntL, block_length: Int[Array, ""] | int) -> IntL:
  """Return the number of each token's block, counted along the sequence from 0.

  Args:
    position_L: from 0 in every document; blocks lie on the grid of positions, so that a document
      starts one, and its last one may be short.
    block_length: tokens per block; may be traced.
  """
  starts_L = position_L % block_length == 0
  return jnp.cumsum(starts_L) - starts_L[0]


def stratify(
  u: Float[Array, "*shape"], stratum: Int[Array, "*#shape"] | int, strata: Int[Array, ""] | int
) -> Float[Array, "*shape"]:
  """Return (stratum + u) / strata: a uniform number moved into its stratum of [0, 1)."""
  return (stratum + u) / strata


def block_uniforms(
  rng: RngKey,
  blocks: Int[Array, ""] | int,
  length: int,
  row: Int[Array, ""] | int = 0,
  rows: int = 1,
) -> FloatL:
  """Return one uniform number per block, stratified over the blocks of a whole batch.

  With K blocks in each of R rows every stratum [n, n + 1) / (R K) is hit once. Those of one row are
  spread over [0, 1) and dealt to its blocks in random order. (The public code gives row r the
  strata r K … (r + 1) K − 1: all its blocks have about the same level.)

  Args:
    rng: key.
    blocks: K, how many there are; may be traced. Further entries mean nothing.
    length: entries to return.
    row: number of this sequence in its batch.
    rows: R, sequences of the batch.
  """
  rng_order, rng_inside = jax.random.split(rng)
  order_L = jax.random.uniform(rng_order, (length,))
  order_L = jnp.where(jnp.arange(length) < blocks, order_L, 2.0)
  rank_L = jnp.argsort(jnp.argsort(order_L))
  inside_L = stratify(jax.random.uniform(rng_inside, (length,)), row, rows)
  return stratify(inside_L, rank_L, blocks)


def document_uniforms(
  rng: RngKey, length: int, row: Int[Array, ""] | int = 0, rows: int = 1
) -> FloatL:
  """Return one uniform number per document: those of number d are stratified over a batch."""
  first = stratify(jax.random.uniform(rng), row, rows)
  return (first + _GOLDEN * jnp.arange(length)) % 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockNoise:
  """Mask tokens at a level t per block or per document: a token is masked with 1 − α(t).

  Under the log-linear schedule with ε = 0 that is t itself. Two conventions are published:
  BD3-LM's, `levels="block"`, t ~ U[β, ω], weight 1/t; and SDAR's, `levels="document"`,
  p = (1 − ε) u + ε, which is t ~ U[ε, 1], weight 1/p, and at least one mask.

  Attributes:
    process: says what the mask is, and α.
    levels: "block" or "document": what shares a level.
    weight: "nelbo": −α'/(1 − α), 1/t under the log-linear schedule; or "one".
    at_least_one: a sequence in which no token was masked gets new levels and masks, ten times
      over, and then one mask at random. Biased towards high levels; most so for short documents.

  Raises:
    InputError: an unknown name.

  Reference: BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303.
  """

  process: Absorbing
  levels: str = "block"
  weight: str = "nelbo"
  at_least_one: bool = False

  def __post_init__(self):
    for name, allowed in (("levels", LEVELS), ("weight", WEIGHTS)):
      if getattr(self, name) not in allowed:
        raise InputError(
          f"objective.{name}={getattr(self, name)!r} is unknown; use {' or '.join(allowed)}."
        )

  def mask(self, rng: RngKey, t_L: FloatL, valid_L: BoolL) -> BoolL:
    """Draw which of the valid tokens are masked, each by itself."""
    u_L = jax.random.uniform(rng, t_L.shape)
    return valid_L & (u_L < 1 - self.process.schedule.alpha(t_L))

  def weights(self, t_L: FloatL) -> FloatL:
    """Return what a mask counts at each time."""
    return jnp.ones_like(t_L) if self.weight == "one" else self.process.schedule.weight(t_L)

  def draw(
    self,
    rng: RngKey,
    x0_L: IntL,
    block_L: IntL,
    document_L: IntL,
    valid_L: BoolL,
    *,
    interval: Float[Array, "2"] | tuple[float, float] = FULL,
    single: Bool[Array, ""] | bool = False,
    row: Int[Array, ""] | int = 0,
    rows: int = 1,
  ) -> Noised:
    """Draw a noisy copy of clean tokens.

    Args:
      rng: this sequence's key.
      x0_L: clean tokens.
      block_L: number of each token's block, see `number_blocks`.
      document_L: number of each token's document, from 0.
      valid_L: False on prompts, which are never masked.
      interval: β and ω, the smallest and the largest time.
      single: blocks hold one token. Then every valid one is masked and counts 1: a lone mask's loss
        does not depend on its level, and its expectation is that of the mask alone.
      row: number of this sequence in its batch, over which levels are stratified.
      rows: sequences of the batch.
    """
    rng_level, rng_mask, rng_again = jax.random.split(rng, 3)
    group_L = block_L if self.levels == "block" else document_L
    u_L = self._uniforms(rng_level, block_L, row, rows)
    low, high = interval
    t_L = low + (high - low) * u_L[group_L]
    masked_L = self.mask(rng_mask, t_L, valid_L)
    if self.at_least_one:
      t_L, masked_L = self._again(rng_again, t_L, masked_L, group_L, valid_L, interval)
    t_L = jnp.where(single, 1.0, t_L)
    masked_L = jnp.where(single, valid_L, masked_L)
    weight_L = jnp.where(single, 1.0, self.weights(t_L))
    return Noised(jnp.where(masked_L, self.process.mask_id, x0_L), t_L, weight_L)

  def _uniforms(self, rng, block_L, row, rows):
    if self.levels == "document":
      return document_uniforms(rng, block_L.shape[0], row, rows)
    return block_uniforms(rng, block_L[-1] + 1, block_L.shape[0], row, rows)

  def _again(self, rng, t_L, masked_L, group_L, valid_L, interval):
    """Return the first of up to `_TRIES` further draws that masks anything, if this one did not."""
    rng_tries, rng_forced = jax.random.split(rng)
    low, high = interval

    def attempt(rng):
      rng_level, rng_mask = jax.random.split(rng)
      u_L = jax.random.uniform(rng_level, group_L.shape)
      t_L = low + (high - low) * u_L[group_L]
      return t_L, self.mask(rng_mask, t_L, valid_L)

    further = jax.vmap(attempt)(jax.random.split(rng_tries, _TRIES))
    t_TL, masked_TL = (
      jnp.concatenate([first[None], rest])
      for first, rest in zip((t_L, masked_L), further, strict=True)
    )
    some_T = masked_TL.any(axis=1)
    chosen = jnp.where(some_T.any(), jnp.argmax(some_T), _TRIES)
    u_L = jnp.where(valid_L, jax.random.uniform(rng_forced, valid_L.shape), 2.0)
    forced_L = valid_L & (jnp.arange(u_L.shape[0]) == jnp.argmin(u_L))
    return t_TL[chosen], jnp.where(some_T.any(), masked_TL[chosen], forced_L)
