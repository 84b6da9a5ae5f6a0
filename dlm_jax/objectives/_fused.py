# SPDX-License-Identifier: Apache-2.0
"""A loss over positions whose gradient is taken while its value is computed.

A loss needs dense [B, K, V] arrays of each of its networks. Kept for the backward pass they are
the largest of all; computed again (`map_positions`) they cost every vocabulary head twice. But the
loss is a weighted sum over positions, so a chunk's gradient is known as soon as its logits are,
up to one scalar, the cotangent of the sum. Here it is taken at once, and scaled later.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.objectives.state import in_chunks

Pieces = tuple[Array, ...]


def sum_positions(
  function: Callable[..., tuple[Float[Array, "B K"], Any]], trained: Any, moving: Pieces,
  fixed: Pieces, weights_BL: Float[Array, "B L"], chunk: int | None,
) -> tuple[Float[Array, ""], Any]:  # fmt: skip
  """Return Σ weights · loss over all positions, and what else the function returns.

  Differentiable once, in `trained` and `moving`; whatever `function` closes over is constant.

  Args:
    function: (trained, *moving pieces, *fixed pieces) -> (loss [B, K], tree of arrays [B, K, …]);
      no gradient passes through the second.
    trained: parameters; pass those alone that the function reads, a gradient of each is kept.
    moving: float arrays [B, L, …] that get a gradient too.
    fixed: arrays [B, L, …] that do not.
    weights_BL: of the positions' losses.
    chunk: positions whose dense arrays are alive at a time; must divide L. None: all.
  """

  def weighted(trained, moving, fixed, weights):
    loss, extra = function(trained, *moving, *fixed)
    return jnp.sum(loss * weights), extra

  def with_gradient(trained, moving, fixed, weights):
    (value, extra), gradients = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(
      trained, moving, fixed, weights
    )
    return value, extra, *gradients

  @jax.custom_vjp
  def total(trained, moving, fixed, weights_BL):
    values, extra = in_chunks(
      lambda total, pieces: _add(total, weighted(trained, *pieces)),
      jnp.zeros(()), (moving, fixed, weights_BL), chunk,
    )  # fmt: skip
    return values, extra

  def forward(trained, moving, fixed, weights_BL):
    def step(carry, pieces):
      value, extra, of_trained, of_moving = with_gradient(trained, *pieces)
      return jax.tree.map(jnp.add, carry, (value, of_trained)), (extra, of_moving)

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    arrays = (moving, fixed, weights_BL)
    (value, of_trained), (extra, of_moving) = in_chunks(step, start, arrays, chunk)
    return (value, extra), (of_trained, of_moving)

  def backward(gradients, cotangent):
    scale = lambda g: g * cotangent[0].astype(g.dtype)  # noqa: E731
    return *jax.tree.map(scale, gradients), None, None

  total.defvjp(forward, backward)
  value, extra = total(trained, moving, fixed, weights_BL)
  return value, jax.lax.stop_gradient(extra)


def _add(total, pair):
  value, extra = pair
  return total + value, extra
