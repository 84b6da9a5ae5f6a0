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

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax.errors import InputError, check_choice
from dlm_jax.process import Absorbing, Uniform, orders
from dlm_jax.sample._request import GridSampler, Request, walk
from dlm_jax.sample._reveal import Revealer, capacity_for
from dlm_jax.sample._uniform import UniformAncestral

SCHEDULES = ("cap", "rescale", "loop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Psi(GridSampler):
  """Ancestral steps that also noise tokens again.

  Attributes:
    kappa: κ in [0, 1] of every step, or the name of a schedule of σ, with η = `eta`: "cap"
      min(η, largest σ), "rescale" η · largest σ, or "loop": no noising while α rises to `hold`,
      then "cap" at constant α, then no noising to the end. The defaults are the published ones of
      "loop" (top-p 0.9 besides); published η: 0.008 for "cap" (0.04 with few steps), 0.015 for
      "rescale".
    eta: η in [0, 1] of the named schedules.
    window: of "loop": the grid times between which α is held, the larger first.
    hold: α that "loop" holds.
    order: "random": every position decides for itself; "spaced": as many do in each step as are
      expected, far apart, those that are revealed and those that are masked again.

  Raises:
    InputError: an unknown name, or a number out of range.
  """

  kappa: float | str = "cap"
  eta: float = 0.02
  window: tuple[float, float] = (0.55, 0.05)
  hold: float = 0.9
  order: str = "random"

  def __post_init__(self):
    super().__post_init__()
    check_choice("order", self.order, orders.PLANNED)
    _check(self.kappa, self.eta, self.window, self.hold)

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states of the absorbing process after every step."""
    t_K, sigma_K = self.renoised(request)
    alpha_K, steps = request.process.schedule.alpha(t_K), request.steps
    reveal_K = reveal_probability(alpha_K[1:], alpha_K[:-1], sigma_K)
    # α(1 − α) ≤ 1/4: what (1 − κ) reveals anew at most, on average
    share = self.eta if isinstance(self.kappa, str) else (1 - self.kappa) / 4
    length, mask_id, spaced = request.length, request.process.mask_id, self.order == "spaced"
    revealer = Revealer(
      denoiser=request.denoiser,
      process=request.process,
      capacity=capacity_for(length * min(1 / steps + share, 1.0), length),
      truncation=self,
    )

    def step(x_BL, k, t, sigma, probability):
      draws_BR3 = request.uniforms(k, length + 2 * spaced, 3)
      draws_BL3 = draws_BR3[:, :length]
      masked_BL = request.masked(x_BL)
      shown_BL = ~masked_BL & ~request.frozen_BL
      due_BL, back_BL = 2 * (draws_BL3[..., 0],)
      if spaced:
        due_BL = orders.spread(masked_BL, draws_BR3[:, length])
        back_BL = orders.spread(shown_BL, draws_BR3[:, length + 1])
      due_BL, back_BL = masked_BL & (due_BL < probability), shown_BL & (back_BL < sigma)
      trunk = functools.partial(request.trunk, k=k)
      x_BL = revealer.reveal(x_BL, due_BL, draws_BL3[..., 1:], request.sigma(t), trunk=trunk)
      return jnp.where(back_BL, mask_id, x_BL)

    def remove(x_BL, greedy):
      draws_BL2 = request.uniforms(steps, length, 3)[..., 1:]
      due_BL, sigma_B = request.masked(x_BL), request.sigma(t_K[-1])
      trunk = functools.partial(request.trunk, k=steps)
      return revealer.reveal(x_BL, due_BL, draws_BL2, sigma_B, greedy, trunk=trunk)

    inputs = (jnp.arange(steps), t_K[:-1], sigma_K, reveal_K)
    return self.remove_noise(walk(step, request.x_BL, inputs)[1], remove)

  def renoised(self, request: Request) -> tuple[Float[Array, "K"], Float[Array, "K-1"]]:
    """Return the times, and σ of every step."""
    process, t_K = request.process, self.times(request)
    if self.kappa != "loop":
      return t_K, renoising(process, t_K, self.kappa, self.eta)
    t_K, held_K = _loop(process, t_K, self.window, self.hold)
    return t_K, jnp.where(held_K, renoising(process, t_K, "cap", self.eta), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformPsi(Psi, UniformAncestral):
  """The same under a uniform process, where κ stops at 0 and nothing is revealed in an order."""

  def __post_init__(self):
    super().__post_init__()
    if self.order != "random":
      raise InputError(f"order={self.order!r} needs an absorbing process; leave it out.")

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""
    t_K, sigma_K = self.renoised(request)
    alpha_K = request.process.schedule.alpha(t_K[1:])
    return self.walk(request, t_K, jnp.clip(1 - sigma_K / (1 - alpha_K), 0.0, 1.0))


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
