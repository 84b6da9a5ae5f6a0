# SPDX-License-Identifier: Apache-2.0
"""What every sampler of a grid is given, and the options that they share.

A sampler is a frozen dataclass: its fields are its options, `run(request)` its states after every
step. `generate` finds it by name and process.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax import draw
from dlm_jax.arrays import BoolBL, FloatB, FloatBLD, IntBL, KeyB, Scalar
from dlm_jax.errors import InputError
from dlm_jax.fields import Number
from dlm_jax.process import grids, orders

NOISE_REMOVALS = ("ancestral", "greedy", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """Which samples are wanted, and from what.

  Attributes:
    denoiser: has `trunk` and `head`, and may be called with (tokens, sigma_B).
    process: the forward process.
    rng_B: one key per sequence.
    x_BL: initial state: noise, and given tokens where frozen.
    frozen_BL: positions that never change.
    steps: K grid steps.
    noise_B: one key per sequence for the noise of masks, of a denoiser with `mask_noise`.
    prompted: static; False where no prompt was given, so that nothing is frozen: what a step will
      do is then known better before anything runs. It may change what a sample costs, never tokens.
  """

  denoiser: Any
  process: Any
  rng_B: KeyB
  x_BL: IntBL
  frozen_BL: BoolBL
  steps: int
  noise_B: KeyB | None = None
  prompted: bool = True

  @property
  def length(self) -> int:
    """Tokens per sequence."""
    return self.x_BL.shape[1]

  def sigma(self, t: Scalar) -> FloatB:
    """Return what the denoiser is told of a time that all sequences share."""
    return jnp.broadcast_to(self.process.schedule.sigma(t), self.rng_B.shape)

  def trunk(self, x_BL: IntBL, sigma_B: FloatB, k: Int[Array, ""] | int) -> FloatBLD:
    """Return the denoiser's hidden states, with noise of evaluation k where its masks take any."""
    if self.noise_B is None:
      return self.denoiser.trunk(x_BL, sigma_B)
    rng_B = jax.vmap(jax.random.fold_in, (0, None))(self.noise_B, k)
    masked_BL = x_BL == self.process.mask_id
    noise_BLN = draw.mask_noise(rng_B, masked_BL, self.denoiser.mask_noise)
    return self.denoiser.trunk(x_BL, sigma_B, noise_BLN)

  def uniforms(self, k: Int[Array, ""] | int, *shape: int) -> Float[Array, "B *shape"]:
    """Return uniforms of step k per sequence."""
    one = lambda rng: jax.random.uniform(jax.random.fold_in(rng, k), shape)  # noqa: E731
    return jax.vmap(one)(self.rng_B)

  def masked(self, x_BL: IntBL) -> BoolBL:
    """Return which positions are masks to be revealed; of an absorbing process."""
    return (x_BL == self.process.mask_id) & ~self.frozen_BL

  def reveal_all(self, x_BL: IntBL, tokens_BL: Array) -> IntBL:
    """Return the state with every mask replaced by its token."""
    return jnp.where(self.masked(x_BL), tokens_BL.astype(x_BL.dtype), x_BL)


def walk(
  step: Callable[..., Array], x_BL: IntBL, inputs: tuple[Array, ...]
) -> tuple[IntBL, Int[Array, "K B L"]]:
  """Scan `step(state, *inputs of a step) -> state`; return the last state and all of them."""

  def body(x_BL, inputs):
    x_BL = step(x_BL, *inputs)
    return x_BL, x_BL

  return jax.lax.scan(body, x_BL, inputs)


class Sampler(Protocol):
  """Options of a sampler that know how to draw with them."""

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridOptions:
  """When a sampler steps, and what follows its last step.

  Attributes:
    grid: name in `grids`; None: "rising" of a spaced order of `Ancestral`, else "uniform".
    noise_removal: what happens to noise that outlives the grid (an expected 1e-5 of the masks;
      none of them in an order of `Ancestral` other than "random"), for one more evaluation: an
      "ancestral" step to α = 1, its "greedy" form, the most probable clean token, or "none".
    removes_always: of a class: whether that evaluation is made even where no noise is left.

  Raises:
    InputError: an unknown name.
  """

  removes_always: ClassVar[bool] = False
  grid: str | None = None
  noise_removal: str = "ancestral"

  def __post_init__(self):
    if self.noise_removal not in NOISE_REMOVALS:
      raise InputError(
        f"noise_removal={self.noise_removal!r} is unknown; use one of {', '.join(NOISE_REMOVALS)}."
      )
    if self.grid is not None:
      grids.check(self.grid)

  def times(self, request: Request) -> Float[Array, "K"]:
    """Return the times of the grid, one more than there are steps."""
    given = (request.steps, request.length, self.grid)
    return orders.times(request.process, "random", *given)

  def remove_noise(
    self, trace_KBL: Int[Array, "K B L"], remove: Callable[[IntBL, bool], IntBL]
  ) -> Int[Array, "_ B L"]:
    """Return the states, and the one in which what the grid left is gone.

    Args:
      trace_KBL: states after every step.
      remove: (the last one, whether greedily) -> the state without noise.
    """
    if self.noise_removal == "none":
      return trace_KBL
    x_BL = remove(trace_KBL[-1], self.noise_removal == "greedy")
    return jnp.concatenate([trace_KBL, x_BL[None]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncation:
  """How a prediction of the clean token is sharpened before a token is drawn from it.

  Temperature and nucleus may be traced: one compiled program then serves all values. They are
  checked where they are numbers.

  Attributes:
    temperature: divides the logits; 0 takes the most probable token.
    nucleus: p of nucleus truncation.
    top_k: how many tokens to keep; 0 keeps all.

  Raises:
    InputError: a number out of range.
  """

  temperature: Scalar = 1.0
  nucleus: Scalar = 1.0
  top_k: int = 0

  def __post_init__(self):
    known = lambda x: not isinstance(x, jax.core.Tracer)  # noqa: E731
    for name in ("temperature", "nucleus"):
      if known(getattr(self, name)):
        Number().check(name, getattr(self, name))
    negative = known(self.temperature) and self.temperature < 0
    if negative or (known(self.nucleus) and not 0 < self.nucleus <= 1):
      raise InputError(
        f"temperature={self.temperature} must be 0 or more and nucleus={self.nucleus} in (0, 1]; "
        "temperature=0 takes the most probable tokens."
      )
    if self.top_k < 0:
      raise InputError(f"top_k={self.top_k} is negative; 0 keeps all tokens.")

  def draw(
    self, logits: Float[Array, "*draws V"], uniform: Float[Array, "*draws 2"]
  ) -> Int[Array, "*draws"]:
    """Draw one token per row of the sharpened distribution, exactly."""
    return draw.softmax(self.sharpen(logits)).draw(uniform)

  def sharpen(self, logits: Float[Array, "*draws V"]) -> Float[Array, "*draws V"]:
    """Return the logits of the sharpened distribution."""
    return draw.sharpen(logits, self.temperature, self.nucleus, self.top_k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSampler(GridOptions, Truncation):
  """Options of every sampler that draws clean tokens: see `GridOptions` and `Truncation`."""

  def __post_init__(self):
    GridOptions.__post_init__(self)
    Truncation.__post_init__(self)
