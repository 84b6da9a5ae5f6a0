# SPDX-License-Identifier: Apache-2.0
"""Passes over rows as wide as the vocabulary, as few as can be: they are what a loss costs."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

KEPT = "soft_entries"  # the name, for `checkpoint_name`, of small arrays that took dense passes


@jax.custom_vjp
def softmax_at(
  logits: Float[Array, "*rows V"], ids: Int[Array, "*rows k"]
) -> Float[Array, "*rows k"]:
  """Return a few entries of the softmax of each row, different ones.

  Their gradient is p_v (1[v ∈ ids] g_v − Σ p g): one pass over the logits, where a gather's
  gradient fills a dense array, and the softmax's reads it twice.

  Args:
    logits: rows.
    ids: which entries; no id twice in a row.
  """
  return _softmax_at_forward(logits, ids)[0]


def _softmax_at_forward(logits, ids):
  shift = checkpoint_name(normaliser(logits), KEPT)
  entries = jnp.exp(log_probs(jnp.take_along_axis(logits, ids, axis=-1), shift))
  return entries, (logits, ids, shift, entries)


def _softmax_at_backward(residual, cotangent):
  logits, ids, shift, entries = residual
  weighted = cotangent * entries
  axis = logits.ndim - 1
  every = jax.lax.broadcasted_iota(jnp.int32, (1,) * axis + logits.shape[-1:], axis)
  dense = -weighted.sum(axis=-1, keepdims=True) * jnp.exp(log_probs(logits, shift))
  for j in range(ids.shape[-1]):
    dense += jnp.where(every == ids[..., j, None], weighted[..., j, None], 0.0)
  return dense.astype(logits.dtype), None


softmax_at.defvjp(_softmax_at_forward, _softmax_at_backward)


Shift = tuple[Float[Array, "*rows 1"], Float[Array, "*rows 1"]]


def normaliser(logits: Float[Array, "*rows V"]) -> Shift:
  """Return m = max and l = log Σ exp(logits − m) of each row, for `log_probs`.

  A single number m + l near 15 would round every probability by 1e-6.
  """
  top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  return top, jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))


def log_probs(logits: Float[Array, "*rows J"], shift: Shift) -> Float[Array, "*rows J"]:
  """Return log p = logits − m − l, in this order, of rows or of entries of them."""
  top, log_sum = shift
  return logits - top - log_sum
