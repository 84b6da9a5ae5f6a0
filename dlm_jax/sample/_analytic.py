# SPDX-License-Identifier: Apache-2.0
"""The analytic sampler of score networks: Tweedie τ-leaping of the absorbing process.

The public form multiplies a staggered score, e^δ s_y with (1 − e^δ) Σ s added at the mask, by a
transposed transition, δ = σ(t) − σ(s). With the score s_y = α/(1 − α) f_y and s_mask = 1 it
collapses, at a masked position, to

  token y  r f_y         mask  1 − r Σ f         r = (αₛ − αₜ)/(1 − αₜ)

and revealed positions stay. For a normalised f this is the ancestral posterior; a score network's
f is not normalised, and a surplus reveals sooner. Where r Σ f exceeds 1 the mask has weight 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlm_jax import draw
from dlm_jax.arrays import Scalar
from dlm_jax.process import Absorbing
from dlm_jax.sample import _ancestral, grids


def reveal_probability(
  log_f_LV: Float[Array, "L V"], alpha_s: Scalar, alpha_t: Scalar
) -> Float[Array, "L"]:
  """Return min(1, r Σ f) for positions that are masked."""
  mass_L = jnp.exp(jax.nn.logsumexp(log_f_LV, axis=-1))
  return jnp.minimum((alpha_s - alpha_t) / (1 - alpha_t) * mass_L, 1.0)


def run(
  denoiser,
  process: Absorbing,
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
    process: absorbing; `AbsorbingScore` for a score network.
    rng_B: one key per sequence.
    x_BL: initial state: masks, and given tokens where frozen.
    frozen_BL: positions that never change.
    steps: K grid steps, one evaluation each.
    grid: name in `grids`.
    noise_removal: what happens to masks that outlive the grid: "ancestral" (the published
      denoising step: a token drawn from f, the mask left out), "greedy" or "none".
    temperature: divides the logits of f; its total stays.
    nucleus: p of nucleus truncation of f; its total stays.

  Reference: SEDD, arXiv 2310.16834, section 4.2 and theorem 4.2.
  """
  _ancestral.check_options(noise_removal, temperature, nucleus)
  t_K = grids.make(grid, steps)
  alpha_K = process.schedule.alpha(t_K)
  length = x_BL.shape[1]

  def log_estimate(x_BL, t):
    sigma_B = jnp.broadcast_to(process.schedule.sigma(t), x_BL.shape[:1])
    return jax.vmap(process.log_estimate)(denoiser(x_BL, sigma_B), x_BL)

  def settle(x_BL, log_f_BLV, k, probability_BL):
    uniforms = lambda rng: jax.random.uniform(jax.random.fold_in(rng, k), (length, 3))  # noqa: E731
    draws_BL3 = jax.vmap(uniforms)(rng_B)
    sharp_BLV = draw.sharpen(log_f_BLV, temperature, nucleus)
    tokens_BL = draw.softmax(sharp_BLV).draw(draws_BL3[..., 1:]).astype(x_BL.dtype)
    due_BL = (x_BL == process.mask_id) & ~frozen_BL & (draws_BL3[..., 0] < probability_BL)
    return jnp.where(due_BL, tokens_BL, x_BL)

  def step(x_BL, inputs):
    k, t, alpha_t, alpha_s = inputs
    log_f_BLV = log_estimate(x_BL, t)
    probability_BL = jax.vmap(lambda f: reveal_probability(f, alpha_s, alpha_t))(log_f_BLV)
    x_BL = settle(x_BL, log_f_BLV, k, probability_BL)
    return x_BL, x_BL

  inputs = (jnp.arange(steps), t_K[:-1], alpha_K[:-1], alpha_K[1:])
  x_BL, trace_KBL = jax.lax.scan(step, x_BL, inputs)
  if noise_removal == "none":
    return trace_KBL
  log_f_BLV = log_estimate(x_BL, t_K[-1])
  if noise_removal == "greedy":
    best_BL = jnp.argmax(log_f_BLV, axis=-1).astype(x_BL.dtype)
    x_BL = jnp.where((x_BL == process.mask_id) & ~frozen_BL, best_BL, x_BL)
  else:
    x_BL = settle(x_BL, log_f_BLV, steps, jnp.ones(x_BL.shape))
  return jnp.concatenate([trace_KBL, x_BL[None]])
