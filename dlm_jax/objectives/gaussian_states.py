# SPDX-License-Identifier: Apache-2.0
"""Soft network inputs from Gaussian-diffused tokens, in chunks of positions.

A soft state w = α̃ p + σ̃ ξ is a dense [B, L, V] array. It is made, turned into embeddings
softmax(w/τ) E and thrown away chunk by chunk, and made again in the backward pass: noise has a key
per position, so nothing but embeddings of width D is kept.

At small temperatures a few entries of w hold all of the softmax but for rounding, on average
(`GaussianDuality.enough`: 8 at V = 50,258 and τ = 1e-3). Then these are kept too: of predictions
found once, among all; of data drawn from their own law, without any dense array.

Reference: Duo, arXiv 2506.10892, section 4; IDLM, arXiv 2602.19066, section 3.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import (
  BoolBK,
  BoolBL,
  FloatB,
  FloatBKV,
  FloatBLD,
  IntBK,
  IntBL,
  KeyB,
  Params,
  Scalar,
)
from dlm_jax.models.layers import FewTokens
from dlm_jax.objectives.positions import map_positions
from dlm_jax.objectives.setting import Setting
from dlm_jax.process import GaussianDuality, Uniform, extremes
from dlm_jax.process.softmax_rows import KEPT, softmax_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxation:
  """How discrete states of a uniform process are made soft, and differentiable.

  Attributes:
    duality: the Gaussian process behind it.
    tau: temperature of the soft input; Duo's curriculum changes it while running.
    few: how many of the largest entries of w hold softmax(w/τ) at any τ in use, besides a datum's
      own; None: all are needed. See `GaussianDuality.enough`.
    path_gradient: whether gradients flow from the soft state to the prediction it was made from.
      False is the "DMD-like" ablation, reported to diverge.
  """

  duality: GaussianDuality
  tau: Scalar | float = 1e-3
  few: int | None = None
  path_gradient: bool = True

  @property
  def process(self) -> Uniform:
    """The uniform process that the argmax of the state follows."""
    return self.duality.process

  def diffuse(
    self, p0_BKV: FloatBKV, rng_B: KeyB, position_BK: IntBK, t_B: FloatB, valid_BK: BoolBK
  ) -> FloatBKV:
    """Return w at some positions; where not valid, p₀ itself without noise."""
    noise_BKV = jax.vmap(self.duality.noise)(rng_B, position_BK)
    w_BKV = jax.vmap(self.duality.diffuse)(p0_BKV, noise_BKV, t_B)
    return jnp.where(valid_BK[..., None], w_BKV, p0_BKV)

  def diffuse_data(
    self, rng_B: KeyB, x0_BK: IntBK, position_BK: IntBK, t_B: FloatB, valid_BK: BoolBK
  ) -> tuple[Int[Array, "B K J"], Float[Array, "B K J"]]:
    """Return ids and values of the entries of w that matter, of data; `few` must be set."""
    ids_BKJ, w_BKJ = jax.vmap(self.duality.diffuse_data, in_axes=(0, 0, 0, 0, None))(
      rng_B, x0_BK, position_BK, t_B, self.few
    )
    w_BKJ = jnp.where(valid_BK[..., None], w_BKJ, ids_BKJ == x0_BK[..., None])
    return checkpoint_name(ids_BKJ, KEPT), checkpoint_name(w_BKJ, KEPT)

  def select(
    self, logits_BKV: FloatBKV, w_BKV: FloatBKV, t_B: FloatB, valid_BK: BoolBK
  ) -> tuple[Int[Array, "B K J"], Float[Array, "B K J"]]:
    """Return ids and values of the largest entries of w, the largest first; `few` must be set.

    Differentiable in the logits of p₀; what to keep for that is named `KEPT`.
    """
    signal_B11 = self.duality.coefficients(t_B)[0][:, None, None]
    largest_BKJ, ids_BKJ = extremes.largest(jax.lax.stop_gradient(w_BKV), self.few)
    ids_BKJ = checkpoint_name(ids_BKJ, KEPT)
    p0_BKJ = checkpoint_name(softmax_at(logits_BKV, ids_BKJ), KEPT)
    moving_BKJ = jnp.where(valid_BK[..., None], signal_B11 * p0_BKJ, 0.0)
    rest_BKJ = largest_BKJ - jax.lax.stop_gradient(moving_BKJ)
    return ids_BKJ, moving_BKJ + checkpoint_name(rest_BKJ, KEPT)

  def soften(self, w: Float[Array, "B K _"]) -> Float[Array, "B K _"]:
    """Return soft tokens of w, or of its entries that matter."""
    return self.duality.temper(w, self.tau)


def _positions(tokens_BL):
  return jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)


class Noising(NamedTuple):
  """What is noised, and how.

  Attributes:
    x0: tokens.
    rng: keys of the noise.
    t: times of the states.
    valid: False where the state is the token, without noise.
  """

  x0: IntBL
  rng: KeyB
  t: FloatB
  valid: BoolBL


def embed_data(
  params: Params, given: Noising, *, setting: Setting, relaxation: Relaxation
) -> tuple[IntBL, FloatBLD]:
  """Return hard states argmax w of diffused data, and the soft ones' embeddings under `params`."""
  x0_BL, rng_B, t_B, valid_BL = given

  def embed_few(x0_BK, position_BK, valid_BK):
    ids_BKJ, w_BKJ = relaxation.diffuse_data(rng_B, x0_BK, position_BK, t_B, valid_BK)
    soft = FewTokens(ids_BKJ, relaxation.soften(w_BKJ))
    first_BK1 = jnp.argmax(w_BKJ, -1, keepdims=True)
    z_BK = jnp.take_along_axis(ids_BKJ, first_BK1, axis=-1)[..., 0]
    return z_BK.astype(x0_BL.dtype), setting.embedded(params, soft)

  def embed(x0_BK, position_BK, valid_BK):
    one_hot_BKV = jax.nn.one_hot(x0_BK, setting.model.config.vocab_size)
    w_BKV = relaxation.diffuse(one_hot_BKV, rng_B, position_BK, t_B, valid_BK)
    embedded = setting.embedded(params, relaxation.soften(w_BKV))
    return jnp.argmax(w_BKV, -1).astype(x0_BL.dtype), embedded

  embed = embed if relaxation.few is None else embed_few
  return map_positions(embed, (x0_BL, _positions(x0_BL), valid_BL), setting.chunk, keep=(KEPT,))


