# SPDX-License-Identifier: Apache-2.0
"""Layers shared by the bidirectional and the causal Transformer.

Numerics: parameters and layer norms are float32, matrix products run in `dtype`, logits come out
of the accumulator in float32. Dropout takes one key per sequence instead of a Linen rng stream, so
that a sequence is dropped out alike in every micro-batch layout and on every mesh.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import FloatB, FloatBLD, FloatBLV, KeyB

# Uniform on ±1/√fan_in: what the public checkpoints of this network were started from.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Network(nn.Module):
  """A Linen module whose `init` returns plain arrays and whose `axes` names their dimensions."""

  @nn.nowrap
  def init(self, rngs, *args, **kwargs):
    """Return {"params": ...} as plain float32 arrays; the arguments are those of `apply`."""
    return nn.meta.unbox(super().init(rngs, *args, **kwargs))

  @nn.nowrap
  def inputs(self, length: int = 1) -> tuple[Array, ...]:
    """Return arguments to initialise the network with: one sequence of ids."""
    return (jnp.zeros((1, length), jnp.int32),)

  @nn.nowrap
  def axes(self, *args):
    """Return a tree like the parameters with a `PartitionSpec` of logical axis names per leaf."""
    boxed = jax.eval_shape(super().init, jax.random.key(0), *args)
    return nn.get_partition_spec(boxed)["params"]

  @nn.nowrap
  def rolled(self):
    """Return the same network with its layers in a loop, which compiles fastest: for sampling."""
    return self.clone(config=dataclasses.replace(self.config, unroll=1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
  x: Float[Array, "*batch D"],
  kernel: Float[Array, "D F"],
  dtype: DTypeLike,
  out_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch F"]:
  """Multiply in `dtype`, accumulate in float32, return `out_dtype`.

  On a GPU a product that returns bfloat16 writes half the bytes: of the trunk of 170 M parameters,
  64 × 1024 tokens on one H200, products took 13.9 ms in place of 15.6.

  The custom backward pass computes the kernel's gradient as xᵀ g. JAX's own rule computes gᵀ x and
  transposes; XLA's CPU backend then materialises g transposed in a fused strided loop, which made
  an MLP's backward pass 6 times its forward (68 against 27 ms for 16 × 128 tokens, 192 → 768 → 192,
  two cores). The kernel's gradient is float32 whatever `dtype`; that of x may be rounded to it.
  """
  out = jnp.dot(
    x.astype(dtype),
    kernel.astype(dtype),
    precision=_precision(dtype),
    preferred_element_type=_written(out_dtype),
  )
  return out.astype(out_dtype)


def _written(dtype):
  """Return what a product is written in: XLA's CPU back end is 2.4 times faster in float32."""
  return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else dtype)


