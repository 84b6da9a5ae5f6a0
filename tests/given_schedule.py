# SPDX-License-Identifier: Apache-2.0
"""A schedule of one's own, as a user would write it: any decreasing α, no closed form."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlm_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Schedule):
  """Wrap α, a differentiable function of a scalar t in [0, 1]."""

  function: Callable

  def alpha(self, t):
    return jnp.vectorize(self.function)(jnp.asarray(t, jnp.result_type(float)))

  def dalpha(self, t):
    return jnp.vectorize(jax.grad(self.function))(jnp.asarray(t, jnp.result_type(float)))

  def inverse(self, a):
    """Bisect: 30 halvings reach float32 resolution on [0, 1]."""
    a = jnp.asarray(a, jnp.result_type(float))

    def halve(_, bounds):
      low, high = bounds
      middle = (low + high) / 2
      above = self.alpha(middle) > a
      return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(a), jnp.ones_like(a)))
    return (low + high) / 2
