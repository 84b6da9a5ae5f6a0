# SPDX-License-Identifier: Apache-2.0
"""Functions of positions in chunks, so that no dense [B, L, V] array is ever whole.

Kept for the backward pass, the dense arrays of a loss are the largest of all; computed again
(`map_positions`) they cost every vocabulary head twice. But a loss is a weighted sum over
positions, so a chunk's gradient is known as soon as its logits are, up to one scalar, the
cotangent of the sum: `sum_positions` takes it at once, and scales it later.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from dlm_jax.arrays import FloatBK, FloatBL
from dlm_jax.errors import InputError

Pieces = tuple[Array, ...]
_ENTRIES = 2**22  # per sequence: 16 MiB in float32


def positions_per_chunk(chunk: int | None, length: int, vocab_size: int) -> int:
  """Return the chunk asked for, or the largest divisor of L with [chunk, V] ≤ 2²² entries.

  Raises:
    InputError: the chunk does not divide the length.
  """
  if chunk is None:
    most = min(max(1, _ENTRIES // vocab_size), length)
    return max(k for k in range(1, most + 1) if length % k == 0)
  if chunk < 1 or length % chunk:
    raise InputError(f"objective.chunk={chunk} does not divide the sequence length {length}.")
  return chunk


def map_positions(
  function: Callable, arrays: tuple[Array, ...], chunk: int | None, keep: tuple[str, ...] = ()
) -> Any:
  """Apply a function of [B, L, …] arrays in chunks of positions, recomputed in the backward pass.

  Args:
    function: (*arrays) -> tree of arrays [B, K, …].
    arrays: [B, L, …] each.
    chunk: positions at a time; must divide L. None applies the function once, to everything.
    keep: names, given by `checkpoint_name`, of what is not computed again in chunks.
  """
  if chunk is None or chunk >= arrays[0].shape[1]:
    return function(*arrays)
  policy = jax.checkpoint_policies.save_only_these_names(*keep)
  body = jax.checkpoint(lambda pieces: function(*pieces), policy=policy)
  return in_chunks(lambda carry, pieces: (carry, body(pieces)), (), arrays, chunk)[1]


def in_chunks(step: Callable, carry: Any, arrays: Any, chunk: int | None) -> tuple[Any, Any]:
  """Scan over chunks of positions; one step does it where the chunk is None or holds them all.

  Args:
    step: (carry, pieces) -> (carry, tree of arrays [B, K, …]).
    carry: what the first step gets.
    arrays: tree of [B, L, …].
    chunk: positions at a time; must divide L.
  """
  length = jax.tree.leaves(arrays)[0].shape[1]
  if chunk is None or chunk >= length:
    return step(carry, arrays)
  if length % chunk:
    raise InputError(f"objective.chunk={chunk} does not divide the sequence length {length}.")

  def cut(x):
    return jnp.swapaxes(x.reshape(x.shape[0], length // chunk, chunk, *x.shape[2:]), 0, 1)

  def join(x):
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], length, *x.shape[3:])

  carry, pieces = jax.lax.scan(step, carry, jax.tree.map(cut, arrays))
  return carry, jax.tree.map(join, pieces)


def sum_positions(
  function: Callable[..., tuple[FloatBK, Any]],
  trained: Any,
  moving: Pieces,
  fixed: Pieces,
  weights_BL: FloatBL,
  chunk: int | None,
) -> tuple[Float[Array, ""], Any]:
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

  pieces = jax.tree.map(lambda x: x if chunk is None else x[:, :chunk], (*moving, *fixed))
  function, closed_over = _opened(function, trained, *pieces)

  def weighted(trained, moving, fixed, weights, closed_over):
    loss, extra = function(closed_over, trained, *moving, *fixed)
    return jnp.sum(loss * weights), extra

  def with_gradient(trained, *rest):
    gradient = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
    (value, extra), gradients = gradient(trained, *rest)
    return value, extra, *gradients

  @jax.custom_vjp
  def total(trained, moving, fixed, weights_BL, closed_over):
    values, extra = in_chunks(
      lambda total, pieces: _add(total, weighted(trained, *pieces, closed_over)),
      jnp.zeros(()),
      (moving, fixed, weights_BL),
      chunk,
    )
    return values, extra

  def forward(trained, moving, fixed, weights_BL, closed_over):
    def step(carry, pieces):
      value, extra, of_trained, of_moving = with_gradient(trained, *pieces, closed_over)
      return jax.tree.map(jnp.add, carry, (value, of_trained)), (extra, of_moving)

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    arrays = (moving, fixed, weights_BL)
    (value, of_trained), (extra, of_moving) = in_chunks(step, start, arrays, chunk)
    return (value, extra), (of_trained, of_moving)

  def backward(gradients, cotangent):
    scale = lambda g: g * cotangent[0].astype(g.dtype)  # noqa: E731
    return *jax.tree.map(scale, gradients), None, None, None

  total.defvjp(forward, backward)
  value, extra = total(trained, moving, fixed, weights_BL, closed_over)
  return value, jax.lax.stop_gradient(extra)


def _opened(function, *arguments):
  """Return a function of what one closes over and its arguments, and what it closes over.

  A rule of differentiation may not close over values that are traced: `jax.grad` of a jitted loss
  would meet them after their trace has ended.
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)

  def opened(closed_over, *arguments):
    run = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, closed_over))
    return jax.tree.unflatten(jax.tree.structure(shapes), run(*jax.tree.leaves(arguments)))

  return opened, list(closed.consts)


def _add(total, pair):
  value, extra = pair
  return total + value, extra
