# SPDX-License-Identifier: Apache-2.0
"""The absorbing process against enumeration (V ≤ 4, L ≤ 3) and golden vectors."""

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
}
every_schedule = pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))


def _absorbing(**options):
  return Methods(process.Absorbing(**options))


def _states(vocabulary, length):
  """Return every sequence, [V^L, L], in the order of their base-V codes."""
  return np.array(list(itertools.product(range(vocabulary), repeat=length)), np.int32)


def _code(tokens, vocabulary):
  return np.asarray(tokens) @ vocabulary ** np.arange(tokens.shape[-1])[::-1]


def _marginal(x0, alpha, vocabulary, mask):
  """Return q(x_t | x0) of one token as a row."""
  row = np.zeros(vocabulary)
  row[x0] += alpha
  row[mask] += 1 - alpha
  return row


def _transition(xs, alpha_s, alpha_t, vocabulary, mask):
  """Return q(x_t | x_s) of one token: survive with α_t/α_s, the mask stays."""
  row = np.zeros(vocabulary)
  if xs == mask:
    row[mask] = 1.0
  else:
    row[xs] = alpha_t / alpha_s
    row[mask] = 1 - alpha_t / alpha_s
  return row


def _bayes(x0, xt, alpha_s, alpha_t, vocabulary, mask):
  """Return q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), or None if x_t cannot come from x_0."""
  prior = _marginal(x0, alpha_s, vocabulary, mask)
  likelihood = np.array(
    [_transition(xs, alpha_s, alpha_t, vocabulary, mask)[xt] for xs in range(vocabulary)]
  )
  joint = prior * likelihood
  return joint / joint.sum() if joint.sum() > 0 else None


def _log_x0(proc, xt_L, seed):
  logits = np.random.default_rng(seed).normal(size=(len(xt_L), proc.vocab_size)) * 2
  return proc.log_x0(jnp.asarray(logits), jnp.asarray(xt_L))


# --- corrupt ------------------------------------------------------------------------------------


def _law(x0_rows, alpha, vocabulary, mask):
  """Return the exact law over all V^L states when position l has the clean law x0_rows[l]."""
  rows = alpha * x0_rows + (1 - alpha) * np.eye(vocabulary)[mask]
  law = np.ones(1)
  for row in rows:
    law = np.outer(law, row).ravel()
  return law


def _chi_square(tokens, law, vocabulary):
  observed = np.bincount(_code(tokens, vocabulary), minlength=len(law))
  assert observed[law == 0].sum() == 0
  keep = law * len(tokens) > 5
  observed = np.append(observed[keep], observed[~keep].sum())
  expected = np.append(law[keep], law[~keep].sum()) * len(tokens)
  keep = expected > 0
  return scipy.stats.chisquare(observed[keep], expected[keep]).pvalue


@every_schedule
@pytest.mark.parametrize("mask", [0, 3])
def test_law_of_corrupt(schedule, mask):
  proc = _absorbing(vocab_size=4, mask_id=mask, schedule=schedule)
  x0_L = jnp.array([1, 2, 1])
  rows = np.eye(4)[np.asarray(x0_L)]
  for t, tokens, alpha in draws.corrupted(proc, x0_L, (0.1, 0.5, 0.9), 30_000):
    assert _chi_square(tokens, _law(rows, alpha, 4, mask), 4) > FOLLOWS
    assert _chi_square(tokens, _law(rows, 0.97 * alpha + 0.035, 4, mask), 4) < DIFFERS or t == 0.1
    assert _chi_square(tokens, _law(rows, 0.97 * alpha, 4, mask), 4) < DIFFERS or t == 0.9


def test_prior_is_all_masks():
  proc = _absorbing(vocab_size=4, mask_id=2)
  prior = proc.prior(jax.random.key(0), 5)
  assert prior.dtype == jnp.int32
  np.testing.assert_array_equal(prior, [2] * 5)


