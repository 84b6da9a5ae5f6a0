# SPDX-License-Identifier: Apache-2.0
"""Survival as the public Duo code looks it up: the nearest point of a table, and differences."""

import numpy as np

from dlm_jax.process import gaussian


def alpha(size, gamma, *, points=10_000, low=-5.0, high=-1.0, tokens=None):
  """Return α at the nearest of so many points; P was computed for `tokens`, α for `size`."""
  tokens = tokens or size
  grid = np.linspace(low, high, points)
  nearest = np.rint((np.asarray(gamma, np.float64) - low) / (high - low) * (points - 1))
  survival, _ = gaussian.quadrature(tokens, grid[nearest.astype(int)])
  win = (1 + survival * (tokens - 1)) / tokens
  return (size * win - 1) / (size - 1)


def dalpha(size, gamma, width, **table):
  """Return dα/dt of γ = γ_min + t · width: differences over Δγ = 1e-3, added in γ's own dtype."""
  gamma = np.asarray(gamma)
  ahead = gamma + gamma.dtype.type(1e-3)
  return width * 1000 * (alpha(size, ahead, **table) - alpha(size, gamma, **table))
