# SPDX-License-Identifier: Apache-2.0
"""Gaussian duality: a uniform process is the argmax of a Gaussian one.

Noise a one-hot token as w = α̃ x₀ + σ̃ ξ with ξ ~ N(0, I_V). Then argmax w is distributed as a
uniform process with survival α(γ), γ = −log(α̃²/σ̃²). A network trained on softmax(w/τ) sees a
smooth state, and gradients flow through w; as τ → 0 the input becomes the hard token.

Reference: Duo, arXiv 2506.10892, section 3.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import special

from dlm_jax.arrays import FloatLV, IntL, RngKey, Scalar
from dlm_jax.errors import InputError
from dlm_jax.process import extremes
from dlm_jax.process.uniform import Uniform
from dlm_jax.schedules import Schedule, Times

_NODES = 4097  # of the table over γ; cubic interpolation between them is exact to 1e-12
_HALF_WIDTH, _POINTS = 9.0, 4001  # of the quadrature over u, in standard deviations


class _Table(NamedTuple):
  """α and dα/dγ at equally spaced γ, float64 on the host."""

  alpha: np.ndarray
  slope: np.ndarray


def quadrature(vocab_size: int, gamma: Float[np.ndarray, "N"]) -> tuple[np.ndarray, np.ndarray]:
  """Return α(γ) and dα/dγ in float64.

  P(γ) = ∫ φ(u − μ) Φ(u)^(V−1) du with μ = e^(−γ/2) is the probability that the clean token wins
  the argmax; α = (V P − 1)/(V − 1). The trapezoid rule converges geometrically on a Gaussian:
  4001 nodes over ±9 deviations agree with adaptive quadrature to 1e-12.

  Args:
    vocab_size: V ≥ 2.
    gamma: float64, any range.
  """
  offset = np.linspace(-_HALF_WIDTH, _HALF_WIDTH, _POINTS)
  density = np.exp(-(offset**2) / 2) / np.sqrt(2 * np.pi) * (offset[1] - offset[0])
  mean = np.exp(-np.asarray(gamma, np.float64) / 2)
  win, slope = np.empty_like(mean), np.empty_like(mean)
  for i, mu in enumerate(mean):
    others = np.exp((vocab_size - 1) * special.log_ndtr(offset + mu))
    win[i] = np.sum(density * others)
    slope[i] = -mu / 2 * np.sum(offset * density * others)
  return (vocab_size * win - 1) / (vocab_size - 1), vocab_size / (vocab_size - 1) * slope


@functools.lru_cache(maxsize=16)
def _table(vocab_size: int, gamma_min: float, gamma_max: float) -> _Table:
  return _Table(*quadrature(vocab_size, np.linspace(gamma_min, gamma_max, _NODES)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualitySchedule(Schedule):
  """The survival α(γ(t)) of the argmax, γ linear in t: a schedule for `Uniform`.

  Attributes:
    vocab_size, gamma_min, gamma_max: as in `GaussianDuality`.
  """

  vocab_size: int
  gamma_min: float
  gamma_max: float

  def gamma(self, t: Times) -> Float[Array, "*shape"]:
    return self.gamma_min + jnp.asarray(t) * (self.gamma_max - self.gamma_min)

  def alpha(self, t: Times) -> Float[Array, "*shape"]:
    return self._interpolate(jnp.asarray(t, jnp.result_type(float)))[0]

  def dalpha(self, t: Times) -> Float[Array, "*shape"]:
    return self._interpolate(jnp.asarray(t, jnp.result_type(float)))[1]

  def _interpolate(self, t):
    """Return α and dα/dt by cubic Hermite interpolation; t is clamped to [0, 1]."""
    table = _table(self.vocab_size, self.gamma_min, self.gamma_max)
    width = (self.gamma_max - self.gamma_min) / (_NODES - 1)
    place = jnp.clip(t, 0.0, 1.0) * (_NODES - 1)
    left = jnp.clip(place.astype(jnp.int32), 0, _NODES - 2)
    x = place - left
    alpha = jnp.asarray(table.alpha, t.dtype)
    slope = jnp.asarray(table.slope * width, t.dtype)
    a, b, da, db = alpha[left], alpha[left + 1], slope[left], slope[left + 1]
    # a + x·da + x²·(3(b − a) − 2da − db) + x³·(da + db − 2(b − a)), and its derivative
    rise = b - a
    value = a + x * (da + x * ((3 * rise - 2 * da - db) + x * (da + db - 2 * rise)))
    # The derivative is interpolated by itself: that of the cubic would lose digits in b − a.
    derivative = ((1 - x) * da + x * db) * (_NODES - 1)
    return value, derivative


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianDuality:
  """The Gaussian process behind a uniform one, over a window of γ.

  γ(t) = γ_min + t (γ_max − γ_min); α̃ = √sigmoid(−γ), σ̃ = √sigmoid(γ). All functions take one
  sequence. α(γ) is computed by quadrature on first use and kept per (V, γ_min, γ_max); no files.

  Attributes:
    vocab_size: V.
    gamma_min, gamma_max: at t = 0 and t = 1.

  Reference: Duo, arXiv 2506.10892, equations 8–12.
  """

  vocab_size: int
  gamma_min: float = -3.55
  gamma_max: float = -1.85

  def __post_init__(self):
    if not self.gamma_min < self.gamma_max:
      raise InputError(f"gamma_min={self.gamma_min} must be below gamma_max={self.gamma_max}.")

  @property
  def process(self) -> Uniform:
    """The uniform process that the argmax follows, in the time of this window."""
    schedule = DualitySchedule(
      vocab_size=self.vocab_size, gamma_min=self.gamma_min, gamma_max=self.gamma_max
    )
    return Uniform(vocab_size=self.vocab_size, schedule=schedule)

  def alpha(self, gamma: Times) -> Float[Array, "*shape"]:
    """Return the survival probability of the argmax; γ is clamped to the window."""
    gamma = jnp.asarray(gamma, jnp.result_type(float))
    t = (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)
    return self.process.schedule.alpha(t)

  def noise(self, rng: RngKey, positions_L: IntL) -> FloatLV:
    """Draw ξ, float32; a position has its own key, so any chunk of positions draws alike."""
    draw_row = lambda i: jax.random.normal(jax.random.fold_in(rng, i), (self.vocab_size,))  # noqa: E731
    return jax.vmap(draw_row)(positions_L)

  def diffuse(self, p0_LV: FloatLV, noise_LV: FloatLV, t: Scalar) -> FloatLV:
    """Return w = α̃ p₀ + σ̃ ξ; differentiable in p₀. Its argmax is the hard state."""
    signal, spread = self.coefficients(t)
    return signal * p0_LV + spread * noise_LV

  def coefficients(self, t: Times) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Return α̃ and σ̃."""
    gamma = self.process.schedule.gamma(t)
    return jnp.sqrt(jax.nn.sigmoid(-gamma)), jnp.sqrt(jax.nn.sigmoid(gamma))

  def enough(self, tau: float) -> int | None:
    """Return how many of the largest entries of w hold softmax(w/τ); None if they are not few."""
    return extremes.enough(self.vocab_size, special.expit(self.gamma_min) ** 0.5, tau)

  def diffuse_data(
    self, rng: RngKey, x0_L: IntL, positions_L: IntL, t: Scalar, count: int
  ) -> tuple[Int[Array, "L J"], Float[Array, "L J"]]:
    """Draw the entries of w that matter for one-hot data: the token's and the largest others.

    In law those of `diffuse` with `noise`, for 2 k + 1 random numbers a position instead of V.

    Args:
      rng: key; a position has its own.
      x0_L: clean tokens.
      positions_L: their positions.
      t: time.
      count: k, the others; see `enough`.

    Returns:
      Ids, the token's own first, and values; J = k + 1.
    """
    signal, spread = self.coefficients(t)

    def one(position, token):
      own, largest, which = jax.random.split(jax.random.fold_in(rng, position), 3)
      values = extremes.largest_normals(largest, self.vocab_size - 1, count)
      ids = extremes.distinct(which, self.vocab_size - 1, count)
      ids = jnp.concatenate([token[None], ids + (ids >= token)])
      mine = signal + spread * jax.random.normal(own, (1,))
      return ids, jnp.concatenate([mine, spread * values])

    return jax.vmap(one)(positions_L, x0_L)

  def temper(self, w: Float[Array, "*batch V"], tau: Scalar | float) -> Float[Array, "*batch V"]:
    """Return the soft tokens (w − max w)/τ, of which a network mixes embeddings by softmax.

    The shift changes no softmax, and keeps it finite: a compiler may contract w/τ − max(w/τ) into
    one rounding where the maximum had two. At τ = 1e-10 that overflowed to NaN on a CPU.
    """
    return (w - jax.lax.stop_gradient(w.max(axis=-1, keepdims=True))) / tau
