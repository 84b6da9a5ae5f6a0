# SPDX-License-Identifier: Apache-2.0
"""Stretched rotary positions: the formula of the paper, number by number, and the network's."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny

from dlm_jax import models
from dlm_jax.models import Yarn, layers

# (channels, base, Yarn)
_CASES = {
  "Qwen3": (128, 1e6, Yarn(factor=4.0, original_length=32768)),
  "small": (16, 1e4, Yarn(factor=2.5, original_length=512, beta_fast=16.0, beta_slow=2.0)),
  "given": (64, 1e4, Yarn(factor=40.0, original_length=4096, attention=0.7, truncate=False)),
  "no room": (8, 1e6, Yarn(factor=8.0, original_length=7)),
}


def _wavelengths(channels, base):
  """Return λ_d = 2π b^(2d/D), positions per turn."""
  return [2 * math.pi * base ** (2 * d / channels) for d in range(channels // 2)]


def _frequencies(channels, base, yarn):
  """Return what the published program computes, one pair of channels after the other."""

  def pair(turns):  # solves original_length / λ_d = turns
    return math.log(yarn.original_length / (turns * 2 * math.pi), base) * channels / 2

  start, end = pair(yarn.beta_fast), pair(yarn.beta_slow)
  if yarn.truncate:
    start, end = math.floor(start), math.ceil(end)
  start, end = max(start, 0), min(end, channels - 1)
  found = []
  for d, wavelength in enumerate(_wavelengths(channels, base)):
    kept = 1 - min(max((d - start) / ((end - start) or 0.001), 0), 1)
    found.append((kept + (1 - kept) / yarn.factor) * 2 * math.pi / wavelength)
  return np.array(found)


@pytest.mark.parametrize("name", sorted(_CASES))
def test_frequencies(name):
  channels, base, yarn = _CASES[name]
  found = yarn.frequencies(channels, base)
  np.testing.assert_allclose(found, _frequencies(channels, base, yarn), rtol=1e-12)


@pytest.mark.parametrize("name", ["Qwen3", "small", "given"])
def test_ends_of_the_paper(name):
  """Equations 17 to 19: r = L/λ above β is left alone, below α divided by s; between, between."""
  channels, base, yarn = _CASES[name]
  found, kinds = yarn.frequencies(channels, base), set()
  for d, wavelength in enumerate(_wavelengths(channels, base)):
    turns, plain = yarn.original_length / wavelength, 2 * math.pi / wavelength
    step = base ** (2 / channels) if yarn.truncate else 1  # an end may move by one channel
    if turns > yarn.beta_fast * step:
      kinds.add("kept")
      np.testing.assert_allclose(found[d], plain, rtol=1e-12)
    elif turns < yarn.beta_slow / step:
      kinds.add("slowed")
      np.testing.assert_allclose(found[d], plain / yarn.factor, rtol=1e-12)
    else:
      kinds.add("between")
      assert plain / yarn.factor * (1 - 1e-12) <= found[d] <= plain * (1 + 1e-12)
  assert kinds == {"kept", "slowed", "between"}


def test_temperature():
  """Equation 22: √(1/t) = 0.1 ln s + 1, on cos and on sin."""
  for factor in (1.0, 2.0, 32.0):
    yarn = Yarn(factor=factor, original_length=64)
    np.testing.assert_allclose(yarn.temperature, 0.1 * math.log(factor) + 1)
    cos, sin = yarn.rotary_at(jnp.arange(9)[None], 16, 1e4)
    np.testing.assert_allclose(cos**2 + sin**2, yarn.temperature**2, rtol=1e-5)


def test_a_factor_of_1_changes_nothing():
  positions = jnp.arange(40).reshape(2, 20)
  plain = layers.rotary_at(positions, 16, 1e4)
  same = Yarn(factor=1.0, original_length=20).rotary_at(positions, 16, 1e4)
  for left, right in zip(plain, same, strict=True):
    np.testing.assert_allclose(left, right, atol=1e-5)


def test_a_network_uses_it():
  """Scores by hand: queries and keys turned at the stretched angles, times the temperature."""
  yarn = Yarn(factor=4.0, original_length=16, beta_fast=4.0, beta_slow=0.5)
  config = dataclasses.replace(tiny.DENSE, layers=1, length=64, yarn=yarn)
  model, params = tiny.make(config)
  tokens, positions = tiny.tokens(2, 6), jnp.array([[0, 3, 17, 30, 50, 63]])
  stretched = tiny.logits(model, params, tokens, positions, None)
  plain = tiny.logits(
    models.Decoder(dataclasses.replace(config, yarn=None)), params, tokens, positions, None
  )
  assert np.abs(np.asarray(stretched) - plain).max() > 1e-3
  # what the plain network says with each pair's position and scale put in by hand
  frequency = jnp.asarray(_frequencies(config.head_dim, config.rope_theta, yarn), jnp.float32)
  angle = positions[..., None] * frequency[None, None]
  scale = 0.1 * math.log(4.0) + 1

  def by_hand(positions, channels, base):
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("dlm_jax.models.decoder.rotary_at", by_hand)
    other = models.Decoder(dataclasses.replace(config, yarn=None, length=65))  # not compiled yet
    wanted = other.apply({"params": params}, tokens, positions, None)
  np.testing.assert_allclose(stretched, wanted, atol=2e-5)


@pytest.mark.parametrize(
  "fields, said",
  [
    ({"factor": 0.5}, "factor=0.5"),
    ({"factor": math.inf}, "factor=inf"),
    ({"factor": math.nan}, "factor=nan"),
    ({"original_length": 0}, "original_length=0"),
    ({"beta_fast": 1.0}, "below beta_fast=1.0"),
    ({"beta_slow": 0.0}, "beta_slow=0.0"),
    ({"attention": 0.0}, "attention=0.0"),
  ],
)
def test_numbers_that_do_not_fit(fields, said):
  with pytest.raises(ValueError, match=said):
    Yarn(**{"factor": 2.0, "original_length": 8, **fields})


def test_it_is_part_of_what_is_compiled():
  """A network is static: two stretches are two programs."""
  one, two = (
    dataclasses.replace(tiny.DENSE, yarn=Yarn(factor=f, original_length=8)) for f in (2.0, 3.0)
  )
  assert hash(models.Decoder(one)) is not None and one != two
  shapes = jax.eval_shape(models.Decoder(one).init, jax.random.key(0), jnp.zeros((1, 1), int))
  assert shapes["params"]