# --- posterior --------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("vocabulary,mask", [(2, 1), (3, 0), (4, 2)])
@pytest.mark.parametrize("s,t", [(0.2, 0.25), (0.0, 1.0)])
def test_posterior_is_brute_force_bayes(schedule, vocabulary, mask, s, t):
  """Every (x₀, x_s, x_t): rows are Σ p(x₀ | x_t) q(x_t | x_s) q(x_s | x₀) / q(x_t | x₀)."""
  with jax.enable_x64(True):
    proc = _absorbing(vocab_size=vocabulary, mask_id=mask, schedule=schedule)
    alpha_s, alpha_t = float(schedule.alpha(s)), float(schedule.alpha(t))
    xt_L = np.arange(vocabulary)  # one position per value of x_t
    log_x0_LV = _log_x0(proc, xt_L, seed=vocabulary)
    p_LV = np.exp(np.asarray(log_x0_LV))
    ours = np.asarray(proc.posterior(log_x0_LV, jnp.asarray(xt_L), s, t))
    for position, xt in enumerate(xt_L):
      expected = np.zeros(vocabulary)
      for x0 in range(vocabulary):
        if x0 == mask or p_LV[position, x0] == 0:
          continue
        expected += p_LV[position, x0] * _bayes(x0, xt, alpha_s, alpha_t, vocabulary, mask)
      np.testing.assert_allclose(ours[position], expected, atol=1e-12, err_msg=f"x_t = {xt}")


def test_posterior_of_sequences_by_enumeration():
  """L = 2: Σ over sequences x₀ of p(x₀ | x_t) q(x_s | x_t, x₀) is the product of the rows."""
  with jax.enable_x64(True):
    proc, mask = _absorbing(vocab_size=3, mask_id=2), 2
    s, t = 0.35, 0.8
    alpha_s, alpha_t = float(proc.schedule.alpha(s)), float(proc.schedule.alpha(t))
    states = _states(3, 2)
    for xt in states:
      log_x0_LV = _log_x0(proc, xt, seed=7)
      rows = np.asarray(proc.posterior(log_x0_LV, jnp.asarray(xt), s, t))
      p_LV = np.exp(np.asarray(log_x0_LV))
      for xs in states:
        total = 0.0
        for x0 in states:
          weight = p_LV[0, x0[0]] * p_LV[1, x0[1]]
          if weight > 0:
            terms = [_bayes(x0[i], xt[i], alpha_s, alpha_t, 3, mask)[xs[i]] for i in range(2)]
            total += weight * np.prod(terms)
        np.testing.assert_allclose(rows[0, xs[0]] * rows[1, xs[1]], total, atol=1e-12)


@every_schedule
def test_posterior_carries_the_marginal_at_t_to_the_one_at_s(schedule):
  """Σ_{x_t} q(x_t | x₀) q(x_s | x_t, x₀) = q(x_s | x₀), for every x₀."""
  with jax.enable_x64(True):
    vocabulary, mask, s, t = 4, 1, 0.4, 0.7
    proc = _absorbing(vocab_size=vocabulary, mask_id=mask, schedule=schedule)
    for x0 in (0, 2, 3):
      xt_L = jnp.arange(vocabulary)
      log_x0_LV = jnp.asarray(np.where(np.eye(vocabulary)[[x0] * vocabulary] > 0, 0.0, -1e6))
      rows = np.asarray(proc.posterior(log_x0_LV, xt_L, s, t))
      at_t = _marginal(x0, float(schedule.alpha(t)), vocabulary, mask)
      expected = _marginal(x0, float(schedule.alpha(s)), vocabulary, mask)
      np.testing.assert_allclose(at_t @ rows, expected, atol=1e-12)


# --- log_x0 and the losses ---------------------------------------------------------------------


