# SPDX-License-Identifier: Apache-2.0
"""The law of the ancestral sampler in random order against enumeration of the reverse chain.

A denoiser with a table of conditionals (deliberately not those of any joint law, so that the order
of reveals matters), three tokens and a mask, L = 3. Seeds are fixed: P > 1e-4 is "follows the
law", P < 1e-6 is "does not", with 20,000 samples or more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dlm_jax import process, sample, schedules

FOLLOWS, DIFFERS = 1e-4, 1e-6
SAMPLES, L = 24_576, 3
# α(1e-5) = 0.68: a third of the masks is still there when the noise is removed.
LATE = schedules.Polynomial(power=0.1)


def _process(schedule=None):
  schedule = schedule or schedules.LogLinear()
  return process.Absorbing(vocab_size=toy.VOCABULARY, mask_id=toy.MASK, schedule=schedule)


def _generate(denoiser, proc, steps, *, seed=0, samples=SAMPLES, length=L, **options):
  order = {} if "precision" in options else {"order": "random"}
  options = {"sampler": "ancestral", **order, **options}
  generate = jax.jit(
    functools.partial(sample.generate, batch=samples, length=length, steps=steps, **options),
    static_argnums=1,
  )
  return np.asarray(generate(denoiser, proc, jax.random.key(seed)))


@functools.cache
def _plain_samples(steps):
  return _generate(toy.make(L), _process(), steps, seed=steps)


@pytest.mark.first_case
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_law_of_the_reverse_chain(steps):
  law = toy.chain_law(toy.make(L), _process(), L, steps)
  assert toy.p_value(_plain_samples(steps), law) > FOLLOWS


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_a_wrong_reveal_probability_is_noticed(steps):
  """Enumerate with another schedule: the same test must fail."""
  wrong = toy.chain_law(toy.make(L), _process(schedules.Cosine()), L, steps)
  assert toy.p_value(_plain_samples(steps), wrong) < DIFFERS


@pytest.mark.parametrize("steps,other", [(1, 2), (2, 1), (2, 3), (3, 8)])
def test_a_wrong_number_of_steps_is_noticed(steps, other):
  wrong = toy.chain_law(toy.make(L), _process(), L, other)
  assert toy.p_value(_plain_samples(steps), wrong) < DIFFERS


@pytest.mark.parametrize(
  "schedule",
  [schedules.Cosine(), pytest.param(schedules.Polynomial(power=2.0), marks=pytest.mark.slow)],
)
def test_law_under_other_schedules(schedule):
  proc = _process(schedule)
  tokens = _generate(toy.make(L), proc, 3)
  assert toy.p_value(tokens, toy.chain_law(toy.make(L), proc, L, 3)) > FOLLOWS
  assert toy.p_value(tokens, toy.chain_law(toy.make(L), _process(), L, 3)) < DIFFERS


def test_the_network_is_given_sigma_of_the_step():
  """A denoiser that listens to σ = −log α(t): evaluated at the start of each step."""
  denoiser = toy.make(L, seed=3, tilt=0.5)
  tokens = _generate(denoiser, _process(), 3)
  assert toy.p_value(tokens, toy.chain_law(denoiser, _process(), L, 3)) > FOLLOWS
  deaf = toy.chain_law(toy.make(L, seed=3), _process(), L, 3)
  assert toy.p_value(tokens, deaf) < DIFFERS


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy", "none"])
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_law_of_the_noise_removal(noise_removal, steps):
  denoiser, proc = toy.make(L, seed=4), _process(LATE)
  tokens = _generate(denoiser, proc, steps, noise_removal=noise_removal)
  laws = {
    name: toy.chain_law(denoiser, proc, L, steps, noise_removal=name)
    for name in ("ancestral", "greedy", "none")
  }
  for name, law in laws.items():
    p = toy.p_value(tokens, law)
    assert p > FOLLOWS if name == noise_removal else p < DIFFERS, (name, p)
  assert (tokens == toy.MASK).any() == (noise_removal == "none")


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"nucleus": 0.7}])
def test_sharpening_acts_on_the_prediction_of_the_clean_token(options):
  """The reveal times keep their law; only the token at a reveal is sharpened."""
  denoiser, proc = toy.make(L, seed=5, scale=1.0), _process(schedules.LogLinear())
  tokens = _generate(denoiser, proc, 3, **options)
  assert toy.p_value(tokens, toy.chain_law(denoiser, proc, L, 3, **options)) > FOLLOWS
  assert toy.p_value(tokens, toy.chain_law(denoiser, proc, L, 3)) < DIFFERS
  # Without noise removal the number of masks left is that of the process, whatever the options.
  late = _process(LATE)
  tokens = _generate(denoiser, late, 2, noise_removal="none", **options)
  law = toy.chain_law(denoiser, late, L, 2, noise_removal="none", **options)
  assert toy.p_value(tokens, law) > FOLLOWS


def test_law_given_frozen_tokens():
  denoiser, proc = toy.make(L), _process()
  start = jnp.array([toy.MASK, 1, toy.MASK])
  prompt = jnp.broadcast_to(start, (SAMPLES, L))
  tokens = _generate(denoiser, proc, 2, prompt=prompt, frozen=prompt != toy.MASK)
  assert np.all(tokens[:, 1] == 1)
  assert toy.p_value(tokens, toy.chain_law(denoiser, proc, L, 2, start=start)) > FOLLOWS


@pytest.mark.slow
def test_law_of_the_legacy_race():
  """No token is rare here, so the float32 race of the public code follows the same law."""
  tokens = _generate(toy.make(L), _process(), 3, precision="legacy")
  assert toy.p_value(tokens, toy.chain_law(toy.make(L), _process(), L, 3)) > FOLLOWS


# --- first hitting ------------------------------------------------------------------------------


def test_first_hitting_is_the_limit_of_many_steps():
  """By enumeration alone: the chain's law approaches random order, one token at a time."""
  denoiser, proc = toy.make(2), _process()
  limit = toy.first_hitting_law(denoiser, proc, 2)
  distances = [
    np.abs(toy.chain_law(denoiser, proc, 2, steps) - limit).sum() for steps in (4, 16, 64)
  ]
  assert distances[0] > 3 * distances[1] > 9 * distances[2]
  assert distances[2] < 0.02


def _first_hitting(denoiser, proc, *, seed=0, **options):
  generate = jax.jit(
    functools.partial(sample.generate, batch=SAMPLES, length=L, sampler="first_hitting", **options),
    static_argnums=1,
  )
  return np.asarray(generate(denoiser, proc, jax.random.key(seed)))


@pytest.mark.parametrize(
  "schedule",
  [schedules.LogLinear(), pytest.param(schedules.Cosine(), marks=pytest.mark.slow)],
)
def test_law_of_first_hitting(schedule):
  denoiser, proc = toy.make(L), _process(schedule)
  tokens = _first_hitting(denoiser, proc)
  assert toy.p_value(tokens, toy.first_hitting_law(denoiser, proc, L)) > FOLLOWS
  assert toy.p_value(tokens, toy.chain_law(denoiser, proc, L, 3)) < DIFFERS


def test_law_of_first_hitting_given_frozen_tokens():
  denoiser, proc = toy.make(L), _process()
  start = jnp.array([2, toy.MASK, toy.MASK])
  prompt = jnp.broadcast_to(start, (SAMPLES, L))
  tokens = _first_hitting(denoiser, proc, prompt=prompt, frozen=prompt != toy.MASK)
  assert toy.p_value(tokens, toy.first_hitting_law(denoiser, proc, L, start=start)) > FOLLOWS
