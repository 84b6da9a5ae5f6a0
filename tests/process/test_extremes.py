# SPDX-License-Identifier: Apache-2.0
"""The largest of many normals: laws of values and places, and how many of them a softmax needs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dlm_jax.process import GaussianDuality, extremes


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_largest_normals_follow_their_law(rank):
  """Φ of the k-th largest of n normals is Beta(n − k + 1, k): 40 equally likely bins."""
  total, draws = 50_257, 20_000
  keys = jax.random.split(jax.random.key(rank), draws)
  values = jax.jit(jax.vmap(lambda key: extremes.largest_normals(key, total, 5)))(keys)
  assert (np.diff(values, axis=1) <= 0).all() and np.isfinite(values).all()
  tail = special.ndtr(-np.asarray(values, np.float64)[:, rank - 1])
  place = stats.beta.cdf(tail, rank, total - rank + 1)
  counts = np.bincount((place * 40).astype(int), minlength=40)
  assert stats.chisquare(counts).pvalue > 1e-3


def test_spacings_are_as_fine_as_the_temperature():
  """Neighbours differ by far less than τ = 1e-3 wants: nothing is lost to rounding."""
  reference = -special.ndtri(-np.expm1(-np.cumsum(np.full(5, 1.0) / (50_257 - np.arange(5)))))
  gaps = jnp.cumsum(jnp.full(5, 1.0) / (50_257 - jnp.arange(5)))
  ours = -jax.scipy.special.ndtri(-jnp.expm1(-gaps))
  np.testing.assert_allclose(ours, reference, rtol=0, atol=5e-6)


def test_no_draw_is_infinite(monkeypatch):
  """Generators of exponentials return 0 once in 2²³ draws; then the largest would be infinite."""
  key = jax.random.split(jax.random.key(5), 2**20)[82083]
  assert np.isfinite(extremes.largest_normals(key, 50_257, 8)).all()
  monkeypatch.setattr(jax.random, "exponential", lambda rng, shape: jnp.zeros(shape))
  values = extremes.largest_normals(key, 50_257, 8)
  assert np.isfinite(values).all() and values[0] < 8


def test_distinct_numbers_come_in_every_order():
  orders = {order: i for i, order in enumerate(itertools.permutations(range(5), 3))}
  keys = jax.random.split(jax.random.key(0), 12_000)
  drawn = np.asarray(jax.jit(jax.vmap(lambda key: extremes.distinct(key, 5, 3)))(keys))
  counts = np.zeros(len(orders))
  for row in drawn.tolist():
    counts[orders[tuple(row)]] += 1
  assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("vocab_size", "wanted"), [(50_258, 8), (4096, 7), (64, None)])
def test_how_many_are_enough(vocab_size, wanted):
  assert GaussianDuality(vocab_size=vocab_size).enough(1e-3) == wanted


def test_soft_tokens_need_more_and_hard_ones_less():
  duality = GaussianDuality(vocab_size=50_258)
  counts = [duality.enough(tau) for tau in (1e-10, 1e-4, 1e-3, 3e-3)]
  assert counts == sorted(counts) and counts[0] <= 2
  assert duality.enough(0.1) is None and counts[0] == 2
  for tau in (0.0, -1e-3):
    with pytest.raises(ValueError, match="must be positive"):
      duality.enough(tau)


@pytest.mark.parametrize("shape", [pytest.param("flat", marks=pytest.mark.slow), "peaked", "some"])
def test_the_rest_of_the_softmax_is_below_rounding(shape):
  """What is left out, on average over positions, is less than float32 resolves in a sum of 1."""
  size, tau, rows = 4096, 1e-3, 4096
  duality, rng = GaussianDuality(vocab_size=size), np.random.default_rng(0)
  p0 = np.zeros(size)
  p0[: {"flat": size, "peaked": 1, "some": 20}[shape]] = 1
  signal, spread = (float(x) for x in duality.coefficients(0.0))
  w = signal * p0 / p0.sum() + spread * rng.normal(size=(rows, size))
  weights = special.softmax(w / tau, axis=1)
  left_out = lambda count: np.partition(weights, -count)[:, :-count].sum(1).mean()  # noqa: E731
  count = duality.enough(tau)
  assert left_out(count) < 2.0**-24
  if shape == "flat":  # and not much fewer would do
    assert left_out(count // 2) > 2.0**-24


def _both_ways(size, draws, t):
  """Return (argmax w, greatest weight) of a token, from all entries of w and from a few."""
  duality = GaussianDuality(vocab_size=size)
  tokens, places = jnp.full(draws, 3), jnp.arange(draws)

  def dense(rng):
    w = duality.diffuse(jax.nn.one_hot(tokens, size), duality.noise(rng, places), t)
    return jnp.argmax(w, -1), jax.nn.softmax(duality.temper(w, 0.01)).max(-1)

  def few(rng):
    ids, w = duality.diffuse_data(rng, tokens, places, t, 24)
    best = jnp.take_along_axis(ids, jnp.argmax(w, -1, keepdims=True), -1)[:, 0]
    return best, jax.nn.softmax(duality.temper(w, 0.01)).max(-1)

  return [jax.tree.map(np.asarray, jax.jit(f)(jax.random.key(5))) for f in (dense, few)], duality


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_few_entries_of_data_have_the_law_of_all(t):
  """The hard state survives with α and is uniform otherwise; weights are as without the trick."""
  size, draws = 128, 6000
  ((z, weight), (z_few, weight_few)), duality = _both_ways(size, draws, t)
  alpha = float(duality.process.schedule.alpha(t))
  kept = alpha + (1 - alpha) / size
  for state in (z, z_few):
    assert stats.binomtest(int((state == 3).sum()), draws, kept).pvalue > 1e-3
  others = np.bincount(z_few[z_few != 3], minlength=size)
  assert others[3] == 0 and stats.chisquare(np.delete(others, 3)).pvalue > 1e-3
  assert stats.ks_2samp(weight, weight_few).pvalue > 1e-3


def test_a_position_draws_alike_in_any_chunk():
  duality = GaussianDuality(vocab_size=4096)
  run = jax.jit(functools.partial(duality.diffuse_data, jax.random.key(0), t=0.3, count=7))
  whole = run(jnp.arange(6), jnp.arange(6))
  part = run(jnp.arange(4, 6), jnp.arange(4, 6))
  for a, b in zip(whole, part, strict=True):
    np.testing.assert_array_equal(a[4:], b)
  assert all(
    len(set(row)) == 8 and row[0] == i for i, row in enumerate(np.asarray(whole[0]).tolist())
  )


@pytest.mark.parametrize(("size", "count"), [(1000, 3), (128, 2), (300, 7), (20, 20)])
def test_largest_entries(size, count):
  """Across tiles and within one, padding and minus infinities included."""
  values = np.random.default_rng(0).normal(size=(4, 5, size)).astype(np.float32)
  values[0, 0, :count] += 9  # all in one tile
  values[0, 1, count:] = -np.inf  # all other tiles have none
  found, places = extremes.largest(jnp.asarray(values), count)
  wanted = np.argsort(-values, axis=-1, kind="stable")[..., :count]
  np.testing.assert_array_equal(places, wanted)
  np.testing.assert_array_equal(found, np.take_along_axis(values, wanted, -1))
