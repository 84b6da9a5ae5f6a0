# SPDX-License-Identifier: Apache-2.0
"""The public float32 race, for reproducing published figures only.

Every step races all tokens and the mask against each other in float32. Tokens of low weight can
never win, so many-step samples lose entropy: of a flat distribution a fifth of the reveals at 1024
steps. Use it to compare with numbers that were made this way, and for nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax import draw
from dlm_jax.arrays import NEG_INF, FloatBLV, FloatLV
from dlm_jax.errors import check_choice
from dlm_jax.process import Absorbing
from dlm_jax.sample._request import GridOptions, Request, walk


def race_weights(
  process: Absorbing, log_x0_LV: FloatLV, s: Float[Array, ""], t: Float[Array, ""]
) -> FloatLV:
  """Return the unnormalised weights (α_s − α_t) p on tokens and 1 − α_s on the mask."""
  alpha_s, alpha_t = process.schedule.alpha(s), process.schedule.alpha(t)
  weights_LV = (alpha_s - alpha_t) * jnp.exp(log_x0_LV)
  return weights_LV.at[:, process.mask_id].set(1 - alpha_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Legacy(GridOptions):
  """The race on a grid.

  Attributes:
    logits_dtype: what logits and log-probabilities are rounded to; the public code runs both in
      bfloat16.
  """

  removes_always: ClassVar[bool] = True
  logits_dtype: str = "bfloat16"

  def __post_init__(self):
    super().__post_init__()
    check_choice("logits_dtype", self.logits_dtype, ("float32", "bfloat16", "float16"))

  def run(self, request: Request) -> Int[Array, "K B L"]:
    """Return the states after every step; the last one is the sample."""
    size = request.process.vocab_size
    uniform = lambda k: request.uniforms(k, request.length, size)  # noqa: E731
    return self.race(request, uniform, self.times(request))

  def race(
    self,
    request: Request,
    uniform: Callable[[Int[Array, ""] | int], FloatBLV],
    t_K: Float[Array, "K"],
  ) -> Int[Array, "_ B L"]:
    """Return what `run` does, from given times and uniforms: `uniform(k)` are those of step k.

    The times have one entry more than there are steps; "ancestral" removal asks for one step more.
    """
    process = request.process
    round_ = functools.partial(_round, dtype=self.logits_dtype)

    def log_x0(x_BL, t):
      logits_BLV = round_(request.denoiser(x_BL, request.sigma(t)))
      impossible_V = process.impossible(jnp.arange(process.vocab_size))
      logits_BLV = jnp.where(impossible_V[None, None], NEG_INF, logits_BLV)
      # the public code normalises in bfloat16 too: Σ p is off by up to 3 %, and reveals with it
      return round_(logits_BLV - round_(jax.nn.logsumexp(logits_BLV, axis=-1, keepdims=True)))

    def settle(x_BL, weights_BLV, k):
      return request.reveal_all(x_BL, draw.race(weights_BLV, uniform(k)))

    def step(x_BL, k, t, s):
      weights = functools.partial(race_weights, process, s=s, t=t)
      return settle(x_BL, jax.vmap(weights)(log_x0(x_BL, t)), k)

    def remove(x_BL, greedy):
      log_x0_BLV = log_x0(x_BL, t_K[-1])
      if greedy:
        return request.reveal_all(x_BL, draw.most_probable(log_x0_BLV))
      # α_s = 1: the mask has weight 0 and every weight the same factor
      weights_BLV = jnp.exp(log_x0_BLV).at[..., process.mask_id].set(0.0)
      return settle(x_BL, weights_BLV, t_K.shape[0] - 1)

    inputs = (jnp.arange(t_K.shape[0] - 1), t_K[:-1], t_K[1:])
    return self.remove_noise(walk(step, request.x_BL, inputs)[1], remove)


def _round(x, dtype):
  return x.astype(dtype).astype(jnp.float32)
