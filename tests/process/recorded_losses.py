# SPDX-License-Identifier: Apache-2.0
"""Recorded losses of a process: α, log p(x₀), nats per token, the gradient of their mean."""

import jax
import jax.numpy as jnp
import numpy as np


def check(proc, vectors, nll_name, *, nll_atol, gradient_atol):
  """Compare a process with a file's arrays; the gradient's tolerance is of its largest entry."""
  logits, xt, x0, t = (jnp.asarray(vectors[name]) for name in ("logits", "xt", "x0", "t"))
  np.testing.assert_allclose(proc.schedule.alpha(t), vectors["alpha_t"][:, 0], atol=1e-7)
  log_x0 = jax.vmap(proc.log_x0)(logits, xt)
  np.testing.assert_allclose(log_x0, vectors["log_x_theta"], rtol=2e-5, atol=2e-5)

  def mean_nll(logits):
    nll = jax.vmap(proc.nll)(jax.vmap(proc.log_estimate)(logits, xt), xt, x0, t)
    return nll.mean(), nll

  gradient, nll = jax.jit(jax.grad(mean_nll, has_aux=True))(logits)
  np.testing.assert_allclose(nll, vectors[nll_name], rtol=1e-5, atol=nll_atol)
  wanted = vectors["grad_mean_nll_wrt_logits"]
  atol = gradient_atol * np.abs(wanted).max()
  np.testing.assert_allclose(gradient, wanted, rtol=2e-5, atol=atol)
