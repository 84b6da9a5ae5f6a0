# SPDX-License-Identifier: Apache-2.0
"""The uniform process against enumeration (V ≤ 5, L ≤ 3), the published loss and golden vectors."""

import dataclasses
import itertools

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded_losses
import scipy.stats
from compiled import Methods

from dlm_jax import process, schedules

FOLLOWS, DIFFERS = 1e-4, 1e-6
SCHEDULES = {
  "log_linear": schedules.LogLinear(),
  "cosine": schedules.Cosine(eps=0.01),
  "polynomial": schedules.Polynomial(power=2.0),
  "duality": process.GaussianDuality(vocab_size=4, gamma_min=-3.0, gamma_max=2.0).process.schedule,
}
every_schedule = pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))
f64 = lambda x: np.asarray(x, np.float64)  # noqa: E731


def _uniform(**options):
  return Methods(process.Uniform(**options))


def _marginal(p0, alpha):
  """Return q(x_t | x0 ~ p0) as a row."""
  return alpha * p0 + (1 - alpha) / len(p0)


def _transition(xs, ratio, vocabulary):
  """Return q(x_t | x_s) of one token: survive with α_t/α_s, else draw from all V."""
  return _marginal(np.eye(vocabulary)[xs], ratio)


def _bayes(p0, xt, alpha_s, alpha_t):
  """Return q(x_s | x_t) ∝ Σ_{x0} p0(x0) q(x_s | x0) q(x_t | x_s), by enumeration."""
  vocabulary = len(p0)
  joint = np.zeros(vocabulary)
  for x0, xs in itertools.product(range(vocabulary), repeat=2):
    move = _transition(xs, alpha_t / alpha_s, vocabulary)[xt]
    joint[xs] += p0[x0] * _marginal(np.eye(vocabulary)[x0], alpha_s)[xs] * move
  return joint / joint.sum()


def _published(log_f, z, p0, alpha, dalpha):
  """Return Duo's integrand per position, with x̄ = V α x + 1 − α.

  In NumPy's long double: the form divides a difference of order α by α.
  """
  size, rows = p0.shape[-1], np.arange(len(z))
  log_f, p0, alpha, dalpha = (np.asarray(x, np.longdouble) for x in (log_f, p0, alpha, dalpha))
  bar, bar_f = (size * alpha * x + 1 - alpha for x in (p0, np.exp(log_f)))
  bar_z, bar_f_z = bar[rows, z][:, None], bar_f[rows, z][:, None]
  inner = np.log(bar_f_z) - np.log(bar_f) + np.log(bar) - np.log(bar_z)
  terms = size / bar_z - size / bar_f_z
  total = terms[:, 0] - np.sum(bar / bar_z * inner, axis=-1)
  return dalpha / (size * alpha) * total


def _kl_and_is(log_f, z, p0, alpha, dalpha):
  """Return σ_t/q(z) · (KL, Itakura–Saito) per position in float64 NumPy."""
  size, rows = p0.shape[-1], np.arange(len(z))
  q, q_f = (alpha * x + (1 - alpha) / size for x in (p0, np.exp(log_f)))
  kl = np.sum(q * np.log(q / q_f), axis=-1)
  r = q[rows, z] / q_f[rows, z]
  rate = -dalpha / (size * alpha) / q[rows, z]
  return rate * kl, rate * (r - 1 - np.log(r))


