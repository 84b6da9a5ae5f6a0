# SPDX-License-Identifier: Apache-2.0
"""Layers with hand-written gradients or randomness."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dlm_jax.models import layers
from dlm_jax.models.layers import Embedding, LayerNorm, Linear, dropout, lookup, matmul

MODES = ("scatter", "matmul", "segment")
IDS = jnp.asarray([[4, 0, 4, 4], [1, 4, 6, 0]], jnp.int32)  # 4 is the crowded row, 2 is empty


def _table():
  return jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)


@pytest.mark.parametrize("mode", MODES)
def test_lookup_gradient(mode):
  weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 3)), jnp.float32)

  def loss(table, ids, take):
    return jnp.sum(jnp.sin(take(table, ids)) * weight)

  ours = functools.partial(loss, take=lambda table, ids: lookup(table, ids, mode))
  plain = functools.partial(loss, take=lambda table, ids: jnp.take(table, ids, axis=0))
  np.testing.assert_array_equal(lookup(_table(), IDS, mode), _table()[IDS])
  wanted = jax.grad(plain)(_table(), IDS)
  for gradient in (jax.grad(ours), jax.jit(jax.grad(ours))):
    np.testing.assert_allclose(gradient(_table(), IDS), wanted, rtol=1e-6, atol=1e-6)
  assert not np.any(wanted[2])
  check_grads(
    lambda table: ours(jnp.asarray(table), IDS), (_table(),), order=1, modes=("rev",), atol=1e-2
  )


def test_lookup_under_vmap():
  grads = [
    jax.vmap(jax.grad(lambda t, ids, m=mode: jnp.sum(lookup(t, ids, m) ** 2)), (None, 0))(
      _table(), IDS
    )
    for mode in MODES
  ]
  for gradient in grads[1:]:
    np.testing.assert_allclose(gradient, grads[0], rtol=1e-6)


def _operands(*leading):
  rng = np.random.default_rng(2)
  shapes = ((*leading, 5), (5, 4), (*leading, 4))
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)], ids=str)
def test_matmul_is_dot(leading):
  x, kernel, weight = _operands(*leading)

  def loss(product, x, kernel):
    return jnp.sum(jnp.tanh(product(x, kernel)) * weight)

  ours = functools.partial(loss, lambda x, kernel: matmul(x, kernel, jnp.float32))
  wanted = jax.value_and_grad(functools.partial(loss, jnp.dot), (0, 1))(x, kernel)
  for function in (jax.value_and_grad(ours, (0, 1)), jax.jit(jax.value_and_grad(ours, (0, 1)))):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
      function(x, kernel),
      wanted,
    )
  check_grads(
    lambda *xs: ours(*map(jnp.asarray, xs)),
    (x, kernel),
    order=1,
    modes=("rev",),
    atol=1e-2,
    rtol=1e-2,
  )


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
def test_matmul_dtypes(x_dtype):
  """Operands are rounded to bfloat16, sums are not; the kernel's gradient stays float32."""
  x, kernel, cotangent = _operands(64)
  x = x.astype(x_dtype)
  out, pull = jax.vjp(lambda x, kernel: matmul(x, kernel, jnp.bfloat16), x, kernel)
  round_ = lambda array: np.asarray(array.astype(jnp.bfloat16), np.float32)  # noqa: E731
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, round_(x) @ round_(kernel), rtol=1e-5, atol=1e-5)
  grad_x, grad_kernel = pull(cotangent)
  assert grad_x.dtype == x_dtype and grad_kernel.dtype == jnp.float32
  wanted = round_(x).T @ round_(cotangent)
  np.testing.assert_allclose(grad_kernel, wanted, rtol=1e-5, atol=1e-5)
  assert np.any(np.asarray(grad_kernel) != round_(grad_kernel))  # not rounded on the way out


