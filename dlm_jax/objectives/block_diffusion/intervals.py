# SPDX-License-Identifier: Apache-2.0
"""Which range of noise levels gives the quietest gradient: the search of clipped schedules."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dlm_jax.errors import InputError
from dlm_jax.process.block import FULL

WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)


def candidates(
  widths: tuple[float, ...] = WIDTHS, stride: float = 0.05, low: float = FULL[0]
) -> Float[np.ndarray, "K 2"]:
  """Return every interval [β, β + width] in [0, 1] with β a multiple of the stride.

  Raises:
    InputError: a width is outside (0, 1].

  Reference: BD3-LM, arXiv 2503.09573, section 5.3 and appendix.
  """
  if not widths or min(widths) <= 0 or max(widths) > 1:
    raise InputError(f"objective.search_widths={tuple(widths)} must be in (0, 1], one at least.")
  found = [
    (max(i * stride, low), i * stride + width)
    for width in widths
    for i in range(int((1 - width) / stride + 1e-6) + 1)
  ]
  return np.asarray(found, np.float32).clip(max=1.0)


def quietest(
  t_N: Float[Array, "N"],
  loss_N: Float[Array, "N"],
  counts_N: Bool[Array, "N"],
  intervals_K2: Float[Array, "K 2"],
) -> tuple[Float[Array, "2"], Float[Array, "K"]]:
  """Return the interval in which the losses of blocks vary least, and the variance in each.

  Losses drawn with t uniform over a range that holds all intervals are, among themselves, draws of
  every interval: those whose t falls into it.

  Args:
    t_N: time of each block.
    loss_N: its weighted loss.
    counts_N: False for entries that are no blocks.
    intervals_K2: candidates; the first of equals wins. One with fewer than two blocks loses.
  """
  low_K1, high_K1 = intervals_K2[:, :1], intervals_K2[:, 1:]
  inside_KN = counts_N[None] & (t_N[None] >= low_K1) & (t_N[None] <= high_K1)
  count_K = inside_KN.sum(axis=1)
  mean_K = jnp.sum(jnp.where(inside_KN, loss_N[None], 0.0), axis=1) / jnp.maximum(count_K, 1)
  square_KN = (loss_N[None] - mean_K[:, None]) ** 2
  sum_K = jnp.sum(jnp.where(inside_KN, square_KN, 0.0), axis=1)
  variance_K = jnp.where(count_K > 1, sum_K / jnp.maximum(count_K - 1, 1), jnp.inf)
  return intervals_K2[jnp.argmin(variance_K)], variance_K
