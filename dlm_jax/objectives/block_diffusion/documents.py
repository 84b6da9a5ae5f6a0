# SPDX-License-Identifier: Apache-2.0
"""Several documents in one sequence: their numbers, and positions that start over in each."""

import jax
import jax.numpy as jnp

from dlm_jax.arrays import BoolL, IntL


def number_padding(position_L: IntL) -> IntL:
  """Renumber the zeros at the end of a row 0, 1, 2, …: padding is a document of its own.

  Reference: SDAR, arXiv 2510.06303; released code.
  """
  index_L = jnp.arange(position_L.shape[0])
  last = jnp.max(jnp.where(position_L != 0, index_L, -1))
  return jnp.where(index_L > last, index_L - last - 1, position_L)


def number_documents(position_L: IntL) -> IntL:
  """Return the number of each token's document, from 0: one begins wherever positions do."""
  return jnp.maximum(jnp.cumsum(position_L == 0) - 1, 0)


def positions_between(starts_L: BoolL) -> IntL:
  """Return positions that start over where a document starts; the first token always does."""
  index_L = jnp.arange(starts_L.shape[0])
  return index_L - jax.lax.cummax(jnp.where(starts_L, index_L, 0))