def test_subs_by_hand():
  """Masked: softmax without the mask's row. Revealed: the token, whatever the logits."""
  proc = _absorbing(vocab_size=3, mask_id=1)
  logits_LV = jnp.log(jnp.array([[1.0, 50.0, 3.0], [1.0, 50.0, 3.0], [7.0, 1.0, 1.0]]))
  probs = np.exp(proc.log_x0(logits_LV, jnp.array([1, 0, 2])))
  np.testing.assert_allclose(probs, [[0.25, 0, 0.75], [1, 0, 0], [0, 0, 1]], atol=1e-6)


@every_schedule
def test_nll_by_hand(schedule):
  proc = _absorbing(vocab_size=3, mask_id=2, schedule=schedule)
  log_x0_LV = jnp.log(jnp.array([[0.25, 0.75, 1e-30], [0.1, 0.9, 1e-30], [1.0, 1e-30, 1e-30]]))
  xt_L, x0_L, t = jnp.array([2, 2, 0]), jnp.array([0, 1, 0]), 0.4
  weight = -schedule.dalpha(t) / (1 - schedule.alpha(t))
  expected = float(weight) * np.array([np.log(4), -np.log(0.9), 0.0])
  np.testing.assert_allclose(proc.nll(log_x0_LV, xt_L, x0_L, t), expected, rtol=1e-5)


@every_schedule
def test_nll_soft_is_linear_and_agrees_with_nll(schedule):
  proc = _absorbing(vocab_size=4, mask_id=1, schedule=schedule)
  rng = np.random.default_rng(0)
  xt_L = jnp.array([1, 1, 0, 1, 3])
  x0_L = jnp.array([0, 2, 0, 3, 3])
  log_x0_LV = _log_x0(proc, xt_L, seed=1).astype(jnp.float32)
  hard = proc.nll(log_x0_LV, xt_L, x0_L, 0.3)
  soft = proc.nll_soft(log_x0_LV, xt_L, jax.nn.one_hot(x0_L, 4), 0.3)
  np.testing.assert_allclose(soft, hard, rtol=1e-6)
  assert hard[2] == hard[4] == 0

  p_LV, q_LV = (jnp.asarray(rng.dirichlet(np.ones(4), size=5), jnp.float32) for _ in range(2))
  p_LV, q_LV = (x.at[:, 1].set(0.0) for x in (p_LV, q_LV))
  mix = proc.nll_soft(log_x0_LV, xt_L, 0.3 * p_LV + 0.7 * q_LV, 0.3)
  parts = [proc.nll_soft(log_x0_LV, xt_L, x, 0.3) for x in (p_LV, q_LV)]
  np.testing.assert_allclose(mix, 0.3 * parts[0] + 0.7 * parts[1], rtol=1e-5, atol=1e-6)


def test_soft_gradients_are_finite_and_vanish_where_revealed():
  proc = _absorbing(vocab_size=4, mask_id=3)
  xt_L = jnp.array([3, 0, 3])
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
  p0_LV = jnp.array([[0.2, 0.3, 0.5, 0.0], [1.0, 0, 0, 0], [0.0, 1.0, 0.0, 0.0]])

  def loss(logits, p0_LV):
    return proc.nll_soft(proc.log_x0(logits, xt_L), xt_L, p0_LV, 0.01).sum()

  for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, p0_LV):
    assert np.isfinite(gradient).all()
    assert np.all(gradient[1] == 0)
    assert np.abs(gradient[0]).max() > 0


# --- the NELBO of an exact denoiser ---------------------------------------------------------------


def _exact_log_conditionals(joint, xt_L, mask):
  """Return log p(x_l = v | revealed tokens of x_t), [L, V]; the mask's column holds 0.

  `joint` is an array [V0, …, V0] over clean tokens, which are all ids below the mask.
  """
  length, clean = joint.ndim, joint.shape[0]
  rows = np.zeros((length, clean + 1))
  for position in range(length):
    index = tuple(
      slice(None) if token == mask or i == position else token for i, token in enumerate(xt_L)
    )
    kept = [i for i, part in enumerate(index) if isinstance(part, slice)]
    table = np.moveaxis(joint[index], kept.index(position), 0).reshape(clean, -1).sum(axis=1)
    rows[position, :clean] = np.log(table / table.sum())
  return rows


