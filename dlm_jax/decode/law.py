# SPDX-License-Identifier: Apache-2.0
"""The law that a token is drawn from: temperature, top-k and top-p of its row; never the mask.

What no row asks for is not computed. What none may ask for, by the law of the options, is not in
the program; the other choices are the batch's (`lax.cond`), so they must not be under a `vmap` over
the options, which would turn them into both of their branches.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dlm_jax.decode.interfaces import RowOptions


def law(
  mask_id: int,
  options: RowOptions,
  logits_BKV: Float[Array, "B K V"],
  early_BK: Bool[Array, "B K"],
  *,
  truncated: bool = True,
) -> Float[Array, "B K V"]:
  """Return logits of what a token is drawn from.

  Args:
    mask_id: the mask token, of which it has nothing.
    options: of the rows; a temperature of 0 is as 1.
    logits_BKV: of the network.
    early_BK: positions where stop ids have nothing either.
    truncated: apply top-k and top-p.
  """
  drawable_BKV = without_mask(mask_id, tempered(options, logits_BKV))
  if options.law != "any":
    return drawable_BKV
  asked = jnp.any(early_BK) | (truncated & jnp.any(options.truncates_B))
  narrow = functools.partial(_narrow, options, early_BK, truncated)
  return jax.lax.cond(asked, narrow, lambda x: x, drawable_BKV)


def _narrow(options, early_BK, truncated, logits_BKV):
  logits_BKV = without_stops(options, logits_BKV, early_BK)
  return truncate(options, logits_BKV) if truncated else logits_BKV


def tempered(options: RowOptions, logits_BKV: Float[Array, "B K V"]) -> Float[Array, "B K V"]:
  """Return float32 logits over the temperature of each row, 0 being 1."""
  if options.law == "greedy":
    return logits_BKV.astype(jnp.float32)
  temperature_B = jnp.where(options.draws_B, options.temperature_B, 1.0)
  return logits_BKV.astype(jnp.float32) / temperature_B[:, None, None]


def without_mask(mask_id: int, logits_BKV: Float[Array, "B K V"]) -> Float[Array, "B K V"]:
  """Return logits of which the mask has nothing."""
  return jnp.where(jnp.arange(logits_BKV.shape[-1])[None, None] == mask_id, -jnp.inf, logits_BKV)


def without_stops(
  options: RowOptions, logits_BKV: Float[Array, "B K V"], early_BK: Bool[Array, "B K"]
) -> Float[Array, "B K V"]:
  """Return logits of which stop ids have nothing at early positions."""
  stops_B1V = stop_table(options, logits_BKV.shape[-1])[:, None]
  return jnp.where(stops_B1V & early_BK[..., None], -jnp.inf, logits_BKV)


def stop_table(options: RowOptions, size: int) -> Bool[Array, "B V"]:
  """Return which ids of a vocabulary end each row."""
  stop_BS = jnp.where(options.stop_BS >= 0, options.stop_BS, size)  # out of range: dropped
  row_B1 = jnp.arange(stop_BS.shape[0])[:, None]
  return jnp.zeros((stop_BS.shape[0], size), bool).at[row_B1, stop_BS].set(True, mode="drop")


def truncate(options: RowOptions, logits_BKV: Float[Array, "B K V"]) -> Float[Array, "B K V"]:
  """Return logits with each row's top-k and, of what that keeps, top-p.

  As `draw.sharpen` does for one value: ties with the last kept token are kept too, and the others
  become −inf.
  """
  k_B, p_B11 = options.top_k_B, options.top_p_B[:, None, None]
  size = logits_BKV.shape[-1]

  def top_k(logits_BKV):
    descending_BKV = -jnp.sort(-logits_BKV, axis=-1)
    last_B11 = (jnp.where(k_B > 0, jnp.minimum(k_B, size), size) - 1)[:, None, None]
    least_BK1 = jnp.take_along_axis(descending_BKV, last_B11, axis=-1)
    return jnp.where(logits_BKV >= least_BK1, logits_BKV, -jnp.inf)

  def top_p(logits_BKV):
    probs_BKV = jax.nn.softmax(logits_BKV, axis=-1)
    descending_BKV = -jnp.sort(-probs_BKV, axis=-1)
    before_BKV = jnp.cumsum(descending_BKV, axis=-1) - descending_BKV
    kept_BKV = jnp.where(before_BKV < p_B11, descending_BKV, jnp.inf)
    smallest_BK1 = jnp.min(kept_BKV, axis=-1, keepdims=True)
    return jnp.where((probs_BKV >= smallest_BK1) | (p_B11 >= 1), logits_BKV, -jnp.inf)

  same = lambda x: x  # noqa: E731
  logits_BKV = jax.lax.cond(jnp.any(k_B > 0), top_k, same, logits_BKV)
  return jax.lax.cond(jnp.any(p_B11 < 1), top_p, same, logits_BKV)
