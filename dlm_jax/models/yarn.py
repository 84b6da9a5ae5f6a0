# SPDX-License-Identifier: Apache-2.0
"""Rotary positions stretched beyond the length that a network was trained with: YaRN."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """How positions are stretched, in the terms of public configs.

  Channels that turn often within the trained length stay as they are, those that hardly turn are
  slowed down by `factor`, and between the two the frequency is blended: linearly in the number of
  the channel, as in the authors' code, which public configs mean. (The paper writes the blend
  linearly in the number of turns; both agree at its ends.)

  Attributes:
    factor: how many times the trained length; at least 1.
    original_length: the trained length, in positions.
    beta_fast: turns within it from which on a channel is left alone.
    beta_slow: turns up to which it is slowed down in full.
    attention: what cos and sin are multiplied by, so the scores by its square; None: 0.1 ln factor
      + 1.
    truncate: the two ends of the blend are rounded outwards to whole channels.

  Raises:
    InputError: a number that does not fit.

  Reference: YaRN, arXiv 2309.00071, sections 3.2 and 3.3.
  """

  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention: float | None = None
  truncate: bool = True

  def __post_init__(self):
    if not 1 <= self.factor < 1e6:
      raise InputError(f"yarn: factor={self.factor} must be at least 1 and below 1e6.")
    if not 1 <= self.original_length < 2**31:
      raise InputError(f"yarn: original_length={self.original_length} must be at least 1.")
    if not 0 < self.beta_slow < self.beta_fast < math.inf:
      raise InputError(
        f"yarn: beta_slow={self.beta_slow} must be above 0 and below beta_fast={self.beta_fast}."
      )
    if self.attention is not None and not 0 < self.attention < math.inf:
      raise InputError(f"yarn: attention={self.attention} must be above 0.")

  @property
  def length(self) -> int:
    """Positions that the stretched network is meant for."""
    return int(self.factor * self.original_length)

  @property
  def temperature(self) -> float:
    """What cos and sin are multiplied by."""
    return 0.1 * math.log(self.factor) + 1 if self.attention is None else self.attention

  def frequencies(self, channels: int, base: float) -> Float[np.ndarray, " half"]:
    """Return the angle per position of every pair of channels, float64.

    Args:
      channels: of a head.
      base: of the rotary positions.
    """
    pair = np.arange(channels // 2)
    plain = float(base) ** (-2.0 * pair / channels)
    low, high = (self._channel(turns, channels, base) for turns in (self.beta_fast, self.beta_slow))
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    slowed = np.clip((pair - low) / (high - low or 1e-3), 0, 1)  # 0 where nothing changes
    return plain * (1 - slowed) + plain / self.factor * slowed

  def _channel(self, turns, channels, base):
    """Return the number of the pair, not whole, that turns so often within the trained length."""
    return channels / 2 * math.log(self.original_length / (2 * math.pi * turns)) / math.log(base)

  def rotary_at(
    self, positions: Int[Array, "*shape"], channels: int, base: float
  ) -> tuple[Float[Array, "*shape half"], Float[Array, "*shape half"]]:
    """Return cos and sin of the given positions, as `layers.rotary_at` does without stretching."""
    frequency = jnp.asarray(self.frequencies(channels, base), jnp.float32)
    angle = positions.astype(jnp.float32)[..., None] * frequency.reshape(
      (1,) * positions.ndim + (-1,)
    )
    return jnp.cos(angle) * self.temperature, jnp.sin(angle) * self.temperature