def _precision(dtype):
  """Return what keeps float32 products float32: a GPU's default would round to 19 bits."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _matmul_forward(x, kernel, dtype, out_dtype):
  return matmul(x, kernel, dtype, out_dtype), (x.astype(dtype), kernel, jnp.zeros((), x.dtype))


def _matmul_backward(dtype, out_dtype, residual, g):
  del out_dtype
  x, kernel, like_x = residual
  g = g.astype(dtype)
  batch = tuple(range(x.ndim - 1))
  dot = functools.partial(jax.lax.dot_general, precision=_precision(dtype))
  grad_x = dot(
    g,
    kernel.astype(dtype),
    (((x.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=_written(dtype),
  )
  grad_kernel = dot(x, g, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
  return grad_x.astype(like_x.dtype), grad_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)

_WIDE = 1024  # from here on a width that is no multiple of _TILE is padded on a GPU
_TILE = 128


def padded(width: int, dtype: DTypeLike) -> int:
  """Return the width that a product with so many columns, or terms, should have.

  Tensor cores want rows of 16-byte multiples. A vocabulary of 50,258 has none, and XLA then falls
  back to kernels two to three times slower (the head of 32 × 1024 tokens on one H200: 9.5 ms, 3.6
  by arithmetic). In other types, and on other platforms, nothing is padded.
  """
  aligned = width % 8 == 0 or width < _WIDE
  if aligned or jnp.dtype(dtype).itemsize != 2 or jax.default_backend() != "gpu":
    return width
  return -(-width // _TILE) * _TILE


def _pad(x, axis, width):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, width - x.shape[axis])
  return jnp.pad(x, widths) if widths[axis][1] else x


def aligned(kernel: Float[Array, "D F"], dtype: DTypeLike) -> Float[Array, "D padded"]:
  """Return the kernel of a `Linear` as its product in `dtype` reads it, if it has to be padded."""
  width = padded(kernel.shape[1], dtype)
  return kernel if width == kernel.shape[1] else _pad(kernel.astype(dtype), 1, width)


class Linear(nn.Module):
  """Multiply by a matrix in `dtype`, accumulate in float32, add a bias, return `out_dtype`.

  A kernel that is stored `aligned` is used as it is.
  """

  features: int
  axes: tuple[str | None, str | None]
  use_bias: bool = False
  dtype: Any = jnp.float32
  out_dtype: Any = None
  zeros: bool = False  # start at 0

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
    init = nn.initializers.zeros if self.zeros else fan_in_uniform
    shape = (x.shape[-1], self.features)
    dtype, out_dtype = jnp.dtype(self.dtype), jnp.dtype(self.out_dtype or self.dtype)
    width = padded(self.features, dtype)
    kernel = self.get_variable("params", "kernel")
    if width == self.features or np.shape(kernel) != (x.shape[-1], width):
      kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape)
    y = matmul(x, _pad(kernel, 1, width), dtype, out_dtype)
    if self.use_bias:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
      bias = self.param("bias", zeros, (self.features,)).astype(out_dtype)
      # In the product's type: a GPU can then add it, and apply a GELU, before writing the product.
      y += _pad(bias, 0, width).reshape((1,) * (y.ndim - 1) + (-1,))
    return y[..., : self.features]


class LayerNorm(nn.Module):
  """Normalise in float32; a scale and no bias, ε = 1e-5. Optional adaLN shift and scale."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch D"], shift=None, scale=None
  ) -> Float[Array, "*batch D"]:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    weight = self.param("scale", init, (x.shape[-1],)).reshape((1,) * (x.ndim - 1) + (-1,))
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    if scale is None:
      return x * weight
    return x * (weight * (1 + scale)) + shift


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Return x (1 + tanh z)/2 with z = √(2/π) (x + 0.044715 x³), as x σ(2z).

  The two forms are equal. The tanh held the kernel at two thirds of the memory's rate (H200); the
  sigmoid, an exponential and a division, runs at 0.93 of it (H100).
  """
  return x * jax.nn.sigmoid(2 * np.sqrt(2 / np.pi).astype(x.dtype) * (x + 0.044715 * x**3))


class MLP(nn.Module):
  """Expand, GELU (tanh form), contract."""

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: FloatBLD) -> FloatBLD:
    dim = x.shape[-1]
    x = Linear(self.width, ("embed", "mlp"), use_bias=True, dtype=self.dtype, name="expand")(x)
    x = gelu(x)
    return Linear(dim, ("mlp", "embed"), use_bias=True, dtype=self.dtype, name="contract")(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
  table_VD: Float[Array, "V D"], ids: Int[Array, "*shape"], gradient: str
) -> Float[Array, "*shape D"]:
  """Return rows of a table, with a choice of how the gradient is summed.

  In a masked model half of all tokens are one id. A scatter-add then contends on one row: a whole
  training step was 2.6 times slower on a GPU.

  Args:
    table_VD: embeddings.
    ids: integer ids.
    gradient: "scatter" (the default of XLA), "matmul" (a one-hot product, best for small V) or
      "segment" (rows sorted by id, then summed in runs; for large V).
  """
  del gradient
  return jnp.take(table_VD, ids, axis=0)


def _lookup_forward(table_VD, ids, gradient):
  return lookup(table_VD, ids, gradient), (table_VD.shape[0], ids)


def _lookup_backward(gradient, residual, cotangent):
  size, ids = residual
  ids, rows = ids.reshape(-1), cotangent.reshape(-1, cotangent.shape[-1])
  if gradient == "matmul":
    one_hot = jax.nn.one_hot(ids, size, dtype=rows.dtype)
    table = jnp.dot(one_hot.T, rows, precision=jax.lax.Precision.HIGHEST)
  elif gradient == "segment":
    order = jnp.argsort(ids)
    table = jax.ops.segment_sum(rows[order], ids[order], size, indices_are_sorted=True)
  else:
    table = jnp.zeros((size, rows.shape[-1]), rows.dtype).at[ids].add(rows)
  return table, np.zeros(residual[1].shape, jax.dtypes.float0)


lookup.defvjp(_lookup_forward, _lookup_backward)


@flax.struct.dataclass
class FewTokens:
  """Soft tokens of which a few entries hold all the weight.

  Attributes:
    ids: int [..., J], which; different ones.
    logits: float [..., J]; their softmax mixes the embeddings.
  """

  ids: Any
  logits: Any


class Embedding(nn.Module):
  """Hold a [V, D] table; take ids, or logits over V or of `FewTokens`, whose softmax is mixed."""

  vocab_size: int
  dim: int
  gradient: str = "scatter"
  dtype: Any = jnp.float32  # of the product of soft tokens with the table

  def setup(self):
    init = nn.with_logical_partitioning(_rows_uniform, ("vocab", "embed"))
    self.embedding = self.param("embedding", init, (self.vocab_size, self.dim))

  def __call__(self, tokens) -> FloatBLD:
    if isinstance(tokens, FewTokens):
      # J rows per position, few of them alike: sums by "segment" would gather all over a mesh
      rows = lookup(self.embedding, tokens.ids, "scatter")
      mix = jax.nn.softmax(tokens.logits.astype(jnp.float32), axis=-1)
      return jnp.sum(mix[..., None] * rows.astype(jnp.float32), axis=-2)
    if jnp.issubdtype(tokens.dtype, jnp.integer):
      return lookup(self.embedding, tokens, self.gradient)
    mix = jax.nn.softmax(tokens.astype(jnp.float32), axis=-1)
    width = padded(self.vocab_size, self.dtype)
    return matmul(_pad(mix, -1, width), _pad(self.embedding, 0, width), jnp.dtype(self.dtype))

  def attend(self, hidden: FloatBLD, dtype) -> FloatBLV:
    """Return float32 logits of a head that shares the table."""
    return jnp.einsum(
      "bld,vd->blv",
      hidden.astype(dtype),
      self.embedding.astype(dtype),
      preferred_element_type=jnp.float32,
      precision=_precision(dtype),
    )


def _rows_uniform(rng, shape, dtype=jnp.float32):
  """Draw a table uniformly on ±1/√D (Kaiming uniform with a = √5 over the row)."""
  bound = shape[1] ** -0.5
  return jax.random.uniform(rng, shape, dtype, -bound, bound)


class RMSNorm(nn.Module):
  """Divide by the root mean square over the last axis, times a scale; float32 in and out."""

  eps: float
  axis: str | None = "embed"

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
    return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def rotary_tables(length: int, channels: int, base: float = 10000.0):
  """Return cos and sin, float32 [L, C/2], for positions 0 … L − 1."""
  return rotary_at(jnp.arange(length), channels, base)


def rotary_at(positions: Int[Array, "*shape"], channels: int, base: float = 10000.0):
  """Return cos and sin, float32 [..., C/2], of the given positions."""
  frequency = base ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
  frequency = frequency.reshape((1,) * positions.ndim + (-1,))
  angle = positions.astype(jnp.float32)[..., None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x_BLHC: Float[Array, "B L H C"],
  cos: Float[Array, "L half"] | Float[Array, "#B L half"],
  sin: Float[Array, "L half"] | Float[Array, "#B L half"],
) -> Float[Array, "B L H C"]:
  """Rotate pairs (c, c + C/2): the half-split layout. Tables are shared by rows, or one each."""
  cos, sin = (t if t.ndim == 3 else t[None] for t in (cos, sin))
  cos, sin = cos[:, :, None].astype(x_BLHC.dtype), sin[:, :, None].astype(x_BLHC.dtype)
  first, second = jnp.split(x_BLHC, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def dropout(
  x_BLD: FloatBLD, rng_B: KeyB | None, rate: float, tag: Int[Array, ""] | int
) -> FloatBLD:
  """Drop entries with one key per sequence; no keys means evaluation.

  Args:
    x_BLD: activations.
    rng_B: keys or None.
    rate: probability of dropping.
    tag: folded into the keys: which dropout of the network this is.
  """
  if rng_B is None or rate == 0.0:
    return x_BLD

  def keep(rng):
    return jax.random.bernoulli(jax.random.fold_in(rng, tag), 1 - rate, x_BLD.shape[1:])

  return jnp.where(jax.vmap(keep)(rng_B), x_BLD / (1 - rate), jnp.zeros((), x_BLD.dtype))


def timestep_features(sigma_B: FloatB, size: int = 256) -> Float[Array, "B size"]:
  """Return [cos(σ f), sin(σ f)] with f_k = 10000^(−k / (size/2))."""
  frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(size // 2) / (size // 2))
  angle = sigma_B.astype(jnp.float32)[:, None] * frequency[None, :]
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