def test_narrow_products_are_rounded_once():
  """A product that returns bfloat16 accumulates in float32 all the same."""
  x, kernel, _ = _operands(64)
  narrow = matmul(100 * x, kernel, jnp.bfloat16, jnp.bfloat16)
  wide = matmul(100 * x, kernel, jnp.bfloat16)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def _padded_network():
  """Return value and gradients of soft tokens through a table, and of a wide layer's columns."""
  rng = np.random.default_rng(4)
  tokens, hidden = (jnp.asarray(rng.normal(size=(2, 3, n)), jnp.float32) for n in (11, 5))
  table, head = Embedding(11, 5, dtype=jnp.float32), Linear(11, (None, None), use_bias=True)
  rngs = jax.random.split(jax.random.key(0))
  start = lambda module, rng, x: nn.meta.unbox(module.init(rng, x)["params"])  # noqa: E731
  params = start(table, rngs[0], tokens), start(head, rngs[1], hidden)

  def loss(params, tokens):
    hidden = table.apply({"params": params[0]}, tokens)
    logits = head.apply({"params": params[1]}, hidden)
    assert logits.shape == (2, 3, 11)
    return jnp.sum(jnp.sin(jax.nn.log_softmax(logits)))

  return jax.value_and_grad(loss, (0, 1))(params, tokens)


@pytest.mark.slow
def test_padding_changes_nothing(monkeypatch):
  plain = _padded_network()
  seen = []

  def padded(width, dtype):
    seen.append(width)
    return -(-width // 8) * 8

  monkeypatch.setattr(layers, "padded", padded)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), _padded_network(), plain
  )
  assert 11 in seen


@pytest.mark.parametrize(
  ("platform", "width", "dtype", "wanted"),
  [
    ("gpu", 50_258, "bfloat16", 50_304),
    ("gpu", 4097, "bfloat16", 4224),
    ("gpu", 4096, "bfloat16", 4096),
    ("gpu", 33, "bfloat16", 33),
    ("gpu", 50_258, "float32", 50_258),
    ("cpu", 50_258, "bfloat16", 50_258),
  ],
)
def test_what_is_padded(monkeypatch, platform, width, dtype, wanted):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert layers.padded(width, dtype) == wanted


def test_linear_by_hand():
  x, kernel, _ = _operands(2, 3)
  bias = jnp.arange(4.0)
  module = Linear(4, (None, None), use_bias=True, dtype=jnp.bfloat16, out_dtype=jnp.float32)
  out = module.apply({"params": {"kernel": kernel, "bias": bias}}, x)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, x @ kernel + bias[None, None], rtol=0.03, atol=0.05)


def test_layer_norm_by_hand():
  x = 1000 + jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 8)), jnp.float32)
  scale, shift = jnp.linspace(0.5, 1.5, 8), jnp.ones((1, 1, 8))
  wide = np.asarray(x, np.float64)
  wide = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
  norm = functools.partial(LayerNorm().apply, {"params": {"scale": scale}})
  np.testing.assert_allclose(norm(x), wide * np.asarray(scale), rtol=0, atol=1e-3)
  modulated = norm(x, shift, 2 * shift)
  np.testing.assert_allclose(modulated, wide * np.asarray(scale) * 3 + 1, rtol=0, atol=1e-3)


def test_dropout_rate_and_scale():
  keys = jax.random.split(jax.random.key(0), 8)
  out = np.asarray(dropout(jnp.ones((8, 64, 64)), keys, 0.1, 3))
  assert set(np.unique(out)) == {np.float32(0), np.float32(1 / np.float32(0.9))}
  dropped = (out == 0).mean((1, 2))
  np.testing.assert_allclose(dropped, 0.1, atol=5 * np.sqrt(0.09 / 64**2))
  np.testing.assert_array_equal(dropout(jnp.ones((8, 2, 2)), None, 0.9, 0), jnp.ones((8, 2, 2)))


def test_dropout_keys():
  """The same key and tag give the same mask; another key or tag gives another."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jnp.ones((3, 16, 16))
  one = np.asarray(dropout(x, keys, 0.5, 0))
  np.testing.assert_array_equal(dropout(x[1:2], keys[1:2], 0.5, 0)[0], one[1])
  assert np.any(one[0] != one[1])
  assert np.any(one != np.asarray(dropout(x, keys, 0.5, 1)))
