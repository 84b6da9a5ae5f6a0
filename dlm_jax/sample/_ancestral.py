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

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dlm_jax.sample import grids
from dlm_jax.sample._request import GridSampler, Request, walk
from dlm_jax.sample._reveal import Revealer, capacity_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(GridSampler):
  """The reverse process on a grid: one evaluation per step that reveals something."""

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""
    t_K, length = self.times(request), request.length
    capacity = capacity_for(length / request.steps, length)
    return self._reveal(request, lambda u_BL: _grid_times(request.process, u_BL, t_K), capacity)

  def _reveal(self, request, reveal_times, capacity):
    """Reveal masks at the steps that `reveal_times` makes of a uniform per position."""
    draws_BL3 = jax.vmap(lambda rng: jax.random.uniform(rng, (request.length, 3)))(request.rng_B)
    u_BL = jnp.where(request.frozen_BL, 2.0, draws_BL3[..., 0])  # frozen: never revealed
    reveal_BL, t_KB = reveal_times(u_BL)
    process = request.process
    revealer = Revealer(
      denoiser=request.denoiser, process=process, capacity=capacity, truncation=self
    )

    def reveal(x_BL, k, t_B, greedy=False):
      sigma_B = process.schedule.sigma(t_B)
      return revealer.reveal(x_BL, reveal_BL == k, draws_BL3[..., 1:], sigma_B, greedy)

    count = t_KB.shape[0] - 1
    _, trace_KBL = walk(reveal, request.x_BL, (jnp.arange(count), t_KB[:-1]))
    return self.remove_noise(trace_KBL, lambda x_BL, greedy: reveal(x_BL, count, t_KB[-1], greedy))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstHitting(Ancestral):
  """Reveal one position at a time, at its exact continuous time.

  One step per masked position: grid and number of steps are not read.
  """

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""
    return self._reveal(request, lambda u_BL: _hitting_times(request.process, u_BL), 1)


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
