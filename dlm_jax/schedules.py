# SPDX-License-Identifier: Apache-2.0
"""Survival schedules α(t): the probability that a token is still clean at time t.

Time runs from t = 0 (data, α = 1) to t = 1 (noise, α ≈ 0). Every schedule is a frozen, hashable
dataclass with

  alpha(t)    α(t)
  dalpha(t)   dα/dt, negative
  weight(t)   −α'(t) / (1 − α(t)), the weight of the absorbing NELBO, in nats per masked token
  sigma(t)    −log α(t), what a time-conditioned network is given
  inverse(a)  the t with α(t) = a
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax import fields
from dlm_jax.errors import InputError

Times = Float[Array, "*shape"] | float


class Schedule:
  """The base of every schedule: what follows from α and α' alone.

  One of your own is a frozen dataclass with `alpha`, `dalpha` and `inverse`; any process takes it.
  """

  def weight(self, t: Times) -> Float[Array, "*shape"]:
    """Return −α'/(1 − α)."""
    return -self.dalpha(t) / (1 - self.alpha(t))

  def sigma(self, t: Times) -> Float[Array, "*shape"]:
    """Return −log α(t)."""
    return -jnp.log(self.alpha(t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLinear(Schedule):
  """Let α fall linearly: α(t) = 1 − (1 − ε) t, so σ = −log α is the "log-linear" noise.

  The NELBO weight is exactly 1/t, whatever ε.

  Reference: MDLM, arXiv 2406.07524, section 3.
  """

  eps: float = 1e-3

  def __post_init__(self):
    _check(self)

  def alpha(self, t: Times) -> Float[Array, "*shape"]:
    return 1 - (1 - self.eps) * jnp.asarray(t)

  def dalpha(self, t: Times) -> Float[Array, "*shape"]:
    return jnp.full_like(jnp.asarray(t, jnp.result_type(float)), -(1 - self.eps))

  def weight(self, t: Times) -> Float[Array, "*shape"]:
    return 1 / jnp.asarray(t)  # (1 − ε) cancels; no rounding near t = 0

  def sigma(self, t: Times) -> Float[Array, "*shape"]:
    return -jnp.log1p(-(1 - self.eps) * jnp.asarray(t))  # log1p: α → 1 near the data

  def inverse(self, a: Times) -> Float[Array, "*shape"]:
    return (1 - jnp.asarray(a)) / (1 - self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
  """Let α(t) = 1 − cos(π/2 · (1 − (1 − ε) t)).

  The public Duo code returns α' without the inner factor (1 − ε); ours is the derivative.
  """

  eps: float = 1e-3

  def __post_init__(self):
    _check(self)

  def _angle(self, t):
    return jnp.pi / 2 * (1 - (1 - self.eps) * jnp.asarray(t))

  def alpha(self, t: Times) -> Float[Array, "*shape"]:
    return 2 * jnp.sin(self._angle(t) / 2) ** 2  # 1 − cos cancels at t = 1, where α is 1e-6

  def dalpha(self, t: Times) -> Float[Array, "*shape"]:
    return -jnp.sin(self._angle(t)) * (jnp.pi / 2 * (1 - self.eps))

  def inverse(self, a: Times) -> Float[Array, "*shape"]:
    return (1 - jnp.arccos(1 - jnp.asarray(a)) * (2 / jnp.pi)) / (1 - self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
  """Let α(t) = 1 − (1 − ε) t^power; power 1 is `LogLinear`."""

  power: float = 2.0
  eps: float = 1e-3

  def __post_init__(self):
    _check(self)
    fields.Number("(0, ∞)").check("power", self.power)

  def alpha(self, t: Times) -> Float[Array, "*shape"]:
    return 1 - (1 - self.eps) * jnp.asarray(t) ** self.power

  def dalpha(self, t: Times) -> Float[Array, "*shape"]:
    return -(1 - self.eps) * self.power * jnp.asarray(t) ** (self.power - 1)

  def weight(self, t: Times) -> Float[Array, "*shape"]:
    return self.power / jnp.asarray(t)

  def inverse(self, a: Times) -> Float[Array, "*shape"]:
    return ((1 - jnp.asarray(a)) / (1 - self.eps)) ** (1 / self.power)


def _check(schedule) -> None:
  """Complain about a number out of range, of a schedule with `eps`."""
  fields.check_types(schedule)
  fields.Number("[0, 1)").check("eps", schedule.eps)


NAMES = {"log_linear": LogLinear, "cosine": Cosine, "polynomial": Polynomial}


def make(name: str = "log_linear", **options) -> Schedule:
  """Build a schedule from its name: "log_linear", "cosine" or "polynomial".

  Raises:
    InputError: the name or an option is unknown, or a number out of range.
  """
  if not isinstance(name, str) or name not in NAMES:
    raise InputError(
      f"schedule={fields.shown(name)} is unknown; use one of {', '.join(sorted(NAMES))}."
    )
  known = [field.name for field in dataclasses.fields(NAMES[name])]
  if unknown := sorted(set(options) - set(known)):
    raise InputError(
      f"schedule={name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}."
    )
  return fields.make(NAMES[name], options)
