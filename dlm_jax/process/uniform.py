# SPDX-License-Identifier: Apache-2.0
"""The uniform forward process: a token survives or becomes a uniformly drawn one."""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax.arrays import FloatL, FloatLV, IntL, RngKey, Scalar
from dlm_jax.errors import InputError
from dlm_jax.fields import check_types
from dlm_jax.process import _uniform_nelbo as nelbo
from dlm_jax.schedules import LogLinear, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
  """Corrupt by replacement: q(xₜ | x₀) = αₜ x₀ + (1 − αₜ)/V, independently per position.

  The replacement may repeat the token. No token is special, so a sampler can correct what it has
  set; every position carries loss and every position is drawn again at every step.

  All functions take one sequence without a batch axis; callers `vmap`.

  Attributes:
    vocab_size: V.
    schedule: α(t).

  Reference: UDLM, arXiv 2412.10193; Duo, arXiv 2506.10892, equations 2–6.
  """

  vocab_size: int
  schedule: Schedule = LogLinear()  # noqa: RUF009 (frozen)

  def __post_init__(self):
    check_types(self)
    if self.vocab_size < 2:
      raise InputError(f"vocab_size={self.vocab_size}: a uniform process needs at least 2 tokens.")

  def prior(self, rng: RngKey, length: int) -> IntL:
    """Draw the state at t = 1: independent uniform tokens."""
    return jax.random.randint(rng, (length,), 0, self.vocab_size, jnp.int32)

  def corrupt(self, rng: RngKey, x0_L: IntL, t: Scalar) -> IntL:
    """Draw xₜ given clean tokens."""
    rng_which, rng_token = jax.random.split(rng)
    replaced = jax.random.uniform(rng_which, x0_L.shape) < 1 - self.schedule.alpha(t)
    return jnp.where(replaced, self.prior(rng_token, x0_L.shape[0]), x0_L)

  def log_x0(self, logits_LV: FloatLV, xt_L: IntL) -> FloatLV:
    """Return log p(x₀): a plain log-softmax; the state excludes nothing.

    What minimises the loss at a position is the law of its token given the *other* positions'
    states: `nll` and `posterior` bring in the evidence of its own.
    """
    del xt_L
    return jax.nn.log_softmax(logits_LV, axis=-1)

  def log_estimate(self, logits_LV: FloatLV, xt_L: IntL) -> FloatLV:
    """Return what `nll` and `nll_soft` take of a network's logits: here `log_x0`."""
    return self.log_x0(logits_LV, xt_L)

  def nll(self, log_x0_LV: FloatLV, xt_L: IntL, x0_L: IntL, t: Scalar) -> FloatL:
    """Return the NELBO integrand in nats for clean tokens; see `nll_soft`."""
    p0_LV = jax.nn.one_hot(x0_L, self.vocab_size, dtype=log_x0_LV.dtype)
    return self.nll_soft(log_x0_LV, xt_L, p0_LV, t)

  def nll_soft(self, log_x0_LV: FloatLV, xt_L: IntL, p0_LV: FloatLV, t: Scalar) -> FloatL:
    """Return the NELBO integrand for clean data on the simplex.

    With q = αp₀ + (1 − α)/V, q^θ the same of the prediction f and z the state, it is

      −α'/(V α q(z)) · [ KL(q‖q^θ) + r − 1 − log r ],   r = q(z)/q^θ(z):

    a KL and an Itakura–Saito term, algebraically the published formula; with c = Vα/(1 − α) the
    ratios are (1 + c p₀)/(1 + c f), formed so that float32 keeps six digits at V = 50,258 where the
    direct formula needs float64. Differentiable in p₀ as well; reverse mode
    only, and constant in t.

    Reference: Duo, arXiv 2506.10892, appendix; in this form IDLM, arXiv 2602.19066, appendix C.
    """
    return nelbo.soft(log_x0_LV, p0_LV, xt_L, self.schedule.alpha(t), self.schedule.dalpha(t))

  def nll_predicted(
    self, logits_LV: FloatLV, xt_L: IntL, data_logits_LV: FloatLV, data_xt_L: IntL, t: Scalar
  ) -> FloatL:
    """Return the NELBO integrand for data that a network predicts, of both networks' logits.

    `nll_soft(log_estimate(logits), xₜ, softmax(data_logits), t)`, differentiable in both logits.

    Args:
      logits_LV: of the network whose loss it is.
      xt_L: the state it reads.
      data_logits_LV: of the network whose prediction is the data.
      data_xt_L: the state that one read; it says nothing here.
      t: time of xₜ.
    """
    del data_xt_L
    alpha, dalpha = self.schedule.alpha(t), self.schedule.dalpha(t)
    return nelbo.between(logits_LV, data_logits_LV, xt_L, alpha, dalpha)

  def posterior(self, log_x0_LV: FloatLV, xt_L: IntL, s: Scalar, t: Scalar) -> FloatLV:
    """Return q(xₛ | xₜ, x₀ ~ p), rows summing to 1 within rounding.

    [V αₜ x⊙p + (αₜ/αₛ − αₜ) x + (αₛ − αₜ) p + (1 − αₜ/αₛ)(1 − αₛ)/V] / [V αₜ p(x) + 1 − αₜ]

    with x the one-hot state: the reverse of the forward chain, averaged over x₀ ~ p jointly.
    """
    size = self.vocab_size
    alpha_s, alpha_t = self.schedule.alpha(s), self.schedule.alpha(t)
    ratio = alpha_t / alpha_s
    p_LV, x_LV = jnp.exp(log_x0_LV), self._one_hot(xt_L, log_x0_LV.dtype)
    p_at_x_L1 = jnp.sum(p_LV * x_LV, axis=-1, keepdims=True)
    stay_LV = x_LV * (size * alpha_t * p_at_x_L1 + (ratio - alpha_t))
    move_LV = (alpha_s - alpha_t) * p_LV + (1 - ratio) * (1 - alpha_s) / size
    return (stay_LV + move_LV) / (size * alpha_t * p_at_x_L1 + 1 - alpha_t)

  def _one_hot(self, ids_L, dtype):
    return jax.nn.one_hot(ids_L, self.vocab_size, dtype=dtype)
