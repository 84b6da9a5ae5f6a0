# SPDX-License-Identifier: Apache-2.0
"""The analytic sampler of score networks: Tweedie τ-leaping of the absorbing process.

The public form multiplies a staggered score, e^δ s_y with (1 − e^δ) Σ s added at the mask, by a
transposed transition, δ = σ(t) − σ(s). With the score s_y = α/(1 − α) f_y and s_mask = 1 it
collapses, at a masked position, to

  token y  r f_y         mask  1 − r Σ f         r = (αₛ − αₜ)/(1 − αₜ)

and revealed positions stay. For a normalised f this is the ancestral posterior; a score network's
f is not normalised, and a surplus reveals sooner. Where r Σ f exceeds 1 the mask has weight 0.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dlm_jax import draw
from dlm_jax.arrays import FloatL, FloatLV, Scalar
from dlm_jax.sample._request import GridSampler, Request, walk


def reveal_probability(log_f_LV: FloatLV, alpha_s: Scalar, alpha_t: Scalar) -> FloatL:
  """Return min(1, r Σ f) for positions that are masked."""
  mass_L = jnp.exp(jax.nn.logsumexp(log_f_LV, axis=-1))
  return jnp.minimum((alpha_s - alpha_t) / (1 - alpha_t) * mass_L, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analytic(GridSampler):
  """The published sampler of score networks; `AbsorbingScore` makes f from theirs.

  One evaluation per step, and one to remove noise. Temperature and truncation act on f, whose total
  stays. An "ancestral" removal is the published denoising step: a token drawn from f, the mask left
  out.

  Reference: SEDD, arXiv 2310.16834, section 4.2 and theorem 4.2.
  """

  removes_always: ClassVar[bool] = True

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""
    process, t_K = request.process, self.times(request)
    alpha_K = process.schedule.alpha(t_K)

    def log_estimate(x_BL, t):
      return jax.vmap(process.log_estimate)(request.denoiser(x_BL, request.sigma(t)), x_BL)

    def settle(x_BL, log_f_BLV, k, probability_BL):
      draws_BL3 = request.uniforms(k, request.length, 3)
      tokens_BL = self.draw(log_f_BLV, draws_BL3[..., 1:]).astype(x_BL.dtype)
      due_BL = request.masked(x_BL) & (draws_BL3[..., 0] < probability_BL)
      return jnp.where(due_BL, tokens_BL, x_BL)

    def step(x_BL, k, t, alpha_t, alpha_s):
      log_f_BLV = log_estimate(x_BL, t)
      probability_BL = jax.vmap(lambda f: reveal_probability(f, alpha_s, alpha_t))(log_f_BLV)
      return settle(x_BL, log_f_BLV, k, probability_BL)

    def remove(x_BL, greedy):
      log_f_BLV = log_estimate(x_BL, t_K[-1])
      if greedy:
        return request.reveal_all(x_BL, draw.most_probable(log_f_BLV))
      return settle(x_BL, log_f_BLV, request.steps, jnp.ones(x_BL.shape))

    inputs = (jnp.arange(request.steps), t_K[:-1], alpha_K[:-1], alpha_K[1:])
    return self.remove_noise(walk(step, request.x_BL, inputs)[1], remove)
