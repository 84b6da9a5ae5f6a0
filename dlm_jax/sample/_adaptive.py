# SPDX-License-Identifier: Apache-2.0
"""Adaptive reveal orders: the network's own predictions say which positions come next.

Positions are scored by what the network predicts for them, never by the token that was drawn, so
a token is still drawn from its prediction and nothing is sharpened in passing:

  "confidence"  max p, the largest first
  "margin"      the largest p less the second
  "entropy"     −H(p); as many at once as have Σ H − max H ≤ `bound`, which bounds the
                dependence that is lost: arXiv 2505.24857
  "spaced_confidence"  max p among the 2 n positions that come next in the spaced order

Each step reveals what the grid says (n of them), "entropy" what its bound says and the last step
the rest. Scores need the vocabulary head at every position: of the order of K times what the
other orders pay for it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import BoolBL, FloatBKV, IntBL
from dlm_jax.process import orders
from dlm_jax.sample._request import Request, walk
from dlm_jax.sample._reveal import Revealer

_POOL = 2  # times the positions of a step: among which "spaced_confidence" chooses


def run(options, request: Request, revealer: Revealer) -> Int[Array, "K B L"]:
  """Return the states after every step.

  Args:
    options: `Ancestral`, whose order is one of `orders.ADAPTIVE`.
    request: of the samples.
    revealer: draws tokens.
  """

  def predict(x_BL, k, t, token_BL2):
    """Return a token and a score of every position, some positions at a time."""
    sigma_B = request.sigma(t)
    hidden_BLD = request.trunk(x_BL, sigma_B, k)

    def some(inputs):
      hidden_BD, uniform_B2 = inputs
      logits_B1V = revealer.predict(hidden_BD[:, None], sigma_B)
      token_B1 = revealer.truncation.draw(logits_B1V, uniform_B2[:, None])
      return token_B1[:, 0].astype(x_BL.dtype), score(options.order, logits_B1V)[:, 0]

    inputs = (jnp.swapaxes(hidden_BLD, 0, 1), jnp.swapaxes(token_BL2, 0, 1))
    token_LB, score_LB = jax.lax.map(some, inputs, batch_size=revealer.capacity)
    return token_LB.T, score_LB.T

  trace_KBL = states(options, request, predict)
  return options.remove_noise(trace_KBL, lambda x_BL, greedy: x_BL)  # the last step left none


def states(options, request: Request, predict: Callable) -> Int[Array, "K B L"]:
  """Return the states after every step, of a function that predicts.

  Args:
    options: `Ancestral`.
    request: of the samples.
    predict: (state, step, time, uniforms [B, L, 2]) -> tokens and scores [B, L].
  """
  t_K, steps, length = options.times(request), request.steps, request.length
  draws_BL3 = jax.vmap(lambda rng: jax.random.uniform(rng, (length + 1, 3)))(request.rng_B)
  spare_B3, token_BL2 = draws_BL3[:, length], draws_BL3[:, :length, 1:]
  noise_BL = -jnp.log(-jnp.log(jnp.clip(draws_BL3[:, :length, 0], 1e-12, 1 - 1e-7)))
  rank_BL, count_B = orders.spaced(~request.frozen_BL, spare_B3[:, :2])
  left_BK = orders.left(count_B, orders.survives(request.process, t_K), spare_B3[:, 2])

  def step(x_BL, k, t, left_B):
    masked_BL = request.masked(x_BL)

    def reveal(x_BL):
      tokens_BL, score_BL = predict(x_BL, k, t, token_BL2)
      score_BL = score_BL + options.selection_temperature * noise_BL
      due_BL = due(options.order, score_BL, masked_BL, left_B, rank_BL, options.bound)
      due_BL = jnp.where(k == steps - 1, masked_BL, due_BL)
      return jnp.where(due_BL, tokens_BL, x_BL)

    return jax.lax.cond(masked_BL.any(), reveal, lambda x_BL: x_BL, x_BL)

  return walk(step, request.x_BL, (jnp.arange(steps), t_K[:-1], left_BK.T))[1]


def score(order: str, logits_BKV: FloatBKV) -> Float[Array, "B K"]:
  """Return how soon a position of these logits is to be revealed, the largest first."""
  log_p_BKV = jax.nn.log_softmax(logits_BKV, axis=-1)
  if order == "entropy":
    return jnp.sum(jnp.exp(log_p_BKV) * log_p_BKV, axis=-1)
  first_BK, second_BK = jnp.moveaxis(jax.lax.top_k(jnp.exp(log_p_BKV), 2)[0], -1, 0)
  return first_BK - second_BK if order == "margin" else first_BK


def due(
  order: str,
  score_BL: Float[Array, "B L"],
  masked_BL: BoolBL,
  left_B: Int[Array, "B"],
  rank_BL: IntBL,
  bound: float,
) -> BoolBL:
  """Return which masks a step reveals.

  Args:
    order: one of `orders.ADAPTIVE`.
    score_BL: of `score`; those of other positions mean nothing.
    masked_BL: masks to be revealed.
    left_B: how many of them are to be left.
    rank_BL: of the spaced order.
    bound: nats, of "entropy".
  """
  place_BL = _places(score_BL, masked_BL)
  if order == "entropy":
    sort_BL = jnp.argsort(place_BL, axis=1)
    nats_BL = jnp.where(masked_BL, -score_BL, 0.0)
    nats_BL = jnp.cumsum(jnp.take_along_axis(nats_BL, sort_BL, axis=1), axis=1)
    before_BL = jnp.pad(nats_BL[:, :-1], ((0, 0), (1, 0)))  # Σ − max of this many
    count_B1 = jnp.maximum(jnp.sum(before_BL <= bound, axis=1, keepdims=True), 1)
    return masked_BL & (place_BL < count_B1)
  count_B1 = jnp.maximum(masked_BL.sum(1) - left_B, 0)[:, None]
  if order == "spaced_confidence":
    pool_BL = masked_BL & (_places(rank_BL, masked_BL) < _POOL * count_B1)
    return pool_BL & (_places(score_BL, pool_BL) < count_B1)
  return masked_BL & (place_BL < count_B1)


@functools.partial(jax.vmap, in_axes=(0, 0))
def _places(score_L, eligible_L):
  """Return the place of every position in a row, the best eligible one first."""
  worst = jnp.full_like(score_L, jnp.finfo(jnp.float32).min if _real(score_L) else -1)
  return jnp.argsort(jnp.argsort(-jnp.where(eligible_L, score_L, worst)))


def _real(array):
  return jnp.issubdtype(array.dtype, jnp.floating)
