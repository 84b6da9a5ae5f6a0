# SPDX-License-Identifier: Apache-2.0
"""The NELBO integrand of the uniform process, and its gradients, in as few passes as can be.

With p the data's law, f the prediction, z the state, c = V α/(1 − α), ρ = (1 + c p)/(1 + c f) and
the rate r = −α'/(α (1 − α) (1 + c p(z))),

  n = r [ (1 − α)/V Σ (1 + c p) log ρ + ρ(z) − 1 − log ρ(z) ],
  ∂n/∂log f = −r [ α ρ f + 1_z h ],                h = c f (ρ − 1)/(1 + c f),
  ∂n/∂p     =  r [ α (1 + log ρ) ] + 1_z k,        k = c (r (ρ − 1) − n)/(1 + c p).

Automatic differentiation keeps and reads several [L, V] arrays for these. Here nothing is kept but
the arguments and numbers per position. Where both laws are softmaxes of logits (`between`), the
means that a softmax's gradient takes away are sums of the forward pass, which reads logits anyway:

  ∂n/∂logits      = r [ f (α (X + 1 − ρ) + h(z)) − 1_z h ],       X = Σ f (ρ − 1),
  ∂n/∂data logits = p [ r α (log ρ − T) + 1_z k − p(z) k(z) ],    T = Σ p log ρ.

In float32 `soft` is right to 4e-7 for one-hot data, its use; for data on the simplex, within 1e-3
of the prediction, to 20 % only, where `between` keeps its digits. Of a value that vanishes, near
t = 1, neither does; gradients are right to 1.6e-4 at all times.

The arguments of both: [L, V] float arrays, states [L], and α and α' at the time, constants.
"""

import jax
import jax.numpy as jnp

from dlm_jax.process.softmax_rows import log_probs, normaliser


@jax.custom_vjp
def soft(log_f_LV, p_LV, z_L, alpha, dalpha):
  """Return n [L] of log-probabilities and data on the simplex."""
  return _soft_forward(log_f_LV, p_LV, z_L, alpha, dalpha)[0]


def _soft_forward(log_f_LV, p_LV, z_L, alpha, dalpha):
  c = p_LV.shape[-1] * alpha / (1 - alpha)
  _, excess_LV, log_ratio_LV = _of_data(c, p_LV, log_f_LV)
  sum_L = jnp.sum((1 + c * p_LV) * log_ratio_LV, axis=-1)
  at_z = lambda x_LV: jnp.sum(jnp.where(_here(z_L, x_LV), x_LV, 0.0), axis=-1)  # noqa: E731
  rate_L = -dalpha / (alpha * (1 - alpha) * (1 + c * at_z(p_LV)))
  value_L = rate_L * ((1 - alpha) / p_LV.shape[-1] * sum_L + at_z(excess_LV - log_ratio_LV))
  return value_L, (log_f_LV, p_LV, z_L, alpha, rate_L, value_L)


def _soft_backward(residual, cotangent_L):
  log_f_LV, p_LV, z_L, alpha, rate_L, value_L = residual
  c = p_LV.shape[-1] * alpha / (1 - alpha)
  f_LV, excess_LV, log_ratio_LV = _of_data(c, p_LV, log_f_LV)
  weight_L1, value_L1 = (cotangent_L * rate_L)[:, None], (cotangent_L * value_L)[:, None]
  here_LV = _here(z_L, p_LV)
  h_LV = jnp.where(here_LV, c * excess_LV * f_LV / (1 + c * f_LV), 0.0)
  k_LV = jnp.where(here_LV, c / (1 + c * p_LV) * (weight_L1 * excess_LV - value_L1), 0.0)
  of_log_f_LV = -weight_L1 * (alpha * (1 + excess_LV) * f_LV + h_LV)
  of_p_LV = weight_L1 * alpha * (1 + log_ratio_LV) + k_LV
  return of_log_f_LV.astype(log_f_LV.dtype), of_p_LV.astype(p_LV.dtype), None, None, None


soft.defvjp(_soft_forward, _soft_backward)


@jax.custom_vjp
def between(logits_LV, data_logits_LV, z_L, alpha, dalpha):
  """Return n [L] of f = softmax(logits) and p = softmax(data_logits)."""
  return _between_forward(logits_LV, data_logits_LV, z_L, alpha, dalpha)[0]


