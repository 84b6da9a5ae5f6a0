# SPDX-License-Identifier: Apache-2.0
"""Passes over rows against their plain forms."""

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.process import softmax_rows


def test_entries_of_a_softmax():
  """Values, and the gradient that a gather from the dense softmax has."""
  logits = 3 * jax.random.normal(jax.random.key(0), (2, 3, 40))
  ids = jnp.stack(
    [jax.random.permutation(key, 40)[:4] for key in jax.random.split(jax.random.key(1), 6)]
  )
  ids, weights = ids.reshape(2, 3, 4), jax.random.normal(jax.random.key(2), (2, 3, 4))
  plain = lambda x, ids: jnp.take_along_axis(jax.nn.softmax(x), ids, axis=-1)  # noqa: E731
  found = [
    jax.jit(jax.value_and_grad(lambda x, f=f: jnp.sum(weights * f(x, ids))))(logits)
    for f in (softmax_rows.softmax_at, plain)
  ]
  np.testing.assert_allclose(softmax_rows.softmax_at(logits, ids), plain(logits, ids), rtol=2e-6)
  for ours, wanted in zip(*found, strict=True):
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-7)


def test_probabilities_keep_their_digits():
  """Against float64, where one number for the normaliser would round them by 1e-6."""
  logits = 3 * jax.random.normal(jax.random.key(0), (4, 50_000)) + 20
  wide = np.exp(np.float64(logits) - np.float64(logits).max(-1, keepdims=True))
  ours = np.exp(np.float64(softmax_rows.log_probs(logits, softmax_rows.normaliser(logits)))).max(-1)
  np.testing.assert_allclose(ours, (wide / wide.sum(-1, keepdims=True)).max(-1), rtol=2e-7)