@every_schedule
def test_nelbo_of_an_exact_denoiser_is_the_log_likelihood(schedule):
  """∫₀¹ Σ_l E[nll_l] dt = −log p(x₀) − ∫_{1−α₁}^{1} g(m) dm, for every single x₀.

  Let m = 1 − α be the mask probability; dm = −α' dt, so the integral is ∫ g(m) dm over m from 0
  to 1 − α₁ with g(m) = Σ_l E[−log p(x_l | revealed others)], each other token masked with
  probability m (the factor 1/m of the weight cancels against the probability that l is masked).
  ∫₀¹ g dm averages the chain rule over uniformly random orders, hence −log p(x₀) exactly. There
  is no term at t = 0 (α₀ = 1: x_t = x₀). At t = 1 a fraction α₁ = ε is still clean: the stretch
  of m that the process never visits is what the integral lacks, about ε Σ_l −log p(x_l).
  """
  length, clean, mask = 3, 3, 3
  joint = np.random.default_rng(5).dirichlet(np.full(27, 0.5)).reshape(3, 3, 3)
  nodes, node_weights = np.polynomial.legendre.leggauss(48)
  nodes, node_weights = (nodes + 1) / 2, node_weights / 2
  patterns = np.array(list(itertools.product([False, True], repeat=length)))

  with jax.enable_x64(True):
    proc = _absorbing(vocab_size=clean + 1, mask_id=mask, schedule=schedule)
    nll = jax.jit(lambda logits, xt, x0, t: proc.nll(proc.log_x0(logits, xt), xt, x0, t).sum())
    over_times = jax.jit(
      jax.vmap(lambda logits, xt, x0, t: nll(logits, xt, x0, t), (None, None, None, 0))
    )
    alpha = np.asarray(schedule.alpha(jnp.asarray(nodes)))
    end = 1 - float(schedule.alpha(1.0))
    for x0 in _states(clean, length)[::2]:
      integral, missing = 0.0, 0.0
      for masked in patterns:
        xt = np.where(masked, mask, x0)
        rows = _exact_log_conditionals(joint, xt, mask)
        chance = (1 - alpha) ** masked.sum() * alpha ** (length - masked.sum())
        values = np.asarray(over_times(jnp.asarray(rows), jnp.asarray(xt), jnp.asarray(x0), nodes))
        integral += np.sum(node_weights * chance * values)
        # the same pattern's part of g, on [1 − α₁, 1], by hand
        surprise = -sum(rows[i, x0[i]] for i in range(length) if masked[i])
        m = end + (1 - end) * nodes
        density = m ** (masked.sum() - 1.0) * (1 - m) ** (length - masked.sum())
        missing += np.sum((1 - end) * node_weights * density * surprise) if masked.any() else 0.0
      log_likelihood = np.log(joint[tuple(x0)])
      np.testing.assert_allclose(integral + missing, -log_likelihood, rtol=1e-7)
      assert missing > 1e-4  # the boundary term is real: without it the equality fails


# --- golden vectors ----------------------------------------------------------------------------


def _jnp(vectors, *names):
  return [jnp.asarray(vectors[name]) for name in names]


