# SPDX-License-Identifier: Apache-2.0
"""Guidance: a network's predictions, sharpened against what it says of masks alone.

  log p_w(x | z) = (1 + w) log p(x | z) − w log p(x | ∅) + const.

A lower temperature sharpens all that a network says, how frequent tokens are as well, so frequent
ones get more frequent; guidance sharpens what the visible tokens add. The prediction for a sequence
of masks, ∅, is made once for all steps and samples; its head runs where the other one does.

Reference: classifier-free guidance, arXiv 2207.12598, with the visible tokens as condition.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.arrays import FloatB, FloatBKD, FloatBKV, FloatBLD, IntBL, Scalar
from dlm_jax.errors import InputError
from dlm_jax.sample._request import Request


@dataclasses.dataclass(frozen=True)
class _Guided:
  """A denoiser whose hidden states are its own beside those for masks alone."""

  denoiser: Any
  weight: Scalar
  nothing_1LD: Float[Array, "1 L D"]
  sigma_1: Float[Array, "1"]

  def trunk(self, tokens_BL: IntBL, sigma_B: FloatB) -> FloatBLD:
    hidden_BLD = self.denoiser.trunk(tokens_BL, sigma_B)
    nothing_BLD = jnp.broadcast_to(self.nothing_1LD, hidden_BLD.shape)
    return jnp.concatenate([hidden_BLD, nothing_BLD.astype(hidden_BLD.dtype)], axis=-1)

  def head(self, both_BKD: FloatBKD, sigma_B: FloatB) -> FloatBKV:
    hidden_BKD, nothing_BKD = jnp.split(both_BKD, 2, axis=-1)
    logits_BKV = self.denoiser.head(hidden_BKD, sigma_B)
    sigma_B = jnp.broadcast_to(self.sigma_1, sigma_B.shape)
    return logits_BKV + self.weight * (logits_BKV - self.denoiser.head(nothing_BKD, sigma_B))


def guided(request: Request, weight: Scalar) -> Request:
  """Return the request of a guided denoiser; as it is where the weight is the number 0.

  Raises:
    InputError: the masks of the network take noise.
  """
  if not isinstance(weight, jax.core.Tracer) and weight == 0:
    return request
  if request.noise_B is not None:
    raise InputError(f"guidance={weight} needs one prediction for masks alone; these take noise.")
  masks_1L = jnp.full((1, request.length), request.process.mask_id, jnp.int32)
  sigma_1 = request.sigma(1.0)[:1]
  nothing_1LD = request.denoiser.trunk(masks_1L, sigma_1)
  return dataclasses.replace(
    request, denoiser=_Guided(request.denoiser, weight, nothing_1LD, sigma_1)
  )
