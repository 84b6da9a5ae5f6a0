# SPDX-License-Identifier: Apache-2.0
"""Ancestral sampling of the uniform process: every position is drawn again at every step.

The posterior of a position is a mixture of three simple laws: its token x itself, the prediction
p of the clean token, and the uniform law. With pₓ = p(x) and D = V αₜ pₓ + 1 − αₜ,

  keep x   [V αₜ pₓ + αₜ (1 − αₛ)/αₛ] / D
  p        [αₛ − αₜ] / D
  uniform  [(αₛ − αₜ)(1 − αₛ)/αₛ] / D

So a step draws which law, by one uniform, and then the token, exactly. It reads the logits once
and never forms a posterior over the vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlm_jax import draw
from dlm_jax.arrays import RngKey, Scalar
from dlm_jax.process import Uniform
from dlm_jax.sample import _ancestral, grids

_TINY = 1e-30  # in place of 1 − α where float32 rounds it to 0


def mixture(
  vocab_size: int,
  p_at_x_L: Float[Array, "L"],
  alpha_s: Scalar,
  alpha_t: Scalar,
  kappa: Scalar = 1.0,
) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
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


def redraw(
  process: Uniform,
  rng: RngKey,
  weights_LV: Float[Array, "L V"],
  x_L: Int[Array, "L"],
  alpha_s: Scalar,
  alpha_t: Scalar,
  kappa: Scalar,
) -> Int[Array, "L"]:
  """Draw xₛ; the weights are those of the clean token and need not be normalised."""
  rng_which, rng_token, rng_uniform = jax.random.split(rng, 3)
  at_x_L1 = jnp.take_along_axis(weights_LV, x_L[:, None], axis=-1)
  p_at_x_L = at_x_L1[:, 0] / jnp.sum(weights_LV, axis=-1)
  keep_L, predict_L = mixture(process.vocab_size, p_at_x_L, alpha_s, alpha_t, kappa)
  which_L = jax.random.uniform(rng_which, x_L.shape)
  predicted_L = draw.categorical(weights_LV, draw.uniforms(rng_token, x_L.shape))
  noise_L = process.prior(rng_uniform, x_L.shape[0])
  moved_L = jnp.where(which_L < keep_L + predict_L, predicted_L, noise_L)
  return jnp.where(which_L < keep_L, x_L, moved_L).astype(x_L.dtype)


def walk(
  denoiser,
  process: Uniform,
  rng_B: Key[Array, "B"],
  x_BL: Int[Array, "B L"],
  frozen_BL: Bool[Array, "B L"],
  *,
  t_K: Float[Array, "K"],
  kappa_K: Float[Array, "K-1"],
  noise_removal: str,
  temperature: float,
  nucleus: float,
) -> Int[Array, "_ B L"]:
  """Return what `run` does, on given times, with κ of every step: one entry fewer than times."""
  steps = t_K.shape[0] - 1
  count = steps + (noise_removal == "ancestral")  # the tail is a step to α = 1 with κ = 1
  alpha_K = jnp.append(process.schedule.alpha(t_K), 1.0)
  kappa_K = jnp.append(kappa_K, 1.0)

  def log_x0(x_BL, t):
    sigma_B = jnp.broadcast_to(process.schedule.sigma(t), x_BL.shape[:1])
    return jax.vmap(process.log_x0)(denoiser(x_BL, sigma_B), x_BL)

  def step(x_BL, inputs):
    k, t, alpha_t, alpha_s, kappa = inputs
    weights_BLV = draw.sharpen(log_x0(x_BL, t), temperature, nucleus)
    one = lambda rng, weights_LV, x_L: redraw(  # noqa: E731
      process, jax.random.fold_in(rng, k), weights_LV, x_L, alpha_s, alpha_t, kappa
    )
    x_BL = jnp.where(frozen_BL, x_BL, jax.vmap(one)(rng_B, weights_BLV, x_BL))
    return x_BL, x_BL

  of_step = (t_K[:count], alpha_K[:count], alpha_K[1 : count + 1], kappa_K[:count])
  x_BL, trace_KBL = jax.lax.scan(step, x_BL, (jnp.arange(count), *of_step))
  if noise_removal != "greedy":
    return trace_KBL
  best_BL = jnp.argmax(log_x0(x_BL, t_K[-1]), axis=-1).astype(x_BL.dtype)
  return jnp.concatenate([trace_KBL, jnp.where(frozen_BL, x_BL, best_BL)[None]])


def run(
  denoiser,
  process: Uniform,
  rng_B: Key[Array, "B"],
  x_BL: Int[Array, "B L"],
  frozen_BL: Bool[Array, "B L"],
  *,
  steps: int,
  grid: str = "uniform",
  noise_removal: str = "ancestral",
  temperature: float = 1.0,
  nucleus: float = 1.0,
) -> Int[Array, "K B L"]:
  """Return the states after every step; the last one is the sample.

  Args:
    denoiser: called with (tokens, sigma_B).
    process: uniform.
    rng_B: one key per sequence.
    x_BL: initial state: uniform tokens, and given tokens where frozen.
    frozen_BL: positions that never change.
    steps: K grid steps, one evaluation each.
    grid: name in `grids`.
    noise_removal: what follows the grid, for one more evaluation: an "ancestral" step to α = 1,
      "greedy" (the most probable clean token everywhere, the setting of the published few-step
      figures), or "none".
    temperature: divides the logits of the clean-token prediction.
    nucleus: p of nucleus truncation of that prediction, before it enters the posterior.
  """
  _ancestral.check_options(noise_removal, temperature, nucleus)
  return walk(
    denoiser, process, rng_B, x_BL, frozen_BL, t_K=grids.make(grid, steps),
    kappa_K=jnp.ones(steps), noise_removal=noise_removal, temperature=temperature,
    nucleus=nucleus,
  )  # fmt: skip
