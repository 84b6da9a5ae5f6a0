# SPDX-License-Identifier: Apache-2.0
"""ψ-samplers: marginals by enumeration with an exact denoiser, laws, recorded probabilities."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dlm_jax import draw, process, sample, schedules
from dlm_jax.errors import InputError
from dlm_jax.models import Denoiser
from dlm_jax.sample import _psi, _uniform

FOLLOWS, DIFFERS = 1e-4, 1e-6
SAMPLES, L, V = 24_576, 2, toy.VOCABULARY
ABSORBING = process.Absorbing(vocab_size=V, mask_id=toy.MASK)
UNIFORM = process.Uniform(vocab_size=V)
BOTH = pytest.mark.parametrize("proc", [ABSORBING, UNIFORM], ids=["absorbing", "uniform"])
KEY = jax.random.key(5)


def _by_hand(proc, kappa, eta=0.0, held=None):
  """Return the rows of one ψ step, from dense laws: a function of (p(x₀ | xₜ), xₜ, s, t)."""

  def rows(probs, tokens, s, t):
    alpha_s, alpha_t = float(proc.schedule.alpha(s)), float(proc.schedule.alpha(t))
    share = 1 - kappa if not isinstance(kappa, str) else None
    if share is None:
      largest = min(1.0, (1 - alpha_s) / alpha_t)
      sigma = eta * largest if kappa == "rescale" else min(eta, largest)
      sigma = sigma if held is None or held(s, t) else 0.0
      share = sigma / (1 - alpha_s)
      share = min(share, 1.0) if isinstance(proc, process.Uniform) else share
    noise = np.eye(V)[toy.MASK] if isinstance(proc, process.Absorbing) else np.full(V, 1 / V)
    clean = toy.posterior_rows(proc)(probs, tokens, 0.0, t)
    afresh = alpha_s * clean + (1 - alpha_s) * noise
    return (1 - share) * toy.posterior_rows(proc)(probs, tokens, s, t) + share * afresh

  return rows


def _ours(proc, kappa, eta=0.0):
  """Return the same rows, from what the sampler draws with."""

  def rows(probs, tokens, s, t):
    p, x = jnp.asarray(probs, jnp.float32), jnp.asarray(tokens)
    times = jnp.array([t, s], jnp.float32)
    alpha_t, alpha_s = proc.schedule.alpha(times)
    sigma = _psi.renoising(proc, times, kappa, eta)[0]
    one_hot = jax.nn.one_hot(x, V)
    if isinstance(proc, process.Uniform):
      at_x = jnp.sum(one_hot * p, axis=-1)
      share = jnp.minimum(sigma / (1 - alpha_s), 1.0)
      mixture = lambda at_x: _uniform.mixture(V, at_x, alpha_s, alpha_t, 1 - share)  # noqa: E731
      keep, predict = jax.vmap(mixture)(at_x)
      left = (1 - keep - predict)[..., None] / V
      return np.asarray(keep[..., None] * one_hot + predict[..., None] * p + left, np.float64)
    reveal = _psi.reveal_probability(alpha_s, alpha_t, sigma)
    mask = jnp.broadcast_to(jax.nn.one_hot(toy.MASK, V), p.shape)
    masked = reveal * p + (1 - reveal) * mask
    kept = (1 - sigma) * one_hot + sigma * mask
    return np.asarray(jnp.where(x[..., None] == toy.MASK, masked, kept), np.float64)

  return rows


KAPPAS = [(0.0, 0.0), (0.4, 0.0), (1.0, 0.0), ("cap", 0.05), ("cap", 1.0), ("rescale", 0.3)]


# --- marginals --------------------------------------------------------------------------------


def _noisy_law(proc, law, t):
  """Return the law of xₜ over all states, given the law of clean sequences."""
  alpha = float(proc.schedule.alpha(t))
  noise = np.eye(V)[toy.MASK] if isinstance(proc, process.Absorbing) else np.full(V, 1 / V)
  forward = alpha * np.eye(V) + (1 - alpha) * noise[None]  # [x₀, xₜ]
  return np.einsum("ab,ai,bj->ij", law, forward, forward), forward


def _exact_prediction(proc, law, t):
  """Return what a perfect network says, [V², 2, V].

  p(x₀ | xₜ) under masks; under uniform noise a perfect network predicts from the other positions
  only, since the posterior brings in the token itself.
  """
  _, forward = _noisy_law(proc, law, t)
  probs = np.zeros((V * V, 2, V))
  for code, (i, j) in enumerate(toy.states(2)):
    own = (forward[:, i], forward[:, j])
    if isinstance(proc, process.Uniform):
      own = (np.ones(V), np.ones(V))
    probs[code, 0] = own[0] * (law @ forward[:, j])
    probs[code, 1] = own[1] * (forward[:, i] @ law)
  return probs / probs.sum(axis=-1, keepdims=True)


def _clean_law(proc):
  law = np.random.default_rng(3).dirichlet(np.full(V * V, 0.5)).reshape(V, V)
  if isinstance(proc, process.Absorbing):
    law[toy.MASK] = law[:, toy.MASK] = 0.0
  return law / law.sum()


@BOTH
@pytest.mark.parametrize("kappa,eta", KAPPAS)
@pytest.mark.parametrize("s,t", [(0.1, 0.9), (0.3, 0.3)])
def test_marginals_are_those_of_the_process(proc, kappa, eta, s, t):
  """Two correlated positions and an exact denoiser: x_t ~ q_t gives each position of x_s ~ q_s."""
  clean = _clean_law(proc)
  noisy, _ = _noisy_law(proc, clean, t)
  rows = _ours(proc, kappa, eta)(_exact_prediction(proc, clean, t), toy.states(2), s, t)
  moved = toy._apply(noisy.ravel(), rows).reshape(V, V)
  wanted, _ = _noisy_law(proc, clean, s)
  for axis in (0, 1):
    np.testing.assert_allclose(moved.sum(axis), wanted.sum(axis), atol=3e-6)


def test_the_marginal_test_can_fail():
  """Remask without revealing more in return."""
  clean = _clean_law(ABSORBING)
  noisy, _ = _noisy_law(ABSORBING, clean, 0.8)
  p = _exact_prediction(ABSORBING, clean, 0.8)
  rows = _ours(ABSORBING, 1.0)(p, toy.states(2), 0.5, 0.8)
  masked = (toy.states(2) == toy.MASK)[..., None]
  rows = np.where(masked, rows, 0.8 * rows + 0.2 * np.eye(V)[toy.MASK])
  moved = toy._apply(noisy.ravel(), rows).reshape(V, V)
  wanted, _ = _noisy_law(ABSORBING, clean, 0.5)
  assert np.abs(moved.sum(0) - wanted.sum(0)).max() > 0.01


@BOTH
@pytest.mark.parametrize("kappa,eta", KAPPAS)
def test_rows_are_the_mixture_of_posterior_and_noised_prediction(proc, kappa, eta):
  denoiser = toy.make(2)
  probs = toy._predictions(denoiser, proc, 2, 0.0, 1.0, 1.0)
  for s, t in ((0.5, 0.8), (0.2, 0.25)):
    ours = _ours(proc, kappa, eta)(probs, toy.states(2), s, t)
    wanted = _by_hand(proc, kappa, eta)(probs, toy.states(2), s, t)
    np.testing.assert_allclose(ours, wanted, atol=3e-6)
    assert ours.min() > -1e-6


# --- laws -------------------------------------------------------------------------------------


@functools.cache
def _compiled(proc, **options):
  generate = functools.partial(
    sample.generate, length=L, sampler="psi", **{"batch": SAMPLES, **options}
  )
  return jax.jit(lambda denoiser, rng, prompt: generate(denoiser, proc, rng, prompt=prompt))


_toy = functools.cache(toy.make)


def _generate(proc, rng=KEY, prompt=None, **options):
  return jax.tree.map(np.asarray, _compiled(proc, **options)(_toy(L), rng, prompt))


@pytest.mark.first_case
@BOTH
@pytest.mark.parametrize("kappa,eta,steps", [(0.0, 0.0, 8), ("cap", 0.3, 8), ("rescale", 0.5, 8)])
def test_law_of_the_chain(proc, kappa, eta, steps):
  options = {"kappa": kappa} if eta == 0 else {"kappa": kappa, "eta": eta}
  tokens = _generate(proc, steps=steps, **options)
  law = toy.chain_law(_toy(L), proc, L, steps, rows=_by_hand(proc, kappa, eta))
  assert toy.p_value(tokens, law) > FOLLOWS
  assert toy.p_value(tokens, toy.chain_law(_toy(L), proc, L, steps)) < DIFFERS


@BOTH
def test_kappa_one_is_ancestral(proc):
  tokens = _generate(proc, steps=3, kappa=1.0)
  assert toy.p_value(tokens, toy.chain_law(_toy(L), proc, L, 3)) > FOLLOWS


@BOTH
def test_law_of_the_loop(proc):
  """Times stand still at α = 0.6 between grid times 0.7 and 0.3, and only there tokens move."""
  options = {"kappa": "loop", "eta": 0.5, "window": (0.71, 0.29), "hold": 0.6}
  tokens = _generate(proc, steps=10, **options)
  still = (1 - 0.6) / (1 - 1e-3)
  grid = np.interp(np.linspace(1.0, toy.END, 11), [0, 0.29, 0.71, 1], [0, still, still, 1])
  held = lambda s, t: s == t  # noqa: E731
  assert sum(s == t for t, s in itertools.pairwise(grid)) == 4
  rows = _by_hand(proc, "loop", 0.5, held)
  law = toy.chain_law(_toy(L), proc, L, 10, rows=rows, grid=grid)
  assert toy.p_value(tokens, law) > FOLLOWS
  without = toy.chain_law(_toy(L), proc, L, 10, grid=grid)
  assert toy.p_value(tokens, without) < DIFFERS


def test_loop_follows_the_published_survival():
  """α rises linearly to 0.9 over t from 1 to 0.55, stays, and rises to 1 from t = 0.05 to 0."""
  proc = process.Absorbing(vocab_size=V, mask_id=toy.MASK, schedule=schedules.LogLinear(eps=1e-9))
  t = np.linspace(1, 0, 2001)
  times, held = _psi._loop(proc, jnp.asarray(t, jnp.float32), (0.55, 0.05), 0.9)
  published = np.select(
    [t > 0.55, t > 0.05], [(1 - t) * 0.9 / (1 - 0.55), np.full_like(t, 0.9)], 1 - t * 0.1 / 0.05
  )
  np.testing.assert_allclose(proc.schedule.alpha(times), published, atol=1e-5)
  assert np.asarray(held).sum() == pytest.approx(1000, abs=2), "half of all steps remask"
  edge = _psi.renoising(proc, times, "cap", 0.02)[np.asarray(held)]
  np.testing.assert_allclose(edge, 0.02)


def test_law_of_the_greedy_tail_and_without_a_tail():
  proc = process.Absorbing(vocab_size=V, mask_id=toy.MASK, schedule=schedules.Polynomial(power=0.1))
  for noise_removal in ("greedy", "none"):
    tokens = _generate(proc, steps=2, kappa=0.5, noise_removal=noise_removal)
    rows = _by_hand(proc, 0.5)
    law = toy.chain_law(_toy(L), proc, L, 2, rows=rows, noise_removal=noise_removal)
    assert toy.p_value(tokens, law) > FOLLOWS


# --- surface ------------------------------------------------------------------------------------


def test_tokens_are_masked_again_and_given_ones_are_not():
  prompt = jnp.array([1, toy.MASK])
  tokens, trace = _generate(
    ABSORBING, prompt=prompt, steps=8, kappa=0.0, batch=256, return_trace=True
  )
  assert trace.shape == (9, 256, L)
  assert np.all(trace[..., 0] == 1)
  again = (trace[:-1, :, 1] != toy.MASK) & (trace[1:, :, 1] == toy.MASK)
  assert again.sum() > 10
  assert np.all(tokens != toy.MASK)


@BOTH
def test_a_sequence_depends_on_its_own_key_only(proc):
  options = {"steps": 4, "kappa": 0.3}
  eight = _generate(proc, batch=8, **options)
  np.testing.assert_array_equal(_generate(proc, batch=3, **options), eight[:3])


@pytest.mark.slow
def test_no_key_is_used_twice():
  with jax.debug_key_reuse(True):
    for proc in (ABSORBING, UNIFORM):
      sample.generate(_toy(L), proc, jax.random.key(3), batch=2, length=L, steps=2, sampler="psi")


@pytest.mark.parametrize(
  "options,word",
  [
    ({"kappa": "caps"}, "rescale"),
    ({"kappa": 1.5}, "kappa"),
    ({"kappa": -0.1}, "kappa"),
    ({"eta": 2.0}, "eta"),
    ({"kappa": "loop", "window": (0.1, 0.5)}, "window"),
    ({"kappa": "loop", "hold": 1.0}, "hold"),
    ({"noise_removal": "ancestrl"}, "greedy"),
  ],
)
def test_bad_input_is_one_line_that_names_the_way_out(options, word):
  with pytest.raises(InputError, match=word) as error:
    sample.generate(_toy(L), ABSORBING, KEY, batch=2, length=L, sampler="psi", **options)
  assert "\n" not in str(error.value)


# --- recorded numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_probabilities_and_draws(golden_dit, variant):
  """κ = 0.4 under masks; `test_uniform_sampler` has the uniform process."""
  vectors, config, model, params = golden_dit(f"mdlm_losses__{variant}")
  mask = config["mask_index"]
  proc = process.Absorbing(vocab_size=config["V"], mask_id=mask)
  x, t_B = jnp.asarray(vectors["xt"], jnp.int32), jnp.asarray(vectors["update_t"][:, 0])
  log_x0 = jax.vmap(proc.log_x0)(Denoiser(model, params)(x, jnp.zeros(x.shape[0])), x)
  np.testing.assert_allclose(log_x0, vectors["network_log_x_theta"], rtol=1e-5, atol=2e-5)
  for row, t in enumerate(t_B):
    times = jnp.stack([t, t - jnp.float32(vectors["update_dt"])])
    alpha_t, alpha_s = proc.schedule.alpha(times)
    sigma = _psi.renoising(proc, times, 0.4)[0]
    reveal = _psi.reveal_probability(alpha_s, alpha_t, sigma)
    noise = jnp.where((x[row] == mask), 1 - reveal, sigma)[:, None]
    probs = (1 - noise) * jnp.exp(log_x0[row]) + noise * jax.nn.one_hot(mask, config["V"])[None]
    np.testing.assert_allclose(probs, vectors["psi_kappa0.4_probs"][row], rtol=1e-4, atol=1e-6)
    drawn = draw.race(probs, jnp.asarray(vectors["update_uniform"][row]))
    np.testing.assert_array_equal(drawn, vectors["psi_kappa0.4_next"][row])
