# SPDX-License-Identifier: Apache-2.0
"""Recorded quantities as our arguments: noise and schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import process, schedules


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule(schedules.Schedule):
  """α(t) and α'(t) at the recorded times: the reference reads a table and differences it."""

  times: np.ndarray
  alphas: np.ndarray
  dalphas: np.ndarray

  def _at(self, values, t):
    nearest = lambda t: jnp.argmin(jnp.abs(jnp.asarray(self.times, jnp.float32) - t))  # noqa: E731
    return jnp.vectorize(lambda t: jnp.asarray(values, jnp.float32).ravel()[nearest(t)])(t)

  def alpha(self, t):
    return self._at(self.alphas, t)

  def dalpha(self, t):
    return self._at(self.dalphas, t)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Noise(process.GaussianDuality):
  """Noise read from arrays: a key's data names the array and the sequence, see `keys`."""

  recorded: tuple[np.ndarray, ...]

  def noise(self, rng, positions_L):
    which, row = jax.random.key_data(rng)
    return jnp.asarray(self.recorded)[which, row][positions_L]


def keys(batch, which=0):
  """Return one key per sequence whose data is the number of an array and a row."""
  data = np.stack([np.full(batch, which), np.arange(batch)], 1).astype(np.uint32)
  return jax.random.wrap_key_data(jnp.asarray(data))


def close(left, right, tolerance=1e-5):
  """Compare relative to the largest recorded entry."""
  right = np.asarray(right, np.float64)
  atol = tolerance * max(np.abs(right).max(), 1e-12)
  np.testing.assert_allclose(np.asarray(left, np.float64), right, rtol=0, atol=atol)
