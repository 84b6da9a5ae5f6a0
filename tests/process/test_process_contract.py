# SPDX-License-Identifier: Apache-2.0
"""What every forward process promises; processes are found by listing `dlm_jax.process`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiled import Methods

from dlm_jax import process, schedules

V, L = 6, 4
METHODS = (
  "prior",
  "corrupt",
  "log_x0",
  "log_estimate",
  "nll",
  "nll_soft",
  "nll_predicted",
  "posterior",
)


def _processes():
  """Yield every exported class that corrupts tokens, built with a vocabulary of six."""
  for name in process.__all__:
    kind = getattr(process, name)
    if not (dataclasses.is_dataclass(kind) and hasattr(kind, "corrupt")):
      continue
    fields = {field.name for field in dataclasses.fields(kind)}
    options = {"vocab_size": V, "schedule": schedules.LogLinear()}
    if "mask_id" in fields:
      options["mask_id"] = 2
    yield pytest.param(kind(**{k: v for k, v in options.items() if k in fields}), id=name)


every_process = pytest.mark.parametrize("proc", list(_processes()))
CLEAN = jnp.array([0, 1, 3, 5])  # never the mask
TIMES = (0.01, 1.0)


def _logits(seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(L, V)) * 3, jnp.float32)


def test_the_listing_finds_every_process():
  assert {param.id for param in _processes()} >= {"Absorbing", "AbsorbingScore", "Uniform"}


@every_process
def test_public_methods_have_docstrings(proc):
  for name in METHODS:
    assert callable(getattr(proc, name))
    assert getattr(type(proc), name).__doc__, name
  assert type(proc).__doc__


@every_process
def test_frozen_keyword_only_and_hashable(proc):
  with pytest.raises(dataclasses.FrozenInstanceError):
    proc.vocab_size = 3
  with pytest.raises(TypeError):
    type(proc)(V)
  assert hash(proc) == hash(dataclasses.replace(proc))
  static = jax.jit(lambda p, t: p.schedule.alpha(t), static_argnums=0)
  assert 0 < static(proc, 0.5) < 1


@every_process
@pytest.mark.parametrize("t", TIMES)
def test_shapes_ids_and_dtypes(proc, t):
  proc = Methods(proc)
  prior = proc.prior(jax.random.key(0), L)
  xt = proc.corrupt(jax.random.key(1), CLEAN, t)
  for tokens in (prior, xt):
    assert tokens.shape == (L,)
    assert tokens.dtype == jnp.int32
    assert np.all((tokens >= 0) & (tokens < V))
  log_x0 = proc.log_x0(_logits(), xt)
  assert log_x0.shape == (L, V) and log_x0.dtype == jnp.float32
  np.testing.assert_allclose(jnp.exp(log_x0).sum(axis=-1), 1.0, rtol=1e-5)
  assert proc.nll(log_x0, xt, CLEAN, t).shape == (L,)
  assert proc.nll_soft(log_x0, xt, jax.nn.one_hot(CLEAN, V), t).shape == (L,)


@every_process
def test_no_noise_near_zero(proc):
  keys = jax.random.split(jax.random.key(0), 64)
  xt = jax.vmap(lambda key: proc.corrupt(key, CLEAN, 0.0))(keys)
  np.testing.assert_array_equal(xt, np.broadcast_to(CLEAN, xt.shape))


@every_process
@pytest.mark.parametrize("s,t", [(0.0, 0.5), (0.2, 0.21), (0.4, 1.0)])
def test_posterior_rows_are_distributions(proc, s, t):
  proc = Methods(proc)
  xt = proc.corrupt(jax.random.key(1), CLEAN, t)
  rows = np.asarray(proc.posterior(proc.log_x0(_logits(), xt), xt, s, t))
  assert rows.shape == (L, V)
  assert rows.min() >= -1e-7
  np.testing.assert_allclose(rows.sum(axis=-1), 1.0, rtol=1e-5)


@every_process
def test_posterior_over_no_time_changes_nothing(proc):
  proc = Methods(proc)
  xt = proc.corrupt(jax.random.key(1), CLEAN, 0.5)
  rows = proc.posterior(proc.log_x0(_logits(), xt), xt, 0.5, 0.5)
  np.testing.assert_allclose(rows, jax.nn.one_hot(xt, V), atol=1e-5)


@every_process
def test_posterior_given_the_truth_retraces_the_forward_process(proc):
  """corrupt to t, then draw x_s from the posterior at the true x₀: the law of corrupt to s."""
  s, t, samples = 0.3, 0.7, 20_000
  truth = jnp.where(jax.nn.one_hot(CLEAN, V) > 0, 0.0, -1e6)

  @jax.jit
  @jax.vmap
  def both(key):
    forward, noise, back = jax.random.split(key, 3)
    xt = proc.corrupt(noise, CLEAN, t)
    rows = proc.posterior(truth, xt, s, t)
    cdf = jnp.cumsum(rows, axis=-1)
    xs = jnp.sum(cdf <= jax.random.uniform(back, (L, 1)) * cdf[:, -1:], axis=-1)
    return xs, proc.corrupt(forward, CLEAN, s)

  back, forward = both(jax.random.split(jax.random.key(4), samples))
  for position in range(L):
    counts = np.stack([np.bincount(x[:, position], minlength=V) for x in (back, forward)])
    counts = counts[:, counts.sum(axis=0) > 0]
    assert scipy.stats.chi2_contingency(counts).pvalue > 1e-4


@every_process
@pytest.mark.parametrize("t", TIMES)
def test_losses_are_finite_nonnegative_and_zero_for_the_truth(proc, t):
  proc = Methods(proc)
  xt = proc.corrupt(jax.random.key(1), CLEAN, t)
  nll = np.asarray(proc.nll(proc.log_x0(_logits(), xt), xt, CLEAN, t))
  assert np.isfinite(nll).all() and nll.min() >= -1e-5
  truth = jnp.where(jax.nn.one_hot(CLEAN, V) > 0, 0.0, -1e6)
  np.testing.assert_allclose(proc.nll(truth, xt, CLEAN, t), 0.0, atol=1e-5)


@every_process
@pytest.mark.parametrize("t", TIMES)
def test_soft_loss_of_certain_data_is_the_loss(proc, t):
  proc = Methods(proc)
  xt = proc.corrupt(jax.random.key(1), CLEAN, t)
  log_x0 = proc.log_x0(_logits(), xt)
  soft = proc.nll_soft(log_x0, xt, jax.nn.one_hot(CLEAN, V), t)
  np.testing.assert_allclose(soft, proc.nll(log_x0, xt, CLEAN, t), rtol=1e-4, atol=1e-5)


@every_process
@pytest.mark.parametrize("t", TIMES)
def test_loss_of_predicted_data(proc, t):
  """Of two networks' logits: the soft loss of what the second predicts, and its gradients."""
  proc = Methods(proc)
  xt, data_xt = (proc.corrupt(jax.random.key(i), CLEAN, t) for i in (1, 2))
  logits, data_logits = _logits(), _logits() * jnp.linspace(-1, 2, V)[None]

  def soft(logits, data_logits):
    p0 = jnp.exp(proc.log_x0(data_logits, data_xt))
    return proc.nll_soft(proc.log_estimate(logits, xt), xt, p0, t)

  predicted = lambda x, y: proc.nll_predicted(x, xt, y, data_xt, t)  # noqa: E731
  np.testing.assert_allclose(
    predicted(logits, data_logits), soft(logits, data_logits), rtol=1e-4, atol=1e-6
  )
  gradients = [
    jax.jit(jax.grad(lambda x, y, f=f: f(x, y).sum(), argnums=(0, 1)))(logits, data_logits)
    for f in (predicted, soft)
  ]
  for ours, wanted in zip(*gradients, strict=True):
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@every_process
def test_gradients_are_finite(proc):
  proc = Methods(proc)

  def loss(logits, p0, t):
    xt = proc.corrupt(jax.random.key(1), CLEAN, t)
    log_x0 = proc.log_x0(logits, xt)
    return proc.nll(log_x0, xt, CLEAN, t).sum() + proc.nll_soft(log_x0, xt, p0, t).sum()

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
  for t in TIMES:
    for gradient in gradients(_logits() * 20, jax.nn.one_hot(CLEAN, V), t):
      assert np.isfinite(gradient).all()


@every_process
def test_jit_vmap_and_python_times_agree(proc):
  def everything(key, x0, t):
    xt = proc.corrupt(key, x0, t)
    log_x0 = proc.log_x0(_logits(), xt)
    return xt, proc.nll(log_x0, xt, x0, t), proc.posterior(log_x0, xt, t / 2, t)

  keys = jax.random.split(jax.random.key(9), 3)
  x0 = jnp.stack([CLEAN, CLEAN[::-1], CLEAN])
  batched = jax.jit(jax.vmap(everything))(keys, x0, jnp.array([0.2, 0.5, 0.9], jnp.float32))
  for i, t in enumerate((0.2, 0.5, 0.9)):
    for got, expected in zip(batched, everything(keys[i], x0[i], t), strict=True):
      np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-6)


@every_process
def test_no_key_is_used_twice(proc):
  with jax.debug_key_reuse(True):
    proc.corrupt(jax.random.key(0), CLEAN, 0.5)
    proc.prior(jax.random.key(0), L)
