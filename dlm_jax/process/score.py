# SPDX-License-Identifier: Apache-2.0
"""The score parameterisation of the absorbing process: SEDD.

A score network estimates ratios of marginals. From the mask to a token y the true ratio is
α/(1 − α) · p(x₀ = y | xₜ), so we write s_y = α/(1 − α) · f_y with f = exp(logits) / (V − 1) and no
normalisation: the constant makes a network of zeros, as ours and the public ones start, the
uniform distribution. Without it Σf would start at V − 1. (With blocked ids, V − 1 stands for the
number of ids that may be predicted.) Score entropy then reads

  −α'/(1 − α) · [ Σ_y f_y − 1 − log f_{x₀} ]   at masked positions,

which is the masked-diffusion integrand plus −α'/(1 − α)(Σf − 1): what normalising removes.
"""

import dataclasses
import math

import jax.numpy as jnp

from dlm_jax.arrays import NEG_INF, FloatL, FloatLV, IntL, Scalar
from dlm_jax.process.absorbing import Absorbing


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsorbingScore(Absorbing):
  """Absorbing process of a score network; fields and draws as `Absorbing`.

  `log_x0`, which samplers use, normalises the score; `log_estimate`, which the losses take, does
  not.

  Reference: SEDD, arXiv 2310.16834, equations 5 and 13; IDLM, arXiv 2602.19066, appendix A.
  """

  def log_estimate(self, logits_LV: FloatLV, xt_L: IntL) -> FloatLV:
    """Return log f = log s − log(α/(1 − α)) where masked; where revealed, one-hot as `log_x0`."""
    ids_1V = jnp.arange(self.vocab_size)[None]
    shifted_LV = logits_LV - math.log(self.vocab_size - 1 - len(set(self.blocked)))
    log_f_LV = jnp.where(self.impossible(ids_1V), NEG_INF, shifted_LV)
    copied_LV = jnp.where(ids_1V == xt_L[:, None], 0.0, NEG_INF)
    return jnp.where(xt_L[:, None] == self.mask_id, log_f_LV, copied_LV)

  def nll(self, log_x0_LV: FloatLV, xt_L: IntL, x0_L: IntL, t: Scalar) -> FloatL:
    """Return score entropy in nats, 0 where revealed; takes `log_estimate` or `log_x0`."""
    return super().nll(log_x0_LV, xt_L, x0_L, t) + self._excess(log_x0_LV, xt_L, t)

  def nll_soft(self, log_x0_LV: FloatLV, xt_L: IntL, p0_LV: FloatLV, t: Scalar) -> FloatL:
    """Return the same for clean data on the simplex."""
    return super().nll_soft(log_x0_LV, xt_L, p0_LV, t) + self._excess(log_x0_LV, xt_L, t)

  def _excess(self, log_f_LV, xt_L, t):
    """Return −α'/(1 − α) (Σf − 1) where masked."""
    excess_L = self.schedule.weight(t) * (jnp.sum(jnp.exp(log_f_LV), axis=-1) - 1)
    return jnp.where(xt_L == self.mask_id, excess_L, 0.0)
