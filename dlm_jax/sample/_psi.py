# SPDX-License-Identifier: Apache-2.0
"""ψ-samplers: a reverse step that also corrects what is already there.

A share κ of a step is the posterior, the rest draws a clean token and noises it from scratch:

  xₛ ~ κ q(xₛ | xₜ) + (1 − κ) E[q(xₛ | x₀)],  x₀ ~ q(x₀ | xₜ),

where q(x₀ | xₜ) is the posterior at αₛ = 1: p itself under masks.

Both terms have the marginal of the process at s, so any κ leaves it unchanged: κ = 1 is ancestral
sampling, κ < 1 a predictor-corrector. Counted as probability, a position is noised again with

  σ = (1 − κ)(1 − αₛ).

Under the absorbing process that is remasking: a revealed token is masked with probability σ, and
a mask is revealed with (αₛ − αₜ + σαₜ)/(1 − αₜ); σ may rise to min(1, (1 − αₛ)/αₜ), a little beyond
κ = 0. The named schedules choose σ; under the uniform process κ stops at 0. As in ancestral
sampling of masks the moves do not depend on the network: only tokens about to be revealed meet the
vocabulary head, and a step that reveals none evaluates nothing.

Reference: ReMDM, arXiv 2503.00307, sections 3 and 4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlm_jax.errors import InputError
from dlm_jax.process import Absorbing, Uniform
from dlm_jax.sample import _ancestral, _uniform, grids
from dlm_jax.sample._reveal import Revealer, capacity_for

SCHEDULES = ("cap", "rescale", "loop")


def run(
  denoiser,
  process: Absorbing | Uniform,
  rng_B: Key[Array, "B"],
  x_BL: Int[Array, "B L"],
  frozen_BL: Bool[Array, "B L"],
  *,
  steps: int,
  kappa: float | str = "cap",
  eta: float = 0.02,
  window: tuple[float, float] = (0.55, 0.05),
  hold: float = 0.9,
  grid: str = "uniform",
  noise_removal: str = "ancestral",
  temperature: float = 1.0,
  nucleus: float = 1.0,
) -> Int[Array, "K B L"]:
  """Return the states after every step; the last one is the sample.

  Args:
    denoiser: called with (tokens, sigma_B); has `trunk` and `head`.
    process: absorbing or uniform.
    rng_B: one key per sequence.
    x_BL: initial state.
    frozen_BL: positions that never change.
    steps: K grid steps.
    kappa: κ in [0, 1] of every step, or the name of a schedule of σ, with η = `eta`: "cap"
      min(η, largest σ), "rescale" η · largest σ, or "loop": no noising while α rises to `hold`,
      then "cap" at constant α, then no noising to the end. The defaults are the published ones of
      "loop" (top-p 0.9 besides); published η: 0.008 for "cap" (0.04 with few steps), 0.015 for
      "rescale".
    eta: η in [0, 1] of the named schedules.
    window: of "loop": the grid times between which α is held, the larger first.
    hold: α that "loop" holds.
    grid: name in `grids`.
    noise_removal: as in ancestral sampling of the process: "ancestral", "greedy" or "none".
    temperature: divides the logits of the clean-token prediction.
    nucleus: p of nucleus truncation of that prediction.
  """
  _ancestral.check_options(noise_removal, temperature, nucleus)
  _check(kappa, eta, window, hold)
  t_K = grids.make(grid, steps)
  if kappa == "loop":
    t_K, held_K = _loop(process, t_K, window, hold)
    sigma_K = jnp.where(held_K, renoising(process, t_K, "cap", eta), 0.0)
  else:
    sigma_K = renoising(process, t_K, kappa, eta)
  given = {"noise_removal": noise_removal, "temperature": temperature, "nucleus": nucleus}
  start = (denoiser, process, rng_B, x_BL, frozen_BL)
  if isinstance(process, Uniform):
    kappa_K = jnp.clip(1 - sigma_K / (1 - process.schedule.alpha(t_K[1:])), 0.0, 1.0)
    return _uniform.walk(*start, t_K=t_K, kappa_K=kappa_K, **given)
  # α(1 − α) ≤ 1/4: what (1 − κ) reveals anew at most, on average
  share = eta if isinstance(kappa, str) else (1 - kappa) / 4
  length = x_BL.shape[1]
  capacity = capacity_for(length * min(1 / steps + share, 1.0), length)
  return _remask(*start, t_K=t_K, sigma_K=sigma_K, capacity=capacity, **given)


def renoising(
  process: Absorbing | Uniform, t_K: Float[Array, "K"], kappa: float | str, eta: float = 0.0
) -> Float[Array, "K-1"]:
  """Return σ of every step, one entry fewer than times, for a constant κ, "cap" or "rescale"."""
  alpha_K = process.schedule.alpha(t_K)
  lost_K = 1 - alpha_K[1:]
  if not isinstance(kappa, str):
    return (1 - kappa) * lost_K
  largest_K = jnp.minimum(lost_K / alpha_K[:-1], 1.0)
  return jnp.minimum(eta, largest_K) if kappa == "cap" else eta * largest_K


def reveal_probability(
  alpha_s: Float[Array, "*K"], alpha_t: Float[Array, "*K"], sigma: Float[Array, "*K"]
) -> Float[Array, "*K"]:
  """Return the probability that a mask is revealed when tokens are masked with σ."""
  return jnp.clip((alpha_s - alpha_t + sigma * alpha_t) / (1 - alpha_t), 0.0, 1.0)


def _check(kappa, eta, window, hold):
  if isinstance(kappa, str) and kappa not in SCHEDULES:
    raise InputError(
      f"kappa={kappa!r} is unknown; use a number in [0, 1] or one of {', '.join(SCHEDULES)}."
    )
  if not isinstance(kappa, str) and not 0 <= kappa <= 1:
    raise InputError(f"kappa={kappa} must be in [0, 1]; 1 is ancestral sampling.")
  if not 0 <= eta <= 1:
    raise InputError(f"eta={eta} must be in [0, 1]; it is a probability of noising a token again.")
  if not 0 < window[1] < window[0] < 1 or not 0 < hold < 1:
    raise InputError(
      f"window={window} must be two decreasing times and hold={hold} a survival, all in (0, 1)."
    )


def _loop(process, t_K, window, hold):
  """Return times that stand still inside the window, and which steps begin and end there."""
  on, off = window
  held_K = (t_K[:-1] <= on) & (t_K[1:] >= off)
  still = process.schedule.inverse(hold)
  place = jnp.array([0.0, off, on, 1.0])
  return jnp.interp(t_K, place, jnp.stack([0.0, still, still, 1.0])), held_K


def _remask(
  denoiser,
  process,
  rng_B,
  x_BL,
  frozen_BL,
  *,
  t_K,
  sigma_K,
  capacity,
  noise_removal,
  temperature,
  nucleus,
):
  """Return the states of the absorbing sampler."""
  steps, (batch, length) = t_K.shape[0] - 1, x_BL.shape
  alpha_K = process.schedule.alpha(t_K)
  reveal_K = reveal_probability(alpha_K[1:], alpha_K[:-1], sigma_K)

  revealer = Revealer(
    denoiser=denoiser, process=process, capacity=capacity, temperature=temperature, nucleus=nucleus
  )

  def reveal(x_BL, due_BL, draws_BL2, t, greedy=False):
    sigma_B = jnp.broadcast_to(process.schedule.sigma(t), (batch,))
    return revealer.reveal(x_BL, due_BL, draws_BL2, sigma_B, greedy)

  def uniforms(k):
    one = lambda rng: jax.random.uniform(jax.random.fold_in(rng, k), (length, 3))  # noqa: E731
    return jax.vmap(one)(rng_B)

  def step(x_BL, inputs):
    k, t, sigma, probability = inputs
    draws_BL3 = uniforms(k)
    masked_BL = (x_BL == process.mask_id) & ~frozen_BL
    due_BL = masked_BL & (draws_BL3[..., 0] < probability)
    back_BL = ~masked_BL & ~frozen_BL & (draws_BL3[..., 0] < sigma)
    x_BL = reveal(x_BL, due_BL, draws_BL3[..., 1:], t)
    x_BL = jnp.where(back_BL, process.mask_id, x_BL)
    return x_BL, x_BL

  x_BL, trace_KBL = jax.lax.scan(step, x_BL, (jnp.arange(steps), t_K[:-1], sigma_K, reveal_K))
  if noise_removal == "none":
    return trace_KBL
  left_BL = (x_BL == process.mask_id) & ~frozen_BL
  x_BL = reveal(x_BL, left_BL, uniforms(steps)[..., 1:], t_K[-1], noise_removal == "greedy")
  return jnp.concatenate([trace_KBL, x_BL[None]])
