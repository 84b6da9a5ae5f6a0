# SPDX-License-Identifier: Apache-2.0
"""Score entropy of the absorbing process against the masked loss and SEDD's form of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Methods

from dlm_jax import process, schedules

SCHEDULES = {
  "log_linear": schedules.LogLinear(),
  "cosine": schedules.Cosine(eps=0.01),
  "polynomial": schedules.Polynomial(power=2.0),
}
every_schedule = pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))
V, MASK = 5, 2
XT = np.array([MASK, 0, MASK, MASK, 4])
X0 = np.array([1, 0, 3, 4, 4])
TOKENS = np.arange(V) != MASK
SHIFT = np.log(V - 1)  # logits = log f + log(V − 1)


def _pair(schedule):
  options = {"vocab_size": V, "mask_id": MASK, "schedule": schedule}
  return Methods(process.AbsorbingScore(**options)), Methods(process.Absorbing(**options))


def _logits(seed, scale=1.5):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(len(XT), V)) * scale)


def _simplex(seed):
  rows = np.random.default_rng(seed).dirichlet(np.ones(V), size=len(XT))
  rows[:, MASK] = 0
  return rows / rows.sum(axis=1, keepdims=True)


@every_schedule
def test_normalised_score_gives_the_masked_loss(schedule):
  with jax.enable_x64(True):
    score, masked = _pair(schedule)
    log_x0 = masked.log_x0(_logits(0), jnp.asarray(XT))
    np.testing.assert_array_equal(score.log_x0(_logits(0), jnp.asarray(XT)), log_x0)
    args = log_x0, jnp.asarray(XT)
    p0 = jnp.asarray(_simplex(1))
    for t in (0.1, 0.9):
      np.testing.assert_allclose(
        score.nll(*args, jnp.asarray(X0), t), masked.nll(*args, jnp.asarray(X0), t), atol=1e-12
      )
      soft = masked.nll_soft(*args, p0, t)
      np.testing.assert_allclose(score.nll_soft(*args, p0, t), soft, atol=1e-12)
      assert np.abs(soft[0]) > 0.1


@every_schedule
def test_loss_by_hand(schedule):
  """−α'/(1 − α) [Σ_y f_y − 1 − log f_{x₀}], not normalised; 0 where revealed."""
  with jax.enable_x64(True):
    score, _ = _pair(schedule)
    logits, xt, t = _logits(2), jnp.asarray(XT), 0.3
    ours = score.nll(score.log_estimate(logits, xt), xt, jnp.asarray(X0), t)
    weight = -float(schedule.dalpha(t)) / (1 - float(schedule.alpha(t)))
    values = np.asarray(logits) - SHIFT
    total = np.exp(values[:, TOKENS]).sum(axis=1) - 1 - values[np.arange(len(XT)), X0]
    np.testing.assert_allclose(ours, np.where(XT == MASK, weight * total, 0.0), rtol=1e-10)
    # the minimum over f is at the truth, where nothing is left
    truth = jnp.where(jax.nn.one_hot(X0, V) > 0, 0.0, -1e6)
    np.testing.assert_allclose(score.nll(truth, xt, jnp.asarray(X0), t), 0.0, atol=1e-12)


def test_soft_loss_is_linear_and_agrees_with_the_hard_one():
  with jax.enable_x64(True):
    score, _ = _pair(schedules.LogLinear())
    xt = jnp.asarray(XT)
    log_f = score.log_estimate(_logits(3), xt)
    p, q = _simplex(4), _simplex(5)
    soft = lambda rows: np.asarray(score.nll_soft(log_f, xt, jnp.asarray(rows), 0.4))  # noqa: E731
    np.testing.assert_allclose(soft(0.3 * p + 0.7 * q), 0.3 * soft(p) + 0.7 * soft(q), atol=1e-12)
    assert np.abs(soft(p) - soft(q)).max() > 0.1
    np.testing.assert_allclose(
      soft(np.eye(V)[X0]), score.nll(log_f, xt, jnp.asarray(X0), 0.4), atol=1e-12
    )


def _log_score(score, logits, xt, t):
  """Return log s of moving from the mask to each token; −1e6 for impossible moves."""
  alpha, log_f = score.schedule.alpha(t), score.log_estimate(logits, xt)
  return jnp.where(log_f > -5e5, log_f + jnp.log(alpha / (1 - alpha)), -1e6)


