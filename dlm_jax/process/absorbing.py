# SPDX-License-Identifier: Apache-2.0
"""The absorbing ("masked") forward process: a token survives or becomes the mask."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.arrays import NEG_INF, FloatL, FloatLV, IntL, RngKey, Scalar
from dlm_jax.errors import InputError
from dlm_jax.fields import check_types
from dlm_jax.schedules import LogLinear, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absorbing:
  """Corrupt by masking: q(xₜ | x₀) = αₜ x₀ + (1 − αₜ) mask, independently per position.

  All functions take one sequence without a batch axis; callers `vmap`.

  Attributes:
    vocab_size: V, the mask included.
    mask_id: the mask's row in the vocabulary; data never contains it.
    schedule: α(t).
    blocked: further ids that data may hold where it is given, but that are never predicted nor
      drawn: the start, end and padding of proteins.

  Reference: MDLM, arXiv 2406.07524, equations 2–10.
  """

  vocab_size: int
  mask_id: int
  schedule: Schedule = LogLinear()  # noqa: RUF009 (frozen)
  blocked: tuple[int, ...] = ()

  def __post_init__(self):
    check_types(self)
    if not 0 <= self.mask_id < self.vocab_size:
      raise InputError(f"mask_id={self.mask_id} is outside the vocabulary of {self.vocab_size}.")
    if wrong := [i for i in self.blocked if not 0 <= i < self.vocab_size or i == self.mask_id]:
      raise InputError(
        f"blocked={wrong} must be ids of the vocabulary of {self.vocab_size} other than the mask."
      )
    if len(set(self.blocked)) > self.vocab_size - 2:
      raise InputError(f"blocked={list(self.blocked)} leaves no token to predict.")

  def impossible(self, ids: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Return which ids no prediction may hold: the mask and the blocked ones."""
    return functools.reduce(operator.or_, (ids == i for i in (self.mask_id, *self.blocked)))

  def prior(self, rng: RngKey, length: int) -> IntL:
    """Return the state at t = 1: all masks. The key is unused; other processes need it."""
    del rng
    return jnp.full((length,), self.mask_id, jnp.int32)

  def corrupt(self, rng: RngKey, x0_L: IntL, t: Scalar) -> IntL:
    """Draw xₜ given clean tokens."""
    masked = jax.random.uniform(rng, x0_L.shape) < 1 - self.schedule.alpha(t)
    return jnp.where(masked, self.mask_id, x0_L)

  def clean_logits(self, logits: Float[Array, "*draws V"]) -> Float[Array, "*draws V"]:
    """Return logits in which mask and blocked ids are impossible; their softmax is p(x₀) at masks.

    For draws, which need no normalisation.
    """
    ids = jnp.arange(self.vocab_size).reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.where(self.impossible(ids), logits + NEG_INF, logits)

  def log_x0(self, logits_LV: FloatLV, xt_L: IntL) -> FloatLV:
    """Return log p(x₀ | xₜ) under SUBS: mask and blocked are impossible, revealed tokens copied.

    Impossible entries hold −1e6, which keeps 0 · log 0 finite.
    """
    log_x0_LV = jax.nn.log_softmax(self.clean_logits(logits_LV), axis=-1)
    ids_1V = jnp.arange(self.vocab_size)[None]
    copied_LV = jnp.where(ids_1V == xt_L[:, None], 0.0, NEG_INF)
    return jnp.where(xt_L[:, None] == self.mask_id, log_x0_LV, copied_LV)

  def log_estimate(self, logits_LV: FloatLV, xt_L: IntL) -> FloatLV:
    """Return what `nll` and `nll_soft` take of a network's logits: here `log_x0`."""
    return self.log_x0(logits_LV, xt_L)

  def nll(self, log_x0_LV: FloatLV, xt_L: IntL, x0_L: IntL, t: Scalar) -> FloatL:
    """Return the NELBO integrand −α'/(1 − α) · (−log p(x₀ | xₜ)) in nats, 0 where revealed."""
    # A sum over V, not a gather: that one's gradient is a scatter into a dense array of zeros.
    at_x0_LV = jnp.arange(self.vocab_size)[None] == x0_L[:, None]
    log_prob_L = jnp.sum(jnp.where(at_x0_LV, log_x0_LV, 0.0), axis=-1)
    return jnp.where(xt_L == self.mask_id, -self.schedule.weight(t) * log_prob_L, 0.0)

  def nll_soft(self, log_x0_LV: FloatLV, xt_L: IntL, p0_LV: FloatLV, t: Scalar) -> FloatL:
    """Return the same integrand for clean data on the simplex, linear in p₀.

    The entries of mask and blocked are left out: p₀ is 0 there and log p is −1e6.
    """
    ids_1V = jnp.arange(self.vocab_size)[None]
    log_x0_LV = jnp.where(self.impossible(ids_1V), 0.0, log_x0_LV)
    expected_L = jnp.sum(p0_LV * log_x0_LV, axis=-1)
    return jnp.where(xt_L == self.mask_id, -self.schedule.weight(t) * expected_L, 0.0)

  def nll_predicted(
    self, logits_LV: FloatLV, xt_L: IntL, data_logits_LV: FloatLV, data_xt_L: IntL, t: Scalar
  ) -> FloatL:
    """Return `nll_soft` for data that a network predicts, of both networks' logits.

    Args:
      logits_LV: of the network whose loss it is.
      xt_L: the state it reads.
      data_logits_LV: of the network whose prediction is the data.
      data_xt_L: the state that one read: revealed tokens are data as they are.
      t: time of xₜ.
    """
    p0_LV = jnp.exp(self.log_x0(data_logits_LV, data_xt_L))
    return self.nll_soft(self.log_estimate(logits_LV, xt_L), xt_L, p0_LV, t)

  def posterior(self, log_x0_LV: FloatLV, xt_L: IntL, s: Scalar, t: Scalar) -> FloatLV:
    """Return q(xₛ | xₜ, x₀ ~ p): masked rows reveal with probability (αₛ − αₜ)/(1 − αₜ)."""
    reveal = self.reveal_probability(s, t)
    mask_1V = jnp.arange(self.vocab_size)[None] == self.mask_id
    masked_LV = reveal * jnp.exp(log_x0_LV) + (1 - reveal) * mask_1V
    kept_LV = jax.nn.one_hot(xt_L, self.vocab_size, dtype=log_x0_LV.dtype)
    return jnp.where(xt_L[:, None] == self.mask_id, masked_LV, kept_LV)

  def reveal_probability(self, s: Scalar, t: Scalar) -> Float[Array, ""]:
    """Return (αₛ − αₜ)/(1 − αₜ): the probability that a mask is revealed between t and s."""
    alpha_s, alpha_t = self.schedule.alpha(s), self.schedule.alpha(t)
    return (alpha_s - alpha_t) / (1 - alpha_t)
