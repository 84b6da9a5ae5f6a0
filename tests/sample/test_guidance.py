# SPDX-License-Identifier: Apache-2.0
"""Guidance: the law of samples by enumeration, of predictions that are sharpened by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dlm_jax import models, process, sample
from dlm_jax.errors import InputError

SAMPLES, L, WEIGHT = 8_192, 3, 0.8
PROC = process.Absorbing(vocab_size=toy.VOCABULARY, mask_id=toy.MASK)
START = [toy.MASK, 1, toy.MASK]


def _law(weight, groups, start=None):
  """Return the law of groups revealed one after the other by p(x | z)^(1 + w) / p(x | masks)^w."""
  tokens = toy.states(L)
  probs = toy._predictions(toy.make(L), PROC, L, 0.0, 1.0, 1.0)
  nothing = probs[toy.codes(np.full(L, toy.MASK))]
  with np.errstate(divide="ignore", invalid="ignore"):
    probs = np.where(probs > 0, probs ** (1 + weight) / nothing**weight, 0.0)
  probs /= probs.sum(-1, keepdims=True)
  law = toy.initial_law(PROC, L, start)
  for group in groups:
    chosen = np.isin(np.arange(L), group)[None, :, None]
    masked = (tokens == toy.MASK)[..., None]
    law = toy._apply(law, np.where(chosen & masked, probs, np.eye(toy.VOCABULARY)[tokens]))
  return law


def _generate(**options):
  generate = functools.partial(sample.generate, batch=SAMPLES, length=L, **options)
  return np.asarray(jax.jit(generate, static_argnums=1)(toy.make(L), PROC, jax.random.key(0)))


@pytest.mark.parametrize("start", [None, START])
def test_law(start):
  given = {} if start is None else {"prompt": jnp.asarray(start)}
  tokens_BL = _generate(steps=2, order=(0, 1, 1), guidance=WEIGHT, **given)
  groups = [[0], [1, 2]]
  assert toy.p_value(tokens_BL, _law(WEIGHT, groups, start)) > 1e-4
  assert toy.p_value(tokens_BL, _law(0.0, groups, start)) < 1e-6


def test_one_at_a_time():
  tokens_BL = _generate(steps=1, sampler="first_hitting", guidance=WEIGHT)
  orders = ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0])
  law = sum(_law(WEIGHT, [[i] for i in order]) for order in orders) / len(orders)
  assert toy.p_value(tokens_BL, law) > 1e-4


def test_none_is_no_guidance_and_may_be_traced():
  plain = _generate(steps=2, order="spaced")
  np.testing.assert_array_equal(_generate(steps=2, order="spaced", guidance=0.0), plain)

  @jax.jit
  def traced(weight):
    given = {"batch": SAMPLES, "length": L, "steps": 2, "order": "spaced", "guidance": weight}
    return sample.generate(toy.make(L), PROC, jax.random.key(0), **given)

  np.testing.assert_array_equal(traced(0.0), plain)
  guided = _generate(steps=2, order="spaced", guidance=0.5)
  np.testing.assert_array_equal(traced(0.5), guided)
  assert np.any(guided != plain)


def test_any_function_of_logits():
  denoiser = toy.make(L)
  given = {"batch": 64, "length": L, "steps": 2, "guidance": 0.5}
  of_function = sample.from_logits(lambda tokens, sigma: denoiser(tokens, sigma))
  rng = jax.random.key(1)
  np.testing.assert_array_equal(
    sample.generate(of_function, PROC, rng, **given), sample.generate(denoiser, PROC, rng, **given)
  )


def test_refused():
  options = {"batch": 1, "length": L, "steps": 1}
  generate = functools.partial(sample.generate, toy.make(L), PROC, jax.random.key(0), **options)
  with pytest.raises(InputError, match=r"guidance=-1.0 must be in \[0"):
    generate(guidance=-1)
  with pytest.raises(InputError, match="has no option 'guidance'"):
    generate(guidance=0.5, sampler="analytic")
  config = models.DiTConfig(vocab_size=toy.VOCABULARY, dim=8, layers=1, heads=2, mask_noise=2)
  model = models.DiT(config)
  params = model.init(jax.random.key(0), *model.inputs(L))["params"]
  noisy = models.Denoiser(model, params)
  with pytest.raises(InputError, match=r"guidance=0.5 needs one prediction .* these take noise"):
    sample.generate(noisy, PROC, jax.random.key(0), guidance=0.5, **options)