def _random(vocabulary, length, seed, scale=2.0):
  """Return float64 log-probabilities, states and data on the simplex."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(length, vocabulary)) * scale
  log_f = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  p0 = rng.dirichlet(np.full(vocabulary, 0.5), size=length)
  return log_f, rng.integers(0, vocabulary, length).astype(np.int32), p0


# --- corrupt ------------------------------------------------------------------------------------


def _chi_square(tokens, law):
  """Return the p-value of `tokens` [N, L] under a `law` over all V^L states."""
  vocabulary = round(len(law) ** (1 / tokens.shape[1]))
  code = tokens @ vocabulary ** np.arange(tokens.shape[1])[::-1]
  observed = np.bincount(code, minlength=len(law))
  return scipy.stats.chisquare(observed, law * len(tokens)).pvalue


def _law(rows, alpha):
  law = np.ones(1)
  for row in rows:
    law = np.outer(law, _marginal(row, alpha)).ravel()
  return law


@every_schedule
def test_law_of_corrupt(schedule):
  """Independent positions; a replacement may repeat the token."""
  proc = _uniform(vocab_size=4, schedule=schedule)
  x0_L = jnp.array([1, 3, 1])
  rows = np.eye(4)[np.asarray(x0_L)]
  for _, tokens, alpha in draws.corrupted(proc, x0_L, (0.25, 0.5, 0.8), 40_000):
    assert _chi_square(tokens, _law(rows, alpha)) > FOLLOWS
    assert _chi_square(tokens, _law(rows, alpha - 0.03)) < DIFFERS
    # a replacement that cannot repeat the token would survive less often
    assert _chi_square(tokens, _law(rows, alpha - (1 - alpha) / 3)) < DIFFERS


def test_law_of_the_prior():
  proc = _uniform(vocab_size=5)
  draw = jax.jit(jax.vmap(lambda key: proc.prior(key, 3)))
  tokens = np.asarray(draw(jax.random.split(jax.random.key(0), 40_000)))
  assert tokens.dtype == np.int32
  assert _chi_square(tokens, np.full(125, 1 / 125)) > FOLLOWS


# --- posterior --------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("vocabulary", [2, 3, 4])
@pytest.mark.parametrize("s,t", [(0.2, 0.25), (0.0, 0.9), (0.4, 1.0)])
def test_posterior_is_brute_force_bayes(schedule, vocabulary, s, t):
  """Every x₀ and x_t: q(x_s | x_t, x₀) ∝ q(x_t | x_s) q(x_s | x₀)."""
  with jax.enable_x64(True):
    proc = _uniform(vocab_size=vocabulary, schedule=schedule)
    alpha_s, alpha_t = float(schedule.alpha(s)), float(schedule.alpha(t))
    xt_L = jnp.arange(vocabulary)  # one position per value of x_t
    for x0 in range(vocabulary):
      truth = np.eye(vocabulary)[x0]
      log_x0_LV = jnp.asarray(np.where(truth > 0, 0.0, -1e6))[None].repeat(vocabulary, 0)
      ours = proc.posterior(log_x0_LV, xt_L, s, t)
      wanted = [_bayes(truth, xt, alpha_s, alpha_t) for xt in range(vocabulary)]
      np.testing.assert_allclose(ours, wanted, atol=1e-12)


@every_schedule
def test_posterior_of_a_prediction_takes_it_as_the_law_of_clean_tokens(schedule):
  """Published form: p replaces x₀ in numerator and denominator, as if p were the data's law.

  That is Bayes over (x₀, x_s) with prior p on x₀, and not the average of q(x_s | x_t, x₀) over p.
  """
  with jax.enable_x64(True):
    size, s, t = 4, 0.3, 0.6
    proc = _uniform(vocab_size=size, schedule=schedule)
    alpha_s, alpha_t = float(schedule.alpha(s)), float(schedule.alpha(t))
    log_f, _, _ = _random(size, 1, seed=3)
    p = np.exp(log_f[0])
    ours = proc.posterior(jnp.asarray(log_f).repeat(size, 0), jnp.arange(size), s, t)
    wanted = [_bayes(p, xt, alpha_s, alpha_t) for xt in range(size)]
    np.testing.assert_allclose(ours, wanted, atol=1e-12)
    np.testing.assert_allclose(ours.sum(axis=-1), 1.0, atol=1e-12)
    average = np.array(
      [
        sum(p[x0] * _bayes(np.eye(size)[x0], xt, alpha_s, alpha_t) for x0 in range(size))
        for xt in range(size)
      ]
    )
    assert np.abs(ours - average).max() > 1e-2


def test_posterior_rows_sum_to_one_at_full_vocabulary():
  proc = _uniform(vocab_size=50_258)
  logits = jax.random.normal(jax.random.key(0), (4, 50_258)) * 5
  xt = logits.argmax(-1).astype(jnp.int32).at[:2].set(7)
  rows = jax.jit(proc.posterior)(proc.log_x0(logits, xt), xt, 0.45, 0.5)
  assert rows.min() >= 0
  np.testing.assert_allclose(f64(rows).sum(-1), 1.0, rtol=2e-6)


# --- the loss against other forms of it ---------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("data", ["one_hot", "simplex"])
def test_loss_is_the_published_form(schedule, data):
  """KL + Itakura–Saito equals the x̄ form in float64."""
  with jax.enable_x64(True):
    proc = _uniform(vocab_size=4, schedule=schedule)
    log_f, z, p0 = _random(4, 200, seed=1)
    tokens = np.random.default_rng(8).integers(0, 4, 200)
    if data == "one_hot":
      p0 = np.eye(4)[tokens]
    for t in (0.02, 0.3, 0.7, 1.0):
      alpha, dalpha = float(schedule.alpha(t)), float(schedule.dalpha(t))
      ours = proc.nll_soft(jnp.asarray(log_f), jnp.asarray(z), jnp.asarray(p0), t)
      wanted = f64(_published(log_f, z, p0, alpha, dalpha))
      np.testing.assert_allclose(ours, wanted, rtol=1e-12, atol=1e-12)
      if data == "one_hot":
        hard = proc.nll(jnp.asarray(log_f), jnp.asarray(z), jnp.asarray(tokens), t)
        np.testing.assert_allclose(hard, wanted, rtol=1e-12, atol=1e-12)


def test_difference_of_two_losses_drops_the_entropy():
  """What a student minimises, IDLM section 2: q log q cancels between teacher and fake."""
  with jax.enable_x64(True):
    proc, size, length = _uniform(vocab_size=6), 6, 100
    teacher, z, p0 = _random(size, length, seed=4)
    fake, _, _ = _random(size, length, seed=5)
    for t in (0.05, 0.5, 1.0):
      alpha, dalpha = float(proc.schedule.alpha(t)), float(proc.schedule.dalpha(t))
      q, q_t, q_f = (alpha * x + (1 - alpha) / size for x in (p0, np.exp(teacher), np.exp(fake)))
      rows = np.arange(length)
      at_z, t_z, f_z = (x[rows, z] for x in (q, q_t, q_f))
      cross = np.sum(q * (np.log(q_f) - np.log(q_t)), axis=-1)
      rate = -dalpha / (size * alpha)
      wanted = rate / at_z * (cross + at_z * (1 / t_z - 1 / f_z) + np.log(t_z / f_z))
      soft = lambda log_f, t=t: proc.nll_soft(*map(jnp.asarray, (log_f, z, p0)), t)  # noqa: E731
      np.testing.assert_allclose(soft(teacher) - soft(fake), wanted, rtol=1e-10, atol=1e-10)


def test_gradients_follow_finite_differences():
  """In the prediction and, off the simplex too, in the clean data (through 1/q(z) as well)."""
  with jax.enable_x64(True):
    proc = _uniform(vocab_size=5)
    log_f, z, p0 = (jnp.asarray(x) for x in _random(5, 3, seed=2))
    p0 = 0.9 * p0 + 0.02

    @jax.jit
    def loss(log_f, p0):
      return proc.nll_soft(log_f, z, p0, 0.4).sum()

    for which, gradient in enumerate(jax.jit(jax.grad(loss, argnums=(0, 1)))(log_f, p0)):
      for place in itertools.product(range(3), range(5)):
        step = 1e-5
        moved = [[log_f, p0], [log_f, p0]]
        moved[0][which] = moved[0][which].at[place].add(step)
        moved[1][which] = moved[1][which].at[place].add(-step)
        slope = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.02, 0.7, 0.98])
def test_loss_of_two_networks_logits(alpha):
  """Of softmaxes of logits: the same value, and gradients in closed form, cotangents included."""
  with jax.enable_x64(True):
    proc = _uniform(vocab_size=6, schedule=_At(alpha, jnp.float64))
    rng = np.random.default_rng(7)
    logits, data, z, weight = (
      jnp.asarray(x)
      for x in (*rng.normal(size=(2, 40, 6)) * 3, rng.integers(0, 6, 40), rng.normal(size=40))
    )

    def closed(logits, data):
      return jnp.sum(weight * proc.nll_predicted(logits, z, data, z, 0.5))

    def plain(logits, data):
      log_f = proc.log_estimate(logits, z)
      return jnp.sum(weight * proc.nll_soft(log_f, z, jax.nn.softmax(data), 0.5))

    ours, wanted = (
      jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(logits, data) for f in (closed, plain)
    )
    for a, b in zip(*map(jax.tree.leaves, (ours, wanted)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["log_linear", "cosine", "polynomial"])
def test_nelbo_of_an_exact_denoiser_is_the_entropy(name):
  """∫₀¹ Σ_l E[nll_l] dt = H(x₀) − I(x₀; x₁) over two dependent tokens: the weight is right.

  The reverse chain started at the true law of x₁ draws the data if every rate is the true one, and
  then −E log p(x₀) = E[∫ Σ nll dt] + E KL(q(x₁ | x₀) ‖ p(x₁)) with equality; the last term is the
  mutual information left at t = 1. The true rates ask for the law of a clean token given the
  *other* positions: q^θ = αf + (1 − α)/V already holds what the position's own state tells. With
  one position the best f is the law of the data, whatever x_t.
  """
  schedule, size = SCHEDULES[name], 3
  data = np.random.default_rng(6).dirichlet(np.full(9, 0.5)).reshape(3, 3)
  nodes, weights = np.polynomial.legendre.leggauss(60)
  u, weights = (nodes + 1) / 2, weights / 2
  times, weights = u**2, weights * 2 * u  # t log t at 0
  entropy = -np.sum(data * np.log(data))
  tokens = np.array(list(itertools.product(range(size), repeat=4)), np.int32)  # x₀, x_t
  x0, xt = jnp.asarray(tokens[:, :2]), jnp.asarray(tokens[:, 2:])

  def noisy(alpha):
    """Return q(x_t | x₀) of one token, [x₀, x_t]."""
    return np.stack([_marginal(row, alpha) for row in np.eye(size)])

  def exact(alpha):
    """Return log p(x₀_l | x_t of the other position), [pair, 2, V]."""
    given_second = data @ noisy(alpha)  # [x₀ first, x_t second]
    given_first = data.T @ noisy(alpha)
    rows = [(given / given.sum(axis=0)).T for given in (given_second, given_first)]
    return np.log(np.stack([rows[0][tokens[:, 3]], rows[1][tokens[:, 2]]], axis=1))

  with jax.enable_x64(True):
    proc = _uniform(vocab_size=size, schedule=schedule)
    nll = jax.jit(
      jax.vmap(lambda log_f, xt, x0, t: proc.nll(log_f, xt, x0, t).sum(), in_axes=(0, 0, 0, None))
    )
    integral = 0.0
    for t, weight in zip(times, weights, strict=True):
      alpha = float(schedule.alpha(t))
      law = np.einsum("ab,ac,bd->abcd", data, noisy(alpha), noisy(alpha)).ravel()
      integral += weight * np.sum(law * np.asarray(nll(jnp.asarray(exact(alpha)), xt, x0, t)))
    law = np.einsum("ab,ac,bd->abcd", data, *[noisy(float(schedule.alpha(1.0)))] * 2)
    at_end = np.einsum("abcd->cd", law)[None, None]
    left = np.sum(law * np.log(law / (data[..., None, None] * at_end)))
  np.testing.assert_allclose(integral + left, entropy, rtol=1e-6)


# --- float32 at the full vocabulary -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _At(schedules.Schedule):
  """One α, so that both sides see the same float32 number."""

  value: float
  dtype: type = jnp.float32

  def alpha(self, t):
    return self.dtype(self.value) + 0 * t

  def dalpha(self, t):
    return self.dtype(-1) + 0 * t


def _relative_error(log_f, z, p0, t):
  """Return |ours − float64| / float64 and the float64 value, per position."""
  alpha = float(np.float32(1 - 0.999 * t))
  proc = _uniform(vocab_size=log_f.shape[-1], schedule=_At(alpha))
  ours = jax.jit(proc.nll_soft)(log_f, z, p0, jnp.float32(t))
  exact = sum(_kl_and_is(f64(log_f), np.asarray(z), f64(p0), alpha, -1.0))
  return np.abs(f64(ours) / exact - 1), exact


def _full_vocabulary(scale, seed=0):
  """Return [8, 50,258] float32 log-probabilities, tokens (4 likely, 4 random) and states."""
  rng = np.random.default_rng(seed)
  log_f = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(8, 50_258)) * scale, jnp.float32))
  x0 = np.where(np.arange(8) < 4, log_f.argmax(-1), rng.integers(0, 50_258, 8))
  z = np.where(np.arange(8) % 2 == 0, x0, rng.integers(0, 50_258, 8))
  z[1] = log_f[1].argmax()
  return log_f, jnp.asarray(x0, jnp.int32), jnp.asarray(z, jnp.int32), rng


TIMES = (0.001, 0.03, 0.5, 0.99, 1.0)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 10.0])
def test_float32_error_for_a_token(scale, t):
  """At most 1e-6 of the loss, or 1e-6 nats where the loss is below 1 nat; typically 1e-7."""
  log_f, x0, z, _ = _full_vocabulary(scale)
  error, exact = _relative_error(log_f, z, jax.nn.one_hot(x0, 50_258), t)
  assert (error * exact / np.maximum(exact, 1)).max() < 1e-6
  assert np.median(error) < 1e-6
  assert exact.max() > 1


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("scale", [1.0, 4.0, 10.0])
@pytest.mark.parametrize("sharpness", [4.0, 8.0])
def test_float32_error_for_a_distribution(scale, sharpness, t):
  log_f, _, z, rng = _full_vocabulary(scale)
  p0 = jax.nn.softmax(jnp.asarray(rng.normal(size=(8, 50_258)) * sharpness, jnp.float32))
  z = z.at[::2].set(p0.argmax(-1)[::2])
  error, _ = _relative_error(log_f, z, p0, t)
  assert error.max() < 1e-6


# --- golden vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_losses(golden, variant):
  vectors, config = golden(f"udlm_losses__{variant}")
  proc = _uniform(vocab_size=config["V"])
  recorded_losses.check(proc, vectors, "nll_per_token_f64", nll_atol=0, gradient_atol=1e-5)
  xt, x0, t = (jnp.asarray(vectors[k]) for k in ("xt", "x0", "t"))
  np.testing.assert_allclose(proc.schedule.sigma(t), vectors["sigma"][:, 0], rtol=1e-5)
  network = jax.vmap(proc.nll)(jnp.asarray(vectors["network_log_x_theta"]), xt, x0, t)
  np.testing.assert_allclose(network, vectors["network_nll_per_token"], rtol=2e-5, atol=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded(schedules.LogLinear):
  """α in float32, as the reference has it where all else is in float64."""

  def alpha(self, t):
    return super().alpha(t.astype(jnp.float32)).astype(t.dtype)


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_posteriors(golden, variant):
  vectors, config = golden(f"udlm_losses__{variant}")
  with jax.enable_x64(True):
    # Not compiled: a compiler may round α once where it was rounded twice.
    proc = process.Uniform(vocab_size=config["V"], schedule=Rounded())
    xt = jnp.asarray(vectors["xt"])
    log_x0 = jnp.asarray(vectors["log_x_theta"], jnp.float64)
    truth = jnp.where(jax.nn.one_hot(vectors["x0"], config["V"]) > 0, 0.0, -1e6)
    s, t = (jnp.asarray(vectors[name], jnp.float64) for name in ("s", "t"))
    posterior = jax.vmap(proc.posterior)
    for ours, name, tolerance in (
      (posterior(truth, xt, s, t), "posterior_from_onehot_x0", 2e-7),
      (posterior(log_x0, xt, s, t), "posterior_from_x_theta", 2e-7),
      (posterior(log_x0, xt, s, t), "posterior_from_x_theta_f64", 1e-9),
      (posterior(log_x0, xt, 0 * s, t), "posterior_to_t0_f64", 1e-9),
    ):
      np.testing.assert_allclose(ours, vectors[name], rtol=0, atol=tolerance, err_msg=name)
      np.testing.assert_allclose(ours.sum(-1), 1.0, rtol=1e-6)


# --- input checks -----------------------------------------------------------------------------


def test_a_vocabulary_of_one():
  with pytest.raises(ValueError, match="vocab_size=1") as error:
    process.Uniform(vocab_size=1)
  assert "\n" not in str(error.value)


@pytest.mark.first_case
@pytest.mark.parametrize(
  "distance,of_value,of_gradient", [(3.0, 3e-6, 3e-5), (0.1, 3e-5, 2e-5), (1e-3, 1e-3, 5e-2)]
)
def test_float32_of_two_networks_logits(distance, of_value, of_gradient):
  """Value and gradients against float64, of predictions far from each other and close."""
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(6, 50_258)) * 3
  data = logits + distance * rng.normal(size=logits.shape)
  logits, data = (x.astype(np.float32) for x in (logits, data))
  z = np.where(np.arange(6) % 2 == 0, data.argmax(-1), rng.integers(0, 50_258, 6))
  for alpha in (0.1, 0.9):
    found = []
    for dtype in (jnp.float32, jnp.float64):
      with jax.enable_x64(dtype is jnp.float64):
        proc = _uniform(vocab_size=50_258, schedule=_At(float(np.float32(alpha)), dtype))
        states = jnp.asarray(z, jnp.int32)
        loss = lambda x, y, p=proc, z=states: p.nll_predicted(x, z, y, z, 0.5)  # noqa: E731
        value, pull = jax.vjp(jax.jit(loss), jnp.asarray(logits, dtype), jnp.asarray(data, dtype))
        found.append([f64(value), *map(f64, pull(jnp.ones_like(value)))])
    for ours, wanted in zip(*found, strict=True):
      ours, wanted = (x.reshape(len(z), -1) for x in (ours, wanted))
      error = np.linalg.norm(ours - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
      assert error.max() < (of_value if ours.shape[1] == 1 else of_gradient)