@every_schedule
def test_log_score(schedule):
  """log s = log(α/(1 − α)) + log f at moves out of the mask; the mask itself is no move."""
  score, _ = _pair(schedule)
  logits, xt, t = _logits(6).astype(jnp.float32), jnp.asarray(XT), 0.35
  log_s = np.asarray(_log_score(score, logits, xt, t))
  alpha = float(schedule.alpha(t))
  masked = XT == MASK
  wanted = np.asarray(logits) - SHIFT + np.log(alpha / (1 - alpha))
  np.testing.assert_allclose(
    log_s[masked][:, TOKENS], wanted[masked][:, TOKENS], rtol=1e-5, atol=1e-6
  )
  assert np.all(log_s[masked][:, MASK] == -1e6)
  # the true ratio q(y | x₀)/q(mask | x₀) is α/(1 − α) at y = x₀: logits 0 and −∞
  truth = jnp.where(jax.nn.one_hot(X0, V) > 0, SHIFT, -1e6)
  s = np.exp(_log_score(score, truth, xt, t))
  np.testing.assert_allclose(s[masked], alpha / (1 - alpha) * np.eye(V)[X0][masked], rtol=1e-5)


@every_schedule
def test_gap_between_teacher_and_fake(schedule):
  """IDLM, appendix A: σ_t Σ_{y≠m} [s*_y − sᶠ_y − r G_y (log s*_y − log sᶠ_y)], r = α/(1 − α).

  σ_t = dσ̄/dt with e^(−σ̄) = α, so σ_t = −α'/α; G is the student's distribution.
  """
  with jax.enable_x64(True):
    score, _ = _pair(schedule)
    teacher, fake, xt = _logits(7), _logits(8), jnp.asarray(XT)
    student = _simplex(9)
    for t in (0.05, 0.5, 0.95):
      alpha = float(schedule.alpha(t))
      rate, ratio = -float(schedule.dalpha(t)) / alpha, alpha / (1 - alpha)
      log_t, log_f = (np.asarray(_log_score(score, x, xt, t))[:, TOKENS] for x in (teacher, fake))
      gap = np.exp(log_t) - np.exp(log_f) - ratio * student[:, TOKENS] * (log_t - log_f)
      wanted = np.where(XT == MASK, rate * gap.sum(axis=1), 0.0)
      soft = lambda x, t=t: score.nll_soft(  # noqa: E731
        score.log_estimate(x, xt), xt, jnp.asarray(student), t
      )
      np.testing.assert_allclose(soft(teacher) - soft(fake), wanted, rtol=1e-9, atol=1e-10)


def test_score_entropy_is_smallest_at_the_data_and_its_gradient_is_finite():
  """In the logits of a masked row the gradient is weight · (f − p₀): unnormalised."""
  score, _ = _pair(schedules.LogLinear())
  xt, p0 = jnp.asarray(XT), jnp.asarray(_simplex(10), jnp.float32)
  logits = _logits(11).astype(jnp.float32)

  def loss(logits):
    return score.nll_soft(score.log_estimate(logits, xt), xt, p0, 0.5).sum()

  gradient_of = jax.jit(jax.grad(loss))
  gradient = np.asarray(gradient_of(logits))
  wanted = 2.0 * (np.exp(logits - SHIFT) - np.asarray(p0)) * TOKENS
  masked = XT == MASK
  np.testing.assert_allclose(gradient[masked], wanted[masked], rtol=1e-4, atol=1e-5)
  assert np.all(gradient[~masked] == 0)
  best = np.asarray(gradient_of(jnp.log(jnp.maximum(p0, 1e-30)) + SHIFT))
  np.testing.assert_allclose(best, 0.0, atol=1e-5)


def test_a_network_of_zeros_is_the_uniform_distribution():
  """Σf = 1 at the start of training, whatever the vocabulary."""
  score = Methods(process.AbsorbingScore(vocab_size=50_258, mask_id=50_257))
  f = np.exp(score.log_estimate(jnp.zeros((1, 50_258)), jnp.array([50_257])))
  np.testing.assert_allclose(f.sum(), 1.0, rtol=1e-5)
  assert f[0, -1] == 0
