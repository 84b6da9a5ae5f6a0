# SPDX-License-Identifier: Apache-2.0
"""Soft network inputs from Gaussian-diffused tokens, in chunks of positions.

A soft state w = α̃ p + σ̃ ξ is a dense [B, L, V] array. It is made, turned into embeddings
softmax(w/τ) E and thrown away chunk by chunk, and made again in the backward pass: noise has a key
per position, so nothing but embeddings of width D is ever kept.

Reference: Duo, arXiv 2506.10892, section 4; IDLM, arXiv 2602.19066, section 3.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dlm_jax.arrays import Params, Scalar
from dlm_jax.models import DiT
from dlm_jax.objectives.state import map_positions
from dlm_jax.process import GaussianDuality, Uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxation:
  """How discrete states of a uniform process are made soft, and differentiable.

  Attributes:
    duality: the Gaussian process behind it.
    tau: temperature of the soft input; Duo's curriculum changes it while running.
    path_gradient: whether gradients flow from the soft state to the prediction it was made from.
      False is the "DMD-like" ablation, reported to diverge.
  """

  duality: GaussianDuality
  tau: Scalar | float = 1e-3
  path_gradient: bool = True

  @property
  def process(self) -> Uniform:
    """The uniform process that the argmax of the state follows."""
    return self.duality.process

  def diffuse(
    self, p0_BKV: Float[Array, "B K V"], rng_B: Key[Array, "B"], position_BK: Int[Array, "B K"],
    t_B: Float[Array, "B"], valid_BK: Bool[Array, "B K"],
  ) -> Float[Array, "B K V"]:  # fmt: skip
    """Return w at some positions; where not valid, p₀ itself without noise."""
    noise_BKV = jax.vmap(self.duality.noise)(rng_B, position_BK)
    w_BKV = jax.vmap(self.duality.diffuse)(p0_BKV, noise_BKV, t_B)
    return jnp.where(valid_BK[..., None], w_BKV, p0_BKV)

  def soften(self, w_BKV: Float[Array, "B K V"]) -> Float[Array, "B K V"]:
    """Return soft tokens of w."""
    return self.duality.temper(w_BKV, self.tau)


def _positions(tokens_BL):
  return jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)


def embed_data(
  params: Params, x0_BL: Int[Array, "B L"], rng_B: Key[Array, "B"], t_B: Float[Array, "B"],
  valid_BL: Bool[Array, "B L"], *, model: DiT, relaxation: Relaxation, chunk: int | None,
) -> tuple[Int[Array, "B L"], Float[Array, "B L D"]]:  # fmt: skip
  """Return hard states argmax w of diffused data, and the soft ones' embeddings under `params`."""

  def embed(x0_BK, position_BK, valid_BK):
    one_hot_BKV = jax.nn.one_hot(x0_BK, model.config.vocab_size)
    w_BKV = relaxation.diffuse(one_hot_BKV, rng_B, position_BK, t_B, valid_BK)
    embedded = model.apply({"params": params}, relaxation.soften(w_BKV), method="embedded")
    return jnp.argmax(w_BKV, -1).astype(x0_BL.dtype), embedded

  return map_positions(embed, (x0_BL, _positions(x0_BL), valid_BL), chunk)


def embed_predictions(
  predict, arrays: tuple[Array, ...], trees: tuple[Params, ...], rng_B: Key[Array, "B"],
  t_B: Float[Array, "B"], valid_BL: Bool[Array, "B L"], *, model: DiT, relaxation: Relaxation,
  chunk: int | None,
) -> tuple[Int[Array, "B L"], tuple[Float[Array, "B L D"], ...]]:  # fmt: skip
  """Return hard states argmax w of diffused predictions, and embeddings of w/τ under each tree.

  Gradients flow through the embeddings to whatever `predict` closes over; none through argmax.

  Args:
    predict: (*chunks of arrays) -> p [B, K, V], on the simplex.
    arrays: [B, L, …], what `predict` reads.
    trees: parameters whose embedding tables are read.
    rng_B: keys of the noise.
    t_B: times of the states.
    valid_BL: False where p stays as it is.
    model, relaxation, chunk: see `idlm.make`.
  """

  def embed(position_BK, valid_BK, *pieces):
    p_BKV = predict(*pieces)
    if not relaxation.path_gradient:
      p_BKV = jax.lax.stop_gradient(p_BKV)
    w_BKV = relaxation.diffuse(p_BKV, rng_B, position_BK, t_B, valid_BK)
    soft_BKV = relaxation.soften(w_BKV)
    embedded = tuple(model.apply({"params": tree}, soft_BKV, method="embedded") for tree in trees)
    return jnp.argmax(jax.lax.stop_gradient(w_BKV), -1).astype(jnp.int32), embedded

  return map_positions(embed, (_positions(valid_BL), valid_BL, *arrays), chunk)
