# SPDX-License-Identifier: Apache-2.0
"""Draws of corrupted tokens, for tests of their law."""

import jax
import jax.numpy as jnp
import numpy as np


def corrupted(proc, x0_L, times, count):
  """Yield each time, `count` draws of xₜ, [count, L], and α."""
  keys = jax.random.split(jax.random.key(1), count)
  corrupt = jax.jit(jax.vmap(proc.corrupt, (0, None, None)))
  for t in times:
    tokens = np.asarray(corrupt(keys, x0_L, jnp.float32(t)))
    yield t, tokens, float(proc.schedule.alpha(t))
