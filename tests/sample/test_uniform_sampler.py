# SPDX-License-Identifier: Apache-2.0
"""The uniform-state sampler: its mixture against the posterior, its law, recorded numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy

from dlm_jax import draw, models, process, sample, schedules
from dlm_jax.errors import InputError
from dlm_jax.sample import _uniform

FOLLOWS, DIFFERS = 1e-4, 1e-6
SAMPLES, L = 24_576, 3
# α(1e-5) = 0.68: the noise removal has something to do.
LATE = schedules.Polynomial(power=0.1)
PROC = process.Uniform(vocab_size=toy.VOCABULARY)
KEY = jax.random.key(7)


@functools.cache
def _compiled(**options):
  given = {"proc": PROC, "batch": SAMPLES, "length": L, **options}
  proc = given.pop("proc")

  def generate(denoiser, rng, prompt, frozen):
    return sample.generate(denoiser, proc, rng, prompt=prompt, frozen=frozen, **given)

  return jax.jit(generate)


_toy = functools.cache(toy.make)


def _generate(denoiser=None, rng=KEY, *, prompt=None, frozen=None, **options):
  return np.asarray(_compiled(**options)(denoiser or _toy(L), rng, prompt, frozen))


def dense(p_LV, x_L, alpha_s, alpha_t, kappa=1.0):
  """Spell out over the vocabulary the law that the sampler draws from in two stages."""
  size = p_LV.shape[-1]
  x_LV = jax.nn.one_hot(x_L, size, dtype=p_LV.dtype)
  p_at_x_L = jnp.sum(p_LV * x_LV, axis=-1)
  keep_L, predict_L = _uniform.mixture(size, p_at_x_L, alpha_s, alpha_t, kappa)
  noise_L1 = (1 - keep_L - predict_L)[:, None] / size
  return keep_L[:, None] * x_LV + predict_L[:, None] * p_LV + noise_L1


# --- one step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [schedules.LogLinear(), schedules.Cosine()])
@pytest.mark.parametrize("s,t", [(0.0, 1.0), (0.2, 0.9), (0.5, 0.5), (0.3, 0.301), (0.0, 0.01)])
def test_the_mixture_is_the_posterior(schedule, s, t):
  vocabulary = 5
  proc = process.Uniform(vocab_size=vocabulary, schedule=schedule)
  rng = np.random.default_rng(0)
  logits = jnp.asarray(3 * rng.normal(size=(64, vocabulary)), jnp.float32)
  x = jnp.asarray(rng.integers(0, vocabulary, 64), jnp.int32)
  log_x0 = proc.log_x0(logits, x)
  ours = dense(jnp.exp(log_x0), x, schedule.alpha(s), schedule.alpha(t))
  np.testing.assert_allclose(ours, proc.posterior(log_x0, x, s, t), rtol=2e-4, atol=2e-6)


def test_mixture_where_alpha_rounds_to_one():
  """No 0/0 where float32 sees no noise: the token stays if it can be clean, else p decides."""
  keep, predict = _uniform.mixture(4, jnp.array([0.3, 0.0]), 1.0, 1.0)
  np.testing.assert_allclose(keep, [1.0, 0.0])
  np.testing.assert_allclose(predict, [0.0, 1.0], atol=1e-6)


def test_redraw_at_a_large_vocabulary():
  """One step over 50,258 tokens: common, rare (1e-7) and impossible ones at their frequency."""
  vocabulary, samples, chunk = 50_258, 32_768, 2048
  rng = np.random.default_rng(1)
  weights = np.full(vocabulary, 1e-7)
  weights[rng.permutation(vocabulary)[:500]] = rng.dirichlet(np.ones(500))
  weights[7], x = 0.0, 11
  weights[x] = 1e-5
  proc = process.Uniform(vocab_size=vocabulary)
  alpha_s, alpha_t, kappa = 0.6, 0.3, 0.4
  weights_V = jnp.asarray(weights, jnp.float32)

  @jax.jit
  def some(key):
    one = lambda key: _uniform.redraw(  # noqa: E731
      proc,
      _uniform.draws(proc, key, 1),
      jnp.log(weights_V)[None],
      jnp.array([x]),
      _uniform.Step(alpha_s, alpha_t, kappa),
    )[0]
    return jax.vmap(one)(jax.random.split(key, chunk))

  keys = jax.random.split(jax.random.key(2), samples // chunk)
  observed = np.bincount(np.concatenate([some(key) for key in keys]), minlength=vocabulary)
  probs = np.asarray(
    dense(weights_V[None] / weights.sum(), jnp.array([x]), alpha_s, alpha_t, kappa)
  )
  assert _p_value(observed, probs[0]) > FOLLOWS
  # A check of the check: too little of the uniform component.
  assert _p_value(observed, 0.8 * probs[0] + 0.2 * weights / weights.sum()) < DIFFERS


def _p_value(observed, probs):
  """Chi-square, tokens of like probability joined until they expect 50."""
  expected = probs.astype(np.float64) / probs.sum(dtype=np.float64) * observed.sum()
  order = np.argsort(expected, kind="stable")
  bins = np.cumsum(expected[order]).astype(int) // 50
  bins = np.unique(np.minimum(bins, bins[-1] - 1), return_inverse=True)[1]
  wanted = np.bincount(bins, expected[order])
  return scipy.stats.chisquare(np.bincount(bins, observed[order]), wanted).pvalue


# --- the chain --------------------------------------------------------------------------------


@functools.cache
def _plain_samples(steps):
  return _generate(steps=steps)


@pytest.mark.parametrize(
  "steps", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 8))]
)
def test_law_of_the_reverse_chain(steps):
  law = toy.chain_law(_toy(L), PROC, L, steps)
  assert toy.p_value(_plain_samples(steps), law) > FOLLOWS


@pytest.mark.parametrize("steps,other", [(1, 2), (2, 3), (3, 8)])
def test_a_wrong_law_is_noticed(steps, other):
  wrong = toy.chain_law(_toy(L), PROC, L, other)
  assert toy.p_value(_plain_samples(steps), wrong) < DIFFERS
  cosine = process.Uniform(vocab_size=toy.VOCABULARY, schedule=schedules.Cosine())
  if steps > 1:
    assert toy.p_value(_plain_samples(steps), toy.chain_law(_toy(L), cosine, L, steps)) < DIFFERS


@pytest.mark.first_case
@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy", "none"])
def test_law_of_the_noise_removal(noise_removal):
  proc = process.Uniform(vocab_size=toy.VOCABULARY, schedule=LATE)
  tokens = _generate(proc=proc, steps=2, noise_removal=noise_removal)
  for name in ("ancestral", "greedy", "none"):
    p = toy.p_value(tokens, toy.chain_law(_toy(L), proc, L, 2, noise_removal=name))
    assert p > FOLLOWS if name == noise_removal else p < DIFFERS, (name, p)


def test_the_network_is_given_sigma_of_the_step():
  denoiser = toy.make(L, seed=3, tilt=0.5)
  tokens = _generate(denoiser, steps=3)
  assert toy.p_value(tokens, toy.chain_law(denoiser, PROC, L, 3)) > FOLLOWS
  assert toy.p_value(tokens, toy.chain_law(toy.make(L, seed=3), PROC, L, 3)) < DIFFERS


@pytest.mark.parametrize(
  "options", [{"temperature": 0.5}, pytest.param({"nucleus": 0.7}, marks=pytest.mark.slow)]
)
def test_sharpening_acts_on_the_prediction_of_the_clean_token(options):
  denoiser = toy.make(L, seed=5, scale=1.0)
  tokens = _generate(denoiser, steps=3, **options)
  assert toy.p_value(tokens, toy.chain_law(denoiser, PROC, L, 3, **options)) > FOLLOWS
  assert toy.p_value(tokens, toy.chain_law(denoiser, PROC, L, 3)) < DIFFERS


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy"])
def test_law_given_frozen_tokens(noise_removal):
  start, frozen = jnp.array([0, 1, 2]), jnp.array([False, True, False])
  options = {"steps": 2, "noise_removal": noise_removal}
  tokens = _generate(prompt=start, frozen=frozen, **options)
  assert np.all(tokens[:, 1] == 1)
  law = toy.chain_law(_toy(L), PROC, L, 2, start=start, frozen=frozen, noise_removal=noise_removal)
  assert toy.p_value(tokens, law) > FOLLOWS


@pytest.mark.slow
def test_law_in_the_time_of_the_gaussian_window():
  """α ends below 1 there, at γ_min: the ancestral tail still goes to α = 1."""
  proc = process.GaussianDuality(vocab_size=toy.VOCABULARY, gamma_min=-1.0, gamma_max=4.0).process
  assert proc.schedule.alpha(0.0) < 0.9
  tokens = _generate(proc=proc, steps=1)
  rows = [np.asarray(_last_rows(proc, t, s)) for t, s in ((1.0, None), (toy.END, 1.0))]
  law = toy.initial_law(proc, L)
  for step in rows:
    law = toy._apply(law, step)
  assert toy.p_value(tokens, law) > FOLLOWS


def _last_rows(proc, t, alpha_s):
  tokens = jnp.asarray(toy.states(L))
  sigma = jnp.broadcast_to(proc.schedule.sigma(t), (len(tokens),))
  probs = jax.nn.softmax(_toy(L)(tokens, sigma))
  alpha_s = proc.schedule.alpha(toy.END) if alpha_s is None else alpha_s
  return jax.vmap(lambda p, x: dense(p, x, alpha_s, proc.schedule.alpha(t)))(probs, tokens)


# --- surface ------------------------------------------------------------------------------------


def test_a_prompt_is_frozen_whole():
  """No token stands for "generate here": all of a prompt is given unless `frozen` says less."""
  tokens, trace = _compiled(batch=8, steps=2, return_trace=True)(
    _toy(L), KEY, jnp.array([toy.MASK, 1]), None
  )
  assert trace.shape == (3, 8, L)
  assert np.all(np.asarray(trace)[..., :2] == [toy.MASK, 1])
  assert len(np.unique(tokens[:, 2])) > 1


OPTIONS = [
  {"steps": 3},
  {"steps": 3, "noise_removal": "greedy", "nucleus": 0.9},
  pytest.param({"steps": 3, "sampler": "psi", "kappa": 0.5}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sequence_depends_on_its_own_key_only(options):
  eight = _generate(batch=8, **options)
  assert len(np.unique(eight, axis=0)) > 2
  for batch in (1, 3):
    np.testing.assert_array_equal(_generate(batch=batch, **options), eight[:batch])


@pytest.mark.parametrize(
  "options", [OPTIONS[0], pytest.param(OPTIONS[1], marks=pytest.mark.slow), OPTIONS[2]], ids=str
)
def test_eager_jit_and_vmap_agree(options):
  keys = jax.random.split(KEY, 2)
  generate = functools.partial(sample.generate, _toy(L), PROC, batch=2, length=L, **options)
  mapped = jax.jit(jax.vmap(generate))(keys)
  for row, key in zip(mapped, keys, strict=True):
    np.testing.assert_array_equal(row, generate(key))


def test_no_key_is_used_twice():
  generate = functools.partial(sample.generate, batch=2, length=L, steps=2)
  with jax.debug_key_reuse(True):
    jax.jit(lambda rng: generate(_toy(L), PROC, rng))(jax.random.key(3))
    with pytest.raises(jax.errors.KeyReuseError):
      jax.jit(lambda rng: (jax.random.bits(rng), jax.random.bits(rng)))(jax.random.key(3))


@pytest.mark.parametrize(
  "options,word",
  [
    ({"sampler": "first_hitting"}, "uniform"),
    ({"sampler": "analytic"}, "uniform"),
    ({"precision": "legacy"}, "absorbing"),
    ({"noise_removal": "ancestrl"}, "greedy"),
    ({"nucleus": 0.0}, "nucleus"),
    ({"grid": "cosin"}, "cosine"),
  ],
)
def test_bad_input_is_one_line_that_names_the_way_out(options, word):
  with pytest.raises(InputError, match=word) as error:
    sample.generate(_toy(L), PROC, KEY, batch=2, length=L, **options)
  assert "\n" not in str(error.value)


# --- recorded numbers ---------------------------------------------------------------------------


@pytest.fixture(params=["a", pytest.param("b", marks=pytest.mark.slow)])
def recorded(request, golden_dit):
  """Return (vectors, config, denoiser) of one variant."""
  vectors, config, model, params = golden_dit(f"udlm_sampler__{request.param}")
  model = models.DiT(dataclasses.replace(model.config, time_conditioning=True))
  return vectors, config, models.Denoiser(model, params)


@functools.partial(jax.jit, static_argnames=("proc", "nucleus"))
def _prediction(denoiser, proc, x, t_B, nucleus=1.0):
  log_x0 = jax.vmap(proc.log_x0)(denoiser(x, proc.schedule.sigma(t_B)), x)
  return jax.nn.softmax(draw.sharpen(log_x0, nucleus=nucleus))


@functools.partial(jax.jit, static_argnames="kappa")
def _rows(p, x, alpha_s, alpha_t, kappa=1.0):
  p = p / p.sum(axis=-1, keepdims=True)
  return jax.vmap(lambda p, x, s, t: dense(p, x, s, t, kappa))(p, x, alpha_s, alpha_t)


@pytest.mark.parametrize(
  "name,options",
  [
    ("ancestral", {}),
    ("final_ancestral", {"final": True}),
    ("nucleus09_ancestral", {"nucleus": 0.9}),
    ("psi_kappa0.0", {"kappa": 0.0}),
    ("psi_kappa0.4", {"kappa": 0.4}),
    ("psi_kappa1.0", {"kappa": 1.0}),
  ],
)
def test_golden_probabilities_and_draws(recorded, name, options):
  vectors, config, denoiser = recorded
  proc = process.Uniform(vocab_size=config["V"])
  x, t_B = jnp.asarray(vectors["x"], jnp.int32), jnp.asarray(vectors["t"][:, 0])
  p = _prediction(denoiser, proc, x, t_B, options.get("nucleus", 1.0))
  s_B = jnp.zeros_like(t_B) if options.get("final") else t_B - vectors["dt"]
  alpha = proc.schedule.alpha
  ours = _rows(p, x, alpha(s_B), alpha(t_B), options.get("kappa", 1.0))
  np.testing.assert_allclose(ours, vectors[f"{name}_probs"], rtol=2e-5, atol=1e-7)
  drawn = draw.race(ours, jnp.asarray(vectors["uniform"]))
  np.testing.assert_array_equal(drawn, vectors[f"{name}_next"])


def test_golden_greedy(recorded):
  vectors, config, denoiser = recorded
  proc = process.Uniform(vocab_size=config["V"])
  x, t_B = jnp.asarray(vectors["x"], jnp.int32), jnp.asarray(vectors["t"][:, 0])
  best = jnp.argmax(_prediction(denoiser, proc, x, t_B), axis=-1)
  np.testing.assert_array_equal(best, vectors["greedy_argmax"])


def test_golden_trajectory(recorded):
  vectors, config, denoiser = recorded
  proc = process.Uniform(vocab_size=config["V"])
  times = sample.grids.uniform(4)
  np.testing.assert_allclose(times, vectors["traj_timesteps"], rtol=1e-6)
  alpha_K = jnp.append(proc.schedule.alpha(times), 1.0)
  x = jnp.asarray(vectors["traj_prior"], jnp.int32)
  for k, wanted in enumerate(vectors["traj_states"]):
    p = _prediction(denoiser, proc, x, jnp.broadcast_to(times[k], x.shape[:1]))
    rows = _rows(p, x, *(jnp.broadcast_to(a, x.shape[:1]) for a in (alpha_K[k + 1], alpha_K[k])))
    x = draw.race(rows, jnp.asarray(vectors["traj_uniforms"][k]))
    np.testing.assert_array_equal(x, wanted)
  np.testing.assert_array_equal(x, vectors["traj_final"])
