# SPDX-License-Identifier: Apache-2.0
"""Ancestral sampling of the uniform process: every position is drawn again at every step.

The posterior of a position is a mixture of three simple laws: its token x itself, the prediction
p of the clean token, and the uniform law. With pₓ = p(x) and D = V αₜ pₓ + 1 − αₜ,

  keep x   [V αₜ pₓ + αₜ (1 − αₛ)/αₛ] / D
  p        [αₛ − αₜ] / D
  uniform  [(αₛ − αₜ)(1 − αₛ)/αₛ] / D

So a step draws which law, by one uniform u, and then the token, exactly, and never forms a
posterior over the vocabulary. The first share grows with pₓ: where u is below its value at pₓ = 0,
the token stays whatever the network says. The vocabulary head runs on the other positions only,
gathered: on a grid of 16 uniform steps 42 % of them on average, less with more steps.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax import draw
from dlm_jax.arrays import FloatL, IntL, RngKey, Scalar
from dlm_jax.process import Uniform
from dlm_jax.sample._request import GridSampler, Request, walk
from dlm_jax.sample._reveal import fill_due, in_eights

_TINY = 1e-30  # in place of 1 − α where float32 rounds it to 0
# Of the positions of a sequence, how many meet the vocabulary head at a time. On 16 uniform steps
# 1, 0.53, 0.38, … 0.22, … 0.53, 1 of them are due. Where memory does not matter one turn should do
# for all but the first and last step, since a turn holds up a GPU; of a large batch the work does
# matter, and small turns waste least.
_FEW, _MANY = 9 / 16, 1 / 8
_LOGITS = 2**27  # float32 logits of a turn (half a GiB), up to which memory does not matter


def mixture(
  vocab_size: int, p_at_x_L: FloatL, alpha_s: Scalar, alpha_t: Scalar, kappa: Scalar = 1.0
) -> tuple[FloatL, FloatL]:
  """Return the probabilities of keeping x and of drawing from p; what is left is uniform.

  Args:
    vocab_size: V.
    p_at_x_L: prediction of the clean token, at the current token.
    alpha_s, alpha_t: survival after and before the step; αₛ = 1 for the last one.
    kappa: weight of the posterior; the rest is q(x₀ | xₜ), noised to s from scratch.

  Reference: Duo, arXiv 2506.10892, equation 4; κ: see `_psi`.
  """
  lost_s, lost_t = 1 - alpha_s, jnp.maximum(1 - alpha_t, _TINY)
  evidence_L = vocab_size * alpha_t * p_at_x_L
  total_L = evidence_L + lost_t
  # q(x₀ | xₜ), the posterior at αₛ = 1, keeps x with weight V αₜ pₓ and draws from p with 1 − αₜ
  afresh = (1 - kappa) * alpha_s
  keep_L = (kappa * (evidence_L + alpha_t * lost_s / alpha_s) + afresh * evidence_L) / total_L
  predict_L = (kappa * (lost_t - lost_s) + afresh * lost_t) / total_L
  return keep_L, predict_L


class Step(NamedTuple):
  """Where a step goes: arguments of `mixture`."""

  alpha_s: Scalar
  alpha_t: Scalar
  kappa: Scalar = 1.0


class Draws(NamedTuple):
  """Random numbers of one step of one sequence.

  Attributes:
    which: uniform that chooses the law.
    token: uniforms of a draw from the prediction.
    noise: uniform tokens.
  """

  which: FloatL
  token: Float[Array, "L 2"]
  noise: IntL


def draws(process: Uniform, rng: RngKey, length: int) -> Draws:
  """Return the numbers that a step needs, for all positions."""
  rng_which, rng_token, rng_noise = jax.random.split(rng, 3)
  which_L = jax.random.uniform(rng_which, (length,))
  token_L2 = draw.uniforms(rng_token, (length,))
  return Draws(which_L, token_L2, process.prior(rng_noise, length))


def redraw(
  process: Uniform, given: Draws, logits_KV: Float[Array, "K V"], x_K: Int[Array, "K"], step: Step
) -> Int[Array, "K"]:
  """Draw xₛ at any positions; the logits are the clean token's and need not be normalised."""
  p_K = draw.softmax(logits_KV)
  keep_K, predict_K = mixture(process.vocab_size, p_K.probability(x_K), *step)
  predicted_K = p_K.draw(given.token)
  taken_K = (given.which < keep_K + predict_K) | (predicted_K == draw.NONE)
  moved_K = jnp.where(taken_K, predicted_K, given.noise)
  return jnp.where(given.which < keep_K, x_K, moved_K).astype(x_K.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformAncestral(GridSampler):
  """The reverse process of uniform states: one evaluation per step, and one to remove noise.

  Published figures count the K steps only; K + 1 evaluations are made. A "greedy" removal, the most
  probable clean token everywhere, is the setting of the published few-step figures. Temperature and
  truncation act before the prediction enters the posterior.
  """

  removes_always: ClassVar[bool] = True

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""
    return self.walk(request, self.times(request), jnp.ones(request.steps))

  def walk(
    self, request: Request, t_K: Float[Array, "K"], kappa_K: Float[Array, "K-1"]
  ) -> Int[Array, "_ B L"]:
    """Return what `run` does, on given times, with κ of every step: one entry fewer than times."""
    process, length = request.process, request.length
    ancestral = self.noise_removal == "ancestral"  # a step to α = 1 with κ = 1, like the others
    count = t_K.shape[0] - 1 + ancestral
    alpha_K = jnp.append(process.schedule.alpha(t_K), 1.0)
    kappa_K = jnp.append(kappa_K, 1.0)
    capacity = _capacity(length, request.rng_B.shape[0], process.vocab_size)

    def settle(x_BL, due_BL, t, tokens):
      """Set due positions to tokens(logits_BKV, gather), `gather` taking what belongs to them."""
      sigma_B = request.sigma(t)

      def predict(hidden_BKD, position_BK):
        def gather(array):
          index = position_BK.reshape(*position_BK.shape, *[1] * (array.ndim - 2))
          return jnp.take_along_axis(array, index, axis=1)

        return tokens(request.denoiser.head(hidden_BKD, sigma_B), gather)

      return fill_due(x_BL, request.denoiser.trunk(x_BL, sigma_B), due_BL, predict, capacity)

    def step(x_BL, k, t, alpha_t, alpha_s, kappa):
      one = lambda rng: draws(process, jax.random.fold_in(rng, k), length)  # noqa: E731
      given = jax.vmap(one)(request.rng_B)
      (least,), _ = mixture(process.vocab_size, jnp.zeros(1), alpha_s, alpha_t, kappa)

      def tokens(logits_BKV, gather):
        one = lambda *row: redraw(process, *row, Step(alpha_s, alpha_t, kappa))  # noqa: E731
        return jax.vmap(one)(jax.tree.map(gather, given), self.sharpen(logits_BKV), gather(x_BL))

      return settle(x_BL, ~request.frozen_BL & (given.which >= least), t, tokens)

    def most_probable(x_BL, _):
      best = lambda logits_BKV, _: draw.most_probable(logits_BKV).astype(x_BL.dtype)  # noqa: E731
      return settle(x_BL, ~request.frozen_BL, t_K[-1], best)

    of_step = (t_K[:count], alpha_K[:count], alpha_K[1 : count + 1], kappa_K[:count])
    _, trace_KBL = walk(step, request.x_BL, (jnp.arange(count), *of_step))
    return trace_KBL if ancestral else self.remove_noise(trace_KBL, most_probable)


def _capacity(length, batch, vocab_size):
  """Return how many positions per row to gather at a time."""
  few = in_eights(_FEW * length, length)
  return few if batch * few * vocab_size <= _LOGITS else in_eights(_MANY * length, length)
