# SPDX-License-Identifier: Apache-2.0
"""Sums over positions whose gradient is taken while the value is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.objectives.positions import sum_positions

_B, _L, _D, _V = 2, 12, 5, 7


def _inputs():
  rngs = jax.random.split(jax.random.key(0), 5)
  head = {"kernel": jax.random.normal(rngs[0], (_D, _V)), "bias": jax.random.normal(rngs[1], (_V,))}
  moving = (jax.random.normal(rngs[2], (_B, _L, _D)),)
  fixed = (jax.random.randint(rngs[3], (_B, _L), 0, _V),)
  return head, moving, fixed, jax.random.uniform(rngs[4], (_B, _L))


def _loss(head, hidden, tokens):
  log_p = jax.nn.log_softmax(hidden @ head["kernel"] + head["bias"][None, None], -1)
  loss = -jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
  return loss, {"entropy": -jnp.sum(jnp.exp(log_p) * log_p, -1)}


def _plain(head, moving, fixed, weights):
  loss, extra = _loss(head, *moving, *fixed)
  return jnp.sum(loss * weights), extra


@pytest.mark.parametrize("chunk", [None, 12, 4, 1])
def test_equals_the_plain_sum_and_its_gradient(chunk):
  head, moving, fixed, weights = _inputs()
  fused = lambda *args: sum_positions(_loss, *args, chunk)  # noqa: E731
  plain = jax.value_and_grad(_plain, argnums=(0, 1), has_aux=True)
  (value, extra), gradients = jax.jit(plain)(head, moving, fixed, weights)

  # the cotangent of the sum is 3, not 1, and the outer function has a gradient of its own
  def outer(head, moving, fixed, weights):
    value, extra = fused(head, moving, fixed, weights)
    return 3 * value + jnp.sum(moving[0]), extra

  (other, same), found = jax.jit(jax.value_and_grad(outer, argnums=(0, 1), has_aux=True))(
    head, moving, fixed, weights
  )
  np.testing.assert_allclose(other, 3 * value + moving[0].sum(), rtol=1e-5)
  np.testing.assert_allclose(same["entropy"], extra["entropy"], rtol=1e-5)
  expected = jax.tree.map(lambda g: 3 * g, gradients)
  expected = (expected[0], (expected[1][0] + 1,))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
  np.testing.assert_allclose(jax.jit(fused)(head, moving, fixed, weights)[0], value, rtol=1e-5)


def test_what_is_fixed_or_beside_the_loss_has_no_gradient():
  head, moving, fixed, weights = _inputs()

  def through_the_extra(head):
    return sum_positions(_loss, head, moving, fixed, weights, 4)[1]["entropy"].sum()

  def through_the_fixed(hidden):
    swapped = lambda head, tokens, hidden: _loss(head, hidden, tokens)  # noqa: E731
    tokens = fixed[0].astype(jnp.float32)
    as_ids = lambda head, tokens, hidden: swapped(head, tokens.astype(jnp.int32), hidden)  # noqa: E731
    return sum_positions(as_ids, head, (tokens,), (hidden,), weights, 4)[0]

  for gradient in (jax.grad(through_the_extra)(head), jax.grad(through_the_fixed)(moving[0])):
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), gradient)


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_of_a_jitted_sum(chunk):
  """What the function closes over may be traced, floats and integers, whatever the order."""
  head, moving, fixed, weights = _inputs()

  def total(head, scale, shift):
    def scaled(head, hidden, tokens):
      loss, extra = _loss(head, hidden, (tokens + shift) % _V)
      return scale * loss, extra

    return sum_positions(scaled, head, moving, fixed, weights, chunk)[0]

  given = (head, jnp.float32(2.0), jnp.int32(3))
  wanted = jax.jit(jax.grad(total))(*given)
  found = jax.grad(jax.jit(total))(*given)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
  assert jax.grad(jax.jit(total), argnums=1)(*given) == 0  # closed over: a constant


def test_a_chunk_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="chunk=5 does not divide the sequence length 12"):
    sum_positions(_loss, *_inputs(), 5)


def test_the_gradient_keeps_no_dense_array():
  """Its residuals are gradients, so the largest array of the compiled program is one chunk's."""
  _, moving, fixed, weights = _inputs()
  wide = {"kernel": jnp.ones((_D, 1000)), "bias": jnp.ones(1000)}

  def total(head, chunk):
    return sum_positions(_loss, head, moving, fixed, weights, chunk)[0]

  sizes = {}
  for chunk in (1, 12):
    program = jax.jit(jax.grad(total), static_argnums=1).lower(wide, chunk).compile()
    sizes[chunk] = program.memory_analysis().temp_size_in_bytes
  assert sizes[1] < sizes[12] / 2
