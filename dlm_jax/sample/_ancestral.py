# SPDX-License-Identifier: Apache-2.0
"""Ancestral and first-hitting sampling of absorbing processes, by a reveal schedule.

Under an absorbing process a masked position is revealed between t and s with a probability that
depends on neither the network nor the other positions. So each position's reveal step is drawn
before the first network evaluation, exactly in distribution:

  position l survives as mask until time t  ⇔  u_l < (1 − α_t)/(1 − α_1),   u_l ~ U[0, 1).

Then step k needs logits only where something is revealed: the trunk runs on everything, the
vocabulary head and the draw on gathered positions, 1/K of them. A step that reveals nothing in the
whole batch evaluates nothing, where such steps are to be expected: whether anything is due is not
asked without a prompt and with several tokens per step, see `_counts`. The same u_l, taken as
continuous times, give first-hitting sampling: the limit of infinitely many steps, in at most L
evaluations.

Which positions share a step is the order's business: `dlm_jax.sample.orders`. The above is the
order "random", the reverse process to the letter. The default is "spaced": what a step reveals is
far apart, and the same number of evaluations loses less. As every order but "random" it reveals all
in the steps of the grid, whatever the schedule would leave to the removal of noise.

Mask-or-token and which-token are two separate draws, so nothing races: see `dlm_jax.draw`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import KeyB, Scalar
from dlm_jax.errors import InputError
from dlm_jax.fields import Number
from dlm_jax.process import grids, orders
from dlm_jax.sample import _adaptive, _counts
from dlm_jax.sample._guided import guided
from dlm_jax.sample._request import GridSampler, Request, walk
from dlm_jax.sample._reveal import Revealer, capacity_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(GridSampler):
  """The reverse process on a grid: one evaluation per step, of those that reveal something.

  Attributes:
    order: which positions a step reveals: one of `orders.NAMES`, an integer array of steps per
      position, [L] or [B, L], or a function (rng, length, steps) -> steps [L].
    selection_temperature: of adaptive orders: how much Gumbel noise their scores get.
    bound: nats of order "entropy", see `_adaptive`.
    guidance: w, how much predictions are sharpened against that for masks alone: see `_guided`. One
      more evaluation, of one sequence, serves all; may be traced.

  Raises:
    InputError: an unknown order, or a number out of range.
  """

  order: Any = "spaced"
  selection_temperature: float = 0.0
  bound: float = 0.1
  guidance: Scalar = 0.0

  def __post_init__(self):
    super().__post_init__()
    orders.check(self.order)
    if not isinstance(self.guidance, jax.core.Tracer):
      Number("[0, ∞)").check("guidance", self.guidance)
    if self.selection_temperature < 0 or self.bound < 0:
      raise InputError(
        f"selection_temperature={self.selection_temperature} and bound={self.bound} must be at "
        "least 0."
      )

  def times(self, request: Request) -> Float[Array, "K"]:
    """Return the times of the grid, one more than there are steps."""
    given = (request.steps, request.length, self.grid)
    return orders.times(request.process, self.order, *given)

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""
    request = guided(request, self.guidance)
    if isinstance(self.order, str) and self.order in orders.ADAPTIVE:
      capacity = capacity_for(request.length / request.steps, request.length)
      return _adaptive.run(self, request, self._revealer(request, capacity))
    t_K = self.times(request)
    with jax.ensure_compile_time_eval():  # process and grid are static
      survives_K = orders.survives(request.process, self.times(request))
    counts = _counts.of_order(self.order, survives_K, request.length)

    def reveal_times(draws):
      reveal_BL = self._steps(request, draws, orders.survives(request.process, t_K))
      reveal_BL = jnp.where(request.frozen_BL, request.steps + 1, reveal_BL)
      return reveal_BL, jnp.broadcast_to(t_K[:, None], (t_K.size, reveal_BL.shape[0]))

    return self._reveal(request, reveal_times, counts)

  def _steps(self, request, draws, survives_K):
    """Return each position's reveal step in 0 … K, K where it outlives the grid."""
    if not isinstance(self.order, str):
      return orders.given(self.order, draws.rng_B, request.length, request.steps)
    if self.order == "random":
      below_BLK = draws.reveal_BL[..., None] < survives_K[None, None, :]
      return jnp.sum(below_BLK, axis=-1, dtype=jnp.int32)
    rank_BL, count_B = orders.spaced(~request.frozen_BL, draws.order_B3[:, :2])
    return orders.steps_of(rank_BL, orders.left(count_B, survives_K, draws.order_B3[:, 2]))

  def _reveal(self, request, reveal_times, counts):
    """Reveal masks at the steps that `reveal_times` makes of the draws of every sequence."""
    draws, token_BL2 = _draw(request, self.order)
    reveal_BL, t_KB = reveal_times(draws)
    steps = t_KB.shape[0] - 1
    asks = counts.asks(steps, request.length, request.prompted)
    known = {"asks": asks, "at_once": counts.most is not None}
    revealer = self._revealer(request, counts.capacity(steps, request.length), **known)
    last = dataclasses.replace(revealer, asks=True)

    def reveal(x_BL, k, t_B, greedy=False, *, revealer=revealer):
      sigma_B = request.process.schedule.sigma(t_B)
      trunk = functools.partial(request.trunk, k=k)
      due_BL = reveal_BL == k
      return revealer.reveal(x_BL, due_BL, token_BL2, sigma_B, greedy, trunk=trunk)

    def remove(x_BL, greedy):
      return reveal(x_BL, steps, t_KB[-1], greedy, revealer=last) if counts.remains else x_BL

    _, trace_KBL = walk(reveal, request.x_BL, (jnp.arange(steps), t_KB[:-1]))
    return self.remove_noise(trace_KBL, remove)

  def _revealer(self, request, capacity, **known):
    given = {"denoiser": request.denoiser, "process": request.process, "capacity": capacity}
    return Revealer(**given, truncation=self, **known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstHitting(Ancestral):
  """Reveal one position at a time, at its exact continuous time.

  One step per masked position: grid and number of steps are not read.
  """

  order: str = "random"

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.order, str) or self.order not in orders.PLANNED:
      raise InputError(
        "sampler='first_hitting' reveals one position at a time; order is one of "
        f"{', '.join(orders.PLANNED)}."
      )

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""
    request = guided(request, self.guidance)

    def reveal_times(draws):
      u_BL = jnp.where(request.frozen_BL, 2.0, draws.reveal_BL)
      reveal_BL, t_KB = _hitting_times(request.process, u_BL)
      if self.order != "random":
        rank_BL, count_B = orders.spaced(~request.frozen_BL, draws.order_B3[:, :2])
        spaced_BL = count_B[:, None] - 1 - rank_BL
        reveal_BL = jnp.where(request.frozen_BL, reveal_BL, spaced_BL)
      return reveal_BL, t_KB

    return self._reveal(request, reveal_times, _counts.ONE_EACH)


class _Draws(NamedTuple):
  """What decides when positions are revealed, per sequence."""

  rng_B: KeyB
  reveal_BL: Float[Array, "B L"]
  order_B3: Float[Array, "B 3"] | None


def _draw(request, order):
  """Return what decides the reveal times, and uniforms of the tokens, see `draw.categorical`."""
  rows = request.length + (isinstance(order, str) and order == "spaced")
  rng_B = request.rng_B
  if callable(order):
    rng_2B = jax.vmap(jax.random.split, out_axes=1)(rng_B)
    order_rng_B, rng_B = rng_2B[0], rng_2B[1]
  else:
    order_rng_B = rng_B
  draws_BR3 = jax.vmap(lambda rng: jax.random.uniform(rng, (rows, 3)))(rng_B)
  draws_BL3 = draws_BR3[:, : request.length]
  spare = draws_BR3[:, request.length] if rows > request.length else None
  return _Draws(order_rng_B, draws_BL3[..., 0], spare), draws_BL3[..., 1:]


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
