# SPDX-License-Identifier: Apache-2.0
"""One entry to attention; it decides between XLA, cuDNN and the TPU's Splash kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.arrays import FloatBLD
from dlm_jax.models.layers import Linear, rotate

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
_SPLASH_FROM = 2048  # below this length XLA's own attention is as fast on a TPU


def choose(implementation: str, dtype: jnp.dtype, length: int) -> str:
  """Return the back end for the platform, dtype and length; "auto" decides.

  cuDNN takes 16-bit types only, so float32 (tests, parity) always runs through XLA.
  """
  if implementation != "auto":
    return implementation
  platform = jax.default_backend()
  if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16):
    return "cudnn"
  # A Pallas kernel is not partitioned by the compiler, so on a mesh XLA's attention runs.
  if platform == "tpu" and length >= _SPLASH_FROM and jax.device_count() == 1:
    return "splash"
  return "xla"


def attend(
  q_BLHC: Float[Array, "B L H C"],
  k_BLHC: Float[Array, "B L H C"],
  v_BLHC: Float[Array, "B L H C"],
  *,
  causal: bool = False,
  implementation: str = "auto",
) -> Float[Array, "B L H C"]:
  """Return softmax(q kᵀ / √C) v; full or causal."""
  backend = choose(implementation, q_BLHC.dtype, q_BLHC.shape[1])
  if backend == "splash":
    return _splash(q_BLHC, k_BLHC, v_BLHC, causal)
  if backend == "cudnn":
    return jax.nn.dot_product_attention(
      q_BLHC, k_BLHC, v_BLHC, is_causal=causal, implementation="cudnn"
    )
  return _xla(q_BLHC, k_BLHC, v_BLHC, causal)


def _xla(q_BLHC, k_BLHC, v_BLHC, causal):
  """Compute with heads before positions: on CPU a third faster than the [B, L, H, C] einsums."""
  length, channels = q_BLHC.shape[1], q_BLHC.shape[3]
  precision = jax.lax.Precision.HIGHEST if q_BLHC.dtype == jnp.float32 else None
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLHC, k_BLHC, v_BLHC))
  scores = jnp.einsum(
    "bhqc,bhkc->bhqk",
    q * q.dtype.type(channels**-0.5),
    k,
    preferred_element_type=jnp.float32,
    precision=precision,
  )
  if causal:
    allowed = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(allowed[None, None], scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum(
    "bhqk,bhkc->bhqc", probs, v, preferred_element_type=jnp.float32, precision=precision
  )
  return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _splash(q_BLHC, k_BLHC, v_BLHC, causal):
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  length, heads, channels = q_BLHC.shape[1:]
  make_mask = masks.CausalMask if causal else masks.FullMask
  mask = masks.MultiHeadMask([make_mask((length, length)) for _ in range(heads)])
  run = kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLHC * channels**-0.5, k_BLHC, v_BLHC))
  return jnp.swapaxes(jax.vmap(run)(q, k, v), 1, 2)


class Attention(nn.Module):
  """Self-attention with rotary positions, no biases."""

  heads: int
  dtype: jnp.dtype
  causal: bool = False
  implementation: str = "auto"

  @nn.compact
  def __call__(self, x_BLD: FloatBLD, rope) -> FloatBLD:
    batch, length, dim = x_BLD.shape
    qkv = Linear(3 * dim, ("embed", "heads"), dtype=self.dtype, name="qkv")(x_BLD)
    q, k, v = jnp.split(qkv.reshape(batch, length, 3 * self.heads, -1), 3, axis=2)
    q, k = rotate(q, *rope), rotate(k, *rope)
    out = attend(q, k, v, causal=self.causal, implementation=self.implementation)
    return Linear(dim, ("heads", "embed"), dtype=self.dtype, name="out")(out.reshape(x_BLD.shape))
