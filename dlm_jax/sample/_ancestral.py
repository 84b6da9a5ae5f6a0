# SPDX-License-Identifier: Apache-2.0
"""Ancestral and first-hitting sampling of absorbing processes, by a reveal schedule.

Under an absorbing process a masked position is revealed between t and s with a probability that
depends on neither the network nor the other positions. So each position's reveal step is drawn
before the first network evaluation, exactly in distribution:

  position l survives as mask until time t  ⇔  u_l < (1 − α_t)/(1 − α_1),   u_l ~ U[0, 1).

Then step k needs logits only where something is revealed: the trunk runs on everything, the
vocabulary head and the draw on gathered positions, 1/K of them. A step that reveals nothing in the
whole batch evaluates nothing. The same u_l, taken as continuous times, give first-hitting
sampling: the limit of infinitely many steps, in at most L evaluations.

Mask-or-token and which-token are two separate draws, so nothing races: see `dlm_jax.draw`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from dlm_jax.errors import InputError
from dlm_jax.process import Absorbing
from dlm_jax.sample import grids
from dlm_jax.sample._reveal import Revealer, capacity_for

NOISE_REMOVALS = ("ancestral", "greedy", "none")


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
  first_hitting: bool = False,
) -> Int[Array, "K B L"]:
  """Return the states after every step; the last one is the sample.

  Args:
    denoiser: has `trunk` and `head`.
    process: absorbing.
    rng_B: one key per sequence.
    x_BL: initial state: masks, and given tokens where frozen.
    frozen_BL: positions that never change.
    steps: K grid steps. Ignored by first-hitting, which takes one step per masked position.
    grid: name in `grids`.
    noise_removal: what happens to masks that outlive the grid (an expected 1e-5 of them): one more
      "ancestral" step, its "greedy" form (most probable token), or "none".
    temperature: divides the logits of the clean-token prediction.
    nucleus: p of nucleus truncation of that prediction.
    first_hitting: reveal one position at a time, at its exact continuous time.
  """
  check_options(noise_removal, temperature, nucleus)
  length = x_BL.shape[1]
  draws_BL3 = jax.vmap(lambda rng: jax.random.uniform(rng, (length, 3)))(rng_B)
  u_BL = jnp.where(frozen_BL, 2.0, draws_BL3[..., 0])  # frozen: never revealed
  if first_hitting:
    reveal_BL, t_KB = _hitting_times(process, u_BL)
    capacity = 1
  else:
    reveal_BL, t_KB = _grid_times(process, u_BL, grids.make(grid, steps))
    capacity = capacity_for(length / steps, length)

  revealer = Revealer(
    denoiser=denoiser, process=process, capacity=capacity, temperature=temperature, nucleus=nucleus
  )

  def reveal(x_BL, k, t_B, greedy=False):
    sigma_B = process.schedule.sigma(t_B)
    return revealer.reveal(x_BL, reveal_BL == k, draws_BL3[..., 1:], sigma_B, greedy)

  def step(x_BL, inputs):
    k, t_B = inputs
    x_BL = reveal(x_BL, k, t_B)
    return x_BL, x_BL

  count = t_KB.shape[0] - 1
  x_BL, trace_KBL = jax.lax.scan(step, x_BL, (jnp.arange(count), t_KB[:-1]))
  if noise_removal == "none":
    return trace_KBL
  x_BL = reveal(x_BL, count, t_KB[-1], greedy=noise_removal == "greedy")
  return jnp.concatenate([trace_KBL, x_BL[None]])


def check_options(noise_removal: str, temperature: float, nucleus: float):
  """Raise InputError for options that no sampler can use."""
  if noise_removal not in NOISE_REMOVALS:
    raise InputError(
      f"noise_removal={noise_removal!r} is unknown; use one of {', '.join(NOISE_REMOVALS)}."
    )
  if temperature <= 0 or not 0 < nucleus <= 1:
    raise InputError(
      f"temperature={temperature} must be positive and nucleus={nucleus} in (0, 1]; for the most "
      "probable tokens use a small nucleus."
    )


def _grid_times(process, u_BL, t_K):
  """Return each position's reveal step in 0 … K (K: outlives the grid; K + 1: frozen) and times."""
  steps, batch = t_K.shape[0] - 1, u_BL.shape[0]
  survives_K = (1 - process.schedule.alpha(t_K[1:])) / (1 - process.schedule.alpha(t_K[0]))
  reveal_BL = jnp.sum(u_BL[..., None] < survives_K[None, None, :], axis=-1, dtype=jnp.int32)
  reveal_BL = jnp.where(u_BL > 1, steps + 1, reveal_BL)
  return reveal_BL, jnp.broadcast_to(t_K[:, None], (steps + 1, batch))


def _hitting_times(process, u_BL):
  """Return each position's rank by reveal time, the largest u first, and the times."""
  batch, length = u_BL.shape
  order_BL = jnp.argsort(-u_BL, axis=1)  # frozen positions (u = 2) come first
  frozen_B1 = jnp.sum(u_BL > 1, axis=1, keepdims=True)
  rank_BL = jnp.argsort(order_BL, axis=1) - frozen_B1
  reveal_BL = jnp.where(u_BL > 1, length + 1, rank_BL).astype(jnp.int32)
  # P(masked at t) = u (1 − α(1)) at the moment of reveal
  masked_BL = jnp.sort(jnp.where(u_BL > 1, 0.0, u_BL), axis=1)[:, ::-1]
  masked_BL = masked_BL * (1 - process.schedule.alpha(1.0))
  t_BL = jnp.clip(process.schedule.inverse(1 - masked_BL), grids.END, 1.0)
  return reveal_BL, jnp.concatenate([t_BL.T, jnp.full((1, batch), grids.END)])
