# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention under a boolean mask, over a call's own tokens and over cached ones."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dlm_jax.models.layers import Linear, RMSNorm, rotate


def attend_grouped(
  q_BQHC: Float[Array, "B Q H C"],
  k_BKGC: Float[Array, "B K G C"],
  v_BKGC: Float[Array, "B K G C"],
  visible_BQK: Bool[Array, "#B Q K"] | None = None,
  past: tuple[Array, Array, Array] | None = None,
) -> Float[Array, "B Q H C"]:
  """Return softmax(q kᵀ / √C) v over the visible keys; heads g H/G … (g + 1) H/G − 1 share key g.

  Scores and softmax are float32. Repeated keys are never formed, nor is the past joined to the
  present: only the scores are. A query that sees nothing gets 0.

  Args:
    q_BQHC: queries.
    k_BKGC: keys of this call.
    v_BKGC: values of this call.
    visible_BQK: which keys of this call each query sees; None: all.
    past: (k_BSGC, v_BSGC, seen_BS): keys and values before this call, and which of them count, the
      same for every query. What is not seen may hold anything, NaN included.
  """
  batch, queries, heads, channels = q_BQHC.shape
  groups = k_BKGC.shape[2]
  q_BQGRC = (q_BQHC * q_BQHC.dtype.type(channels**-0.5)).reshape(
    batch, queries, groups, heads // groups, channels
  )
  if visible_BQK is None:
    visible_BQK = jnp.ones((1, queries, k_BKGC.shape[1]), bool)
  sources = [(k_BKGC, v_BKGC, visible_BQK)]
  if past is not None:
    k_BSGC, v_BSGC, seen_BS = past
    v_BSGC = jnp.where(seen_BS[:, :, None, None], v_BSGC, jnp.zeros((), v_BSGC.dtype))
    sources.insert(0, (k_BSGC, v_BSGC, seen_BS[:, None, :]))

  scores = [_scores(q_BQGRC, k, visible) for k, _, visible in sources]
  top = [jnp.max(s, axis=-1, keepdims=True) for s in scores]
  top = jax.lax.stop_gradient(jnp.maximum(top[0], top[-1]))
  weights = [
    jnp.where(visible[:, None, None], jnp.exp(s - top), 0.0)
    for s, (_, _, visible) in zip(scores, sources, strict=True)
  ]
  total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
  total = jnp.where(total > 0, total, 1.0)
  out_BGRQC = sum(_mix(w / total, v) for w, (_, v, _) in zip(weights, sources, strict=True))
  out_BQGRC = jnp.transpose(out_BGRQC, (0, 3, 1, 2, 4))
  return out_BQGRC.reshape(q_BQHC.shape).astype(q_BQHC.dtype)


def _precision(dtype):
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _scores(q_BQGRC, k_BKGC, visible_BQK):
  """Return float32 scores; unseen ones are finite, so that gradients through them are 0."""
  scores_BGRQK = jnp.einsum(
    "bqgrc,bkgc->bgrqk",
    q_BQGRC,
    k_BKGC.astype(q_BQGRC.dtype),
    preferred_element_type=jnp.float32,
    precision=_precision(q_BQGRC.dtype),
  )
  return jnp.where(visible_BQK[:, None, None], scores_BGRQK, jnp.finfo(jnp.float32).min)


def _mix(weights_BGRQK, v_BKGC):
  return jnp.einsum(
    "bgrqk,bkgc->bgrqc",
    weights_BGRQK.astype(v_BKGC.dtype),
    v_BKGC,
    preferred_element_type=jnp.float32,
    precision=_precision(v_BKGC.dtype),
  )


class GroupedAttention(nn.Module):
  """Self-attention with normalised, rotated queries and keys, no biases.

  Attributes:
    heads: query heads.
    kv_heads: key/value heads; must divide `heads`.
    head_dim: channels of a head; heads × head_dim need not be the width.
    eps: of the norms of queries and keys.
    dtype: of products.
    fused: queries, keys and values are one matrix.
  """

  heads: int
  kv_heads: int
  head_dim: int
  eps: float
  dtype: Any
  fused: bool = False

  @nn.compact
  def __call__(self, x_BQD: Float[Array, "B Q D"], past, rope, visible_BQQ):
    """Return the mixed values [B, Q, D] and this call's (keys, values) [B, Q, G, C]."""

    def heads(count, name):
      linear = Linear(count * self.head_dim, ("embed", "heads"), dtype=self.dtype, name=name)
      return linear(x_BQD).reshape(*x_BQD.shape[:2], count, self.head_dim)

    def place(x, name):
      x = rotate(RMSNorm(self.eps, axis=None, name=name)(x), *rope)
      return x.astype(self.dtype)

    if self.fused:
      joint = heads(self.heads + 2 * self.kv_heads, "qkv")
      q, k, v = jnp.split(joint, (self.heads, self.heads + self.kv_heads), axis=2)
    else:
      q, k, v = heads(self.heads, "q"), heads(self.kv_heads, "k"), heads(self.kv_heads, "v")
    q, k = place(q, "q_norm"), place(k, "k_norm")
    out = attend_grouped(q, k, v, visible_BQQ, past).reshape(*x_BQD.shape[:2], -1)
    out = Linear(x_BQD.shape[-1], ("heads", "embed"), dtype=self.dtype, name="out")(out)
    return out, (k, v)
