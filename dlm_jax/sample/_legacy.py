# SPDX-License-Identifier: Apache-2.0
"""The public float32 race, for reproducing published figures only.

Every step races all tokens and the mask against each other in float32. Tokens of low weight can
never win, so many-step samples lose entropy: of a flat distribution a fifth of the reveals at 1024
steps. Use it to compare with numbers that were made this way, and for nothing else.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlm_jax import draw
from dlm_jax.arrays import NEG_INF
from dlm_jax.process import Absorbing
from dlm_jax.sample import grids


def race_weights(
  process: Absorbing, log_x0_LV: Float[Array, "L V"], s: Float[Array, ""], t: Float[Array, ""]
) -> Float[Array, "L V"]:
  """Return the unnormalised weights (α_s − α_t) p on tokens and 1 − α_s on the mask."""
  alpha_s, alpha_t = process.schedule.alpha(s), process.schedule.alpha(t)
  weights_LV = (alpha_s - alpha_t) * jnp.exp(log_x0_LV)
  return weights_LV.at[:, process.mask_id].set(1 - alpha_s)


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
  logits_dtype: str = "bfloat16",
) -> Int[Array, "K B L"]:
  """Return the states after every step.

  Args:
    denoiser: called with (tokens, sigma_B).
    process: absorbing.
    rng_B: one key per sequence.
    x_BL: initial state.
    frozen_BL: positions that never change.
    steps: K grid steps.
    grid: name in `grids`.
    noise_removal: "ancestral" (one more step to α = 1), "greedy" or "none".
    logits_dtype: what logits and log-probabilities are rounded to; the public code runs both in
      bfloat16.
  """
  shape = (x_BL.shape[1], process.vocab_size)

  def uniform(k):
    return jax.vmap(lambda rng: jax.random.uniform(jax.random.fold_in(rng, k), shape))(rng_B)

  return race_all(
    denoiser,
    process,
    uniform,
    x_BL,
    frozen_BL,
    t_K=grids.make(grid, steps),
    noise_removal=noise_removal,
    logits_dtype=logits_dtype,
  )


def _round(x, dtype):
  return x.astype(dtype).astype(jnp.float32)


def race_all(
  denoiser,
  process: Absorbing,
  uniform: Callable[[Int[Array, ""] | int], Float[Array, "B L V"]],
  x_BL: Int[Array, "B L"],
  frozen_BL: Bool[Array, "B L"],
  *,
  t_K: Float[Array, "K"],
  noise_removal: str,
  logits_dtype: str,
) -> Int[Array, "K B L"]:
  """Return what `run` does, from given uniforms: `uniform(k)` are those of step k.

  The times t_K have one entry more than there are steps; "ancestral" removal asks for one step
  more.
  """
  steps = t_K.shape[0] - 1

  def log_x0(x_BL, t):
    sigma_B = jnp.broadcast_to(process.schedule.sigma(t), x_BL.shape[:1])
    logits_BLV = _round(denoiser(x_BL, sigma_B), logits_dtype)
    impossible_V = process.impossible(jnp.arange(process.vocab_size))
    logits_BLV = jnp.where(impossible_V[None, None], NEG_INF, logits_BLV)
    # the public code normalises in bfloat16 too: Σ p is off by up to 3 %, and reveals with it
    total_BL1 = _round(jax.nn.logsumexp(logits_BLV, axis=-1, keepdims=True), logits_dtype)
    return _round(logits_BLV - total_BL1, logits_dtype)

  def settle(x_BL, weights_BLV, k):
    drawn_BL = draw.race(weights_BLV, uniform(k)).astype(x_BL.dtype)
    return jnp.where((x_BL == process.mask_id) & ~frozen_BL, drawn_BL, x_BL)

  def step(x_BL, inputs):
    k, t, s = inputs
    weights = functools.partial(race_weights, process, s=s, t=t)
    x_BL = settle(x_BL, jax.vmap(weights)(log_x0(x_BL, t)), k)
    return x_BL, x_BL

  x_BL, trace_KBL = jax.lax.scan(step, x_BL, (jnp.arange(steps), t_K[:-1], t_K[1:]))
  if noise_removal == "none":
    return trace_KBL
  log_x0_BLV = log_x0(x_BL, t_K[-1])
  if noise_removal == "greedy":
    best_BL = jnp.argmax(log_x0_BLV, -1).astype(x_BL.dtype)
    x_BL = jnp.where((x_BL == process.mask_id) & ~frozen_BL, best_BL, x_BL)
  else:
    # α_s = 1: the mask has weight 0 and every weight the same factor
    x_BL = settle(x_BL, jnp.exp(log_x0_BLV).at[..., process.mask_id].set(0.0), steps)
  return jnp.concatenate([trace_KBL, x_BL[None]])