def _between_forward(logits_LV, data_logits_LV, z_L, alpha, dalpha):
  c = logits_LV.shape[-1] * alpha / (1 - alpha)
  shift, data_shift = normaliser(logits_LV), normaliser(data_logits_LV)

  def of_logits(p, f):
    return _of_logs(c, log_probs(p, data_shift), log_probs(f, shift))

  p_LV, f_LV, excess_LV, log_ratio_LV = of_logits(data_logits_LV, logits_LV)
  total = lambda x_LV: jnp.sum(x_LV, axis=-1, keepdims=True)  # noqa: E731
  # less c Σ (p − f), which is 0: every term is positive, and of second order where p is near f
  sum_L1 = total((1 + c * p_LV) * log_ratio_LV - (1 + c * f_LV) * excess_LV)
  mean_log_ratio_L1, mean_excess_L1 = total(p_LV * log_ratio_LV), total(f_LV * excess_LV)
  at_z = lambda x_LV: jnp.take_along_axis(x_LV, z_L[:, None], axis=-1)  # noqa: E731
  p_L1, f_L1, excess_L1, log_ratio_L1 = of_logits(at_z(data_logits_LV), at_z(logits_LV))
  rate_L1 = -dalpha / (alpha * (1 - alpha) * (1 + c * p_L1))
  kl_L1 = (1 - alpha) / logits_LV.shape[-1] * sum_L1
  value_L1 = rate_L1 * (kl_L1 + excess_L1 - log_ratio_L1)
  h_L1 = c * f_L1 * excess_L1 / (1 + c * f_L1)
  k_L1 = c * (rate_L1 * excess_L1 - value_L1) / (1 + c * p_L1)
  numbers = (shift, data_shift, mean_log_ratio_L1, mean_excess_L1, p_L1, rate_L1, h_L1, k_L1)
  return value_L1[:, 0], (logits_LV, data_logits_LV, z_L, alpha, numbers)


def _between_backward(residual, cotangent_L):
  logits_LV, data_logits_LV, z_L, alpha, numbers = residual
  shift, data_shift, mean_log_ratio_L1, mean_excess_L1, at_z_L1, rate_L1, h_L1, k_L1 = numbers
  c = logits_LV.shape[-1] * alpha / (1 - alpha)
  log_p_LV, log_f_LV = (
    log_probs(data_logits_LV, data_shift),
    log_probs(logits_LV, shift),
  )
  p_LV, f_LV, excess_LV, log_ratio_LV = _of_logs(c, log_p_LV, log_f_LV)
  cotangent_L1, here_LV = cotangent_L[:, None], _here(z_L, logits_LV)
  weight_L1 = cotangent_L1 * rate_L1
  of_f_LV = alpha * (mean_excess_L1 - excess_LV) + h_L1
  of_logits_LV = weight_L1 * (f_LV * of_f_LV - jnp.where(here_LV, h_L1, 0.0))
  of_p_LV = weight_L1 * alpha * (log_ratio_LV - mean_log_ratio_L1)
  of_data_logits_LV = p_LV * (of_p_LV + cotangent_L1 * k_L1 * (here_LV - at_z_L1))
  dtypes = logits_LV.dtype, data_logits_LV.dtype
  return of_logits_LV.astype(dtypes[0]), of_data_logits_LV.astype(dtypes[1]), None, None, None


between.defvjp(_between_forward, _between_backward)


def _here(z_L, like_LV):
  return jnp.arange(like_LV.shape[-1])[None] == z_L[:, None]


def _of_data(c, p, log_f):
  """Return f, ρ − 1 and log ρ of p itself; where f is close to 1, 1 − f is read off log f."""
  f = jnp.exp(log_f)
  difference = jnp.where(f > 0.5, (p - 1) - jnp.expm1(log_f), p - f)
  return f, c * difference / (1 + c * f), _log_ratio(c, p, f, difference)


def _of_logs(c, log_p, log_f):
  """Return p, f, ρ − 1 and log ρ of two logarithms.

  ρ − 1 is made of log ρ, so that compilers store the latter alone of what the passes share.
  """
  p, f, step = jnp.exp(log_p), jnp.exp(log_f), log_p - log_f
  difference = jnp.sign(step) * jnp.maximum(p, f) * -jnp.expm1(-jnp.abs(step))
  log_ratio = _log_ratio(c, p, f, difference)
  return p, f, jnp.expm1(log_ratio), log_ratio


def _log_ratio(c, p, f, difference):
  """Return log ρ without cancellation, for the accurate difference p − f.

  The larger of ρ and 1/ρ is 1 + y, y = c |p − f|/(1 + c min(p, f)): log1p(c p) − log1p(c f) would
  keep the rounding of numbers near 18.
  """
  return jnp.sign(difference) * jnp.log1p(c * jnp.abs(difference) / (1 + c * jnp.minimum(p, f)))
