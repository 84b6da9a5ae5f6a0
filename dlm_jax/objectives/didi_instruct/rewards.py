# SPDX-License-Identifier: Apache-2.0
"""Times, weights and normalised rewards of integral-KL distillation.

Reference: DiDi-Instruct, arXiv 2509.25035, sections 3.1 and 3.2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from scipy import stats

from dlm_jax.arrays import BoolBL, FloatB, FloatBL
from dlm_jax.schedules import Schedule

OMEGAS = ("elbo", "constant")
_NODES = 4097  # of the quantile table


@functools.lru_cache(maxsize=16)
def _quantiles(a, b) -> np.ndarray:
  return stats.beta.ppf(np.linspace(0, 1, _NODES), a, b).astype(np.float32)


def beta_times(u_B: FloatB, a: float | int, b: float | int) -> tuple[FloatB, FloatB]:
  """Return times t ~ Beta(a, b) at uniforms, by the inverse distribution function, and π(t)."""
  t_B = jnp.interp(u_B, jnp.linspace(0, 1, _NODES), jnp.asarray(_quantiles(a, b)))
  return t_B, jax.scipy.stats.beta.pdf(jnp.clip(t_B, 1e-6, 1 - 1e-6), a, b)


def omega(t_B: FloatB, schedule: Schedule, mode: str, clip: tuple[float, ...]) -> FloatB:
  """Return ω(t): "constant" 1, or "elbo" −α'/(1 − α), the weight of the NELBO, clipped."""
  if mode == "constant":
    return jnp.ones_like(t_B)
  return jnp.clip(schedule.weight(t_B), *clip)


def masked_mean(logits_BL: FloatBL, masked_BL: BoolBL, clip: float):
  """Return the mean over masked positions of clipped logits, per sequence; 0 without masks.

  Every position estimates one number, of the whole sequence, hence a mean.
  """
  clipped_BL = jnp.clip(logits_BL, -clip, clip)
  return jnp.sum(jnp.where(masked_BL, clipped_BL, 0.0), 1) / jnp.maximum(masked_BL.sum(1), 1)


def normalise_groups(
  reward_B: FloatB,
  size: int,
  clip: float = 3.0,
  eps: float = 1e-8,
  *,
  counted_B: Bool[Array, "B"] | None = None,
) -> FloatB:
  """Return advantages (r − mean)/(std + ε) within groups of consecutive sequences, clipped.

  The standard deviation has ddof = 1, so that no advantage exceeds (G − 1)/√G.

  Args:
    reward_B: rewards; B is a multiple of `size`.
    size: G ≥ 2.
    clip: largest absolute advantage.
    eps: added to the deviation.
    counted_B: False leaves a sequence out of its group, with advantage 0: nothing of it was masked,
      so it has no reward. A group of fewer than two has advantages 0.
  """
  if counted_B is None:
    counted_B = jnp.ones(reward_B.shape, bool)
  reward_GS, counted_GS = reward_B.reshape(-1, size), counted_B.reshape(-1, size)
  count_G1 = counted_GS.sum(1, keepdims=True)
  mean_G1 = jnp.sum(reward_GS * counted_GS, 1, keepdims=True) / jnp.maximum(count_G1, 1)
  centred_GS = (reward_GS - mean_G1) * counted_GS
  variance_G1 = jnp.sum(centred_GS**2, 1, keepdims=True) / jnp.maximum(count_G1 - 1, 1)
  return jnp.clip(centred_GS / (jnp.sqrt(variance_G1) + eps), -clip, clip).reshape(-1)