def _process(config):
  return _absorbing(vocab_size=config["V"], mask_id=config["mask_index"])


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_mdlm_losses(golden, variant):
  vectors, config = golden(f"mdlm_losses__{variant}")
  proc = _process(config)
  recorded_losses.check(proc, vectors, "nll_per_token", nll_atol=1e-5, gradient_atol=1e-6)


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_posteriors(golden, variant):
  vectors, config = golden(f"mdlm_losses__{variant}")
  proc = _process(config)
  log_x0, xt, s, t = _jnp(vectors, "log_x_theta", "xt", "s", "t")
  posterior = jax.vmap(proc.posterior)
  np.testing.assert_allclose(posterior(log_x0, xt, s, t), vectors["posterior_f64"], atol=2e-6)
  np.testing.assert_allclose(
    posterior(log_x0, xt, jnp.zeros_like(t), t), vectors["posterior_to_t0_f64"], atol=2e-6
  )
  t = jnp.asarray(vectors["update_t"][:, 0])
  s = t - jnp.float32(vectors["update_dt"])
  network = jnp.asarray(vectors["network_log_x_theta"])
  np.testing.assert_allclose(posterior(network, xt, s, t), vectors["ancestral_probs"], atol=2e-6)
  np.testing.assert_allclose(
    posterior(network, xt, jnp.zeros_like(t), t), vectors["final_ancestral_probs"], atol=2e-6
  )


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_dit_mdlm_subs_and_loss(golden, variant):
  vectors, config = golden(f"dit_mdlm__{variant}")
  proc = _process(config)
  logits, xt, x0, t = _jnp(vectors, "logits", "xt", "x0", "t")
  np.testing.assert_allclose(
    1 - proc.schedule.alpha(t), vectors["move_chance"][:, 0], rtol=1e-5, atol=1e-7
  )
  log_x0 = jax.vmap(proc.log_x0)(logits, xt)
  np.testing.assert_allclose(log_x0, vectors["log_x_theta"], rtol=2e-5, atol=2e-5)
  nll = np.asarray(jax.vmap(proc.nll)(log_x0, xt, x0, t))
  np.testing.assert_allclose(nll, vectors["nll_per_token"], rtol=2e-5, atol=1e-5)
  counted = vectors["attention_mask"]
  mean = (nll * counted).sum() / counted.sum()
  np.testing.assert_allclose(mean, vectors["mean_token_nll"], rtol=1e-5)


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_idlm_nll_soft(golden, variant):
  """Σ nll_soft(teacher) − nll_soft(fake) is the generator loss; its p-gradient is the advantage.

  Recorded in float64 from float32 log-probabilities: 1e-5 relative. The mask's column is left
  out of the gradient: p is 0 there and ours is 0 by definition.
  """
  vectors, config = golden(f"idlm_mdlm__{variant}")
  with jax.enable_x64(True):
    proc = _process(config)
    teacher, fake, p0 = (
      jnp.asarray(vectors[name], jnp.float64)
      for name in ("teacher_log_probs", "fake_log_probs", "student_probs")
    )
    xt, t = jnp.asarray(vectors["xt"]), jnp.asarray(vectors["t"], jnp.float64)

    def mean_loss(p0):
      soft = jax.vmap(proc.nll_soft)
      per_sequence = (soft(teacher, xt, p0, t) - soft(fake, xt, p0, t)).sum(axis=-1)
      return per_sequence.mean(), per_sequence

    gradient, per_sequence = jax.jit(jax.grad(mean_loss, has_aux=True))(p0)
    recorded = vectors["generator_loss_per_seq_f64"]
    np.testing.assert_allclose(per_sequence, recorded, rtol=1e-5, atol=1e-6)
    recorded = vectors["grad_generator_loss_mean_wrt_student_probs_f64"]
    tokens = np.arange(config["V"]) != config["mask_index"]
    np.testing.assert_allclose(gradient[..., tokens], recorded[..., tokens], rtol=1e-5, atol=1e-6)


# --- input checks -----------------------------------------------------------------------------


@pytest.mark.parametrize("mask_id", [-1, 4, 5])
def test_mask_outside_the_vocabulary(mask_id):
  with pytest.raises(ValueError, match="mask_id") as error:
    process.Absorbing(vocab_size=4, mask_id=mask_id)
  assert "\n" not in str(error.value)