def embed_predictions(
  predict: Callable,
  arrays: tuple[Array, ...],
  trees: tuple[Params, ...],
  given: Noising,
  *,
  setting: Setting,
  relaxation: Relaxation,
) -> tuple[IntBL, tuple[FloatBLD, ...]]:
  """Return hard states argmax w of diffused predictions, and embeddings of w/τ under each tree.

  Gradients flow through the embeddings to whatever `predict` closes over; none through argmax.

  Args:
    predict: (*chunks of arrays) -> logits [B, K, V] of p.
    arrays: [B, L, …], what `predict` reads.
    trees: parameters whose embedding tables are read.
    given: the tokens are read where not valid.
    setting: network and chunk.
    relaxation: how states are made soft.
  """
  x0_BL, rng_B, t_B, valid_BL = given

  def embed(x0_BK, position_BK, valid_BK, *pieces):
    logits_BKV = predict(*pieces)
    if not relaxation.path_gradient:
      logits_BKV = jax.lax.stop_gradient(logits_BKV)
    one_hot_BKV = jax.nn.one_hot(x0_BK, setting.model.config.vocab_size, dtype=logits_BKV.dtype)
    p_BKV = jnp.where(valid_BK[..., None], jax.nn.softmax(logits_BKV), one_hot_BKV)
    w_BKV = relaxation.diffuse(p_BKV, rng_B, position_BK, t_B, valid_BK)
    if relaxation.few is None:
      z_BK, soft = jnp.argmax(jax.lax.stop_gradient(w_BKV), -1), relaxation.soften(w_BKV)
    else:
      ids_BKJ, w_BKJ = relaxation.select(logits_BKV, w_BKV, t_B, valid_BK)
      z_BK, soft = ids_BKJ[..., 0], FewTokens(ids_BKJ, relaxation.soften(w_BKJ))
    return z_BK.astype(jnp.int32), tuple(setting.embedded(tree, soft) for tree in trees)

  arrays = (x0_BL, _positions(valid_BL), valid_BL, *arrays)
  return map_positions(embed, arrays, setting.chunk, keep=(KEPT,))
