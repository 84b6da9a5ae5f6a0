# SPDX-License-Identifier: Apache-2.0
"""Categorical draws: laws by chi-square, the tail, the edges, sharpening by hand, the race.

Every law test has a fixed seed, so it either always passes or always fails. The thresholds are
P > 1e-4 for "follows the law" and P < 1e-6 for "does not".
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dlm_jax import draw
from dlm_jax.arrays import NEG_INF

FOLLOWS, DIFFERS = 1e-4, 1e-6
LARGEST_UNIFORM = np.float32(1 - 2.0**-24)
categorical = jax.jit(draw.categorical)
gumbel_max = jax.jit(jax.vmap(draw.gumbel_max, in_axes=(None, 0)))


def _draw_many(weights_V, samples, seed, *, chunk=2048):
  """Return `samples` draws from one row of weights, `chunk` at a time."""
  weights_V = jnp.asarray(weights_V, jnp.float32)

  @jax.jit
  def some(rng):
    uniform = draw.uniforms(rng, (chunk,))
    return jax.vmap(lambda u: draw.categorical(weights_V, u))(uniform)

  keys = jax.random.split(jax.random.key(seed), -(-samples // chunk))
  return np.concatenate([np.asarray(some(key)) for key in keys])[:samples]


def _p_value(tokens, probs_V):
  """Chi-square against exact probabilities, small cells joined until they expect 20 draws.

  Cells are joined twice, with neighbours in the vocabulary and with tokens as rare as themselves:
  a draw that misplaces a block fails the first, one that loses the tail fails the second.
  """
  expected_V = np.asarray(probs_V, np.float64) / np.sum(probs_V, dtype=np.float64) * len(tokens)
  observed_V = np.bincount(tokens, minlength=len(expected_V))
  assert np.all(observed_V[expected_V == 0] == 0), "a token of weight 0 was drawn"
  p_values = []
  for order in (np.arange(len(expected_V)), np.argsort(expected_V, kind="stable")):
    bins = np.unique(np.cumsum(expected_V[order]) // 20, return_inverse=True)[1]
    if expected_V[order][bins == bins[-1]].sum() < 20:  # the last bin may be left with too little
      bins[bins == bins[-1]] = max(bins[-1] - 1, 0)
    expected = np.bincount(bins, expected_V[order])
    observed = np.bincount(bins, observed_V[order])
    p_values.append(scipy.stats.chisquare(observed, expected).pvalue)
  return min(p_values)


def _heavy_tail(vocabulary=50258, tail=49_950, mass=1e-3):
  """Return float64 probabilities: a head of 1 − mass, a tail of `tail` tokens sharing `mass`.

  Half of the tail is uniform, the other half is 10 times rarer; the rarest have about 4e-9.
  """
  rng = np.random.default_rng(3)
  head = rng.dirichlet(np.ones(vocabulary - tail)) * (1 - mass)
  rest = np.where(np.arange(tail) % 2 == 0, 10.0, 1.0)
  probs = np.concatenate([head, rest / rest.sum() * mass])
  order = rng.permutation(vocabulary)
  return probs[order], order >= vocabulary - tail


@pytest.mark.first_case
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 255, 256, 257, 512, 4096, 50258])
def test_law(vocabulary):
  rng = np.random.default_rng(vocabulary)
  probs = rng.dirichlet(np.full(vocabulary, 0.3)).astype(np.float32)
  samples = 16_384 if vocabulary > 10_000 else 65_536
  tokens = _draw_many(probs, samples, seed=vocabulary)
  assert tokens.dtype == np.int32 and tokens.min() >= 0 and tokens.max() < vocabulary
  if vocabulary > 1:
    assert _p_value(tokens, probs) > FOLLOWS


def test_law_test_can_fail():
  probs = np.random.default_rng(0).dirichlet(np.ones(257))
  tokens = _draw_many(probs, 65_536, seed=0)
  wrong = probs * (1 + 0.1 * np.sin(np.arange(257)))
  assert _p_value(tokens, probs) > FOLLOWS
  assert _p_value(tokens, wrong) < DIFFERS


def test_weights_need_not_be_normalised():
  probs = np.random.default_rng(1).dirichlet(np.ones(300)).astype(np.float32)
  uniform = draw.uniforms(jax.random.key(0), (4096,))
  rows = jnp.broadcast_to(probs, (4096, 300))
  np.testing.assert_array_equal(categorical(rows, uniform), categorical(rows * 1024.0, uniform))
  assert _p_value(_draw_many(probs * 1e-20, 65_536, seed=5), probs) > FOLLOWS


def test_rows_are_independent_draws_from_their_own_weights():
  weights = np.random.default_rng(2).dirichlet(np.ones(5), size=(2, 3)).astype(np.float32)
  uniform = draw.uniforms(jax.random.key(1), (20_000, 2, 3))
  draw_all = jax.jit(jax.vmap(draw.categorical, in_axes=(None, 0)))
  tokens = np.asarray(draw_all(jnp.asarray(weights), uniform))
  assert tokens.shape == (20_000, 2, 3)
  for row in np.ndindex(2, 3):
    assert _p_value(tokens[:, *row], weights[row]) > FOLLOWS
  joint = tokens[:, 0, 0] * 5 + tokens[:, 0, 1]
  assert _p_value(joint, np.outer(weights[0, 0], weights[0, 1]).ravel()) > FOLLOWS


# --- the tail -----------------------------------------------------------------------------------


def _tail_draws(samples):
  probs, in_tail = _heavy_tail()
  tokens = _draw_many(probs, samples, seed=11, chunk=4096)
  return probs, in_tail, tokens


def test_tail_is_drawn_at_its_frequency():
  samples = 131_072
  probs, in_tail, tokens = _tail_draws(samples)
  hits = int(in_tail[tokens].sum())
  expected = probs[in_tail].sum() * samples  # about 131
  assert scipy.stats.binomtest(hits, samples, expected / samples).pvalue > FOLLOWS
  # The rare half of the tail, about 4e-9 each: it has a 1/11 share of the tail's mass.
  rare = in_tail & (probs < 1e-8)
  rare_hits = int(rare[tokens].sum())
  share = probs[rare].sum()
  assert scipy.stats.binomtest(rare_hits, samples, share).pvalue > FOLLOWS
  assert rare_hits > 0
  # Almost every hit is another token: 131 draws from 25,000 equally likely ones rarely collide.
  assert len(np.unique(tokens[in_tail[tokens]])) > 0.97 * hits


def test_tail_tokens_are_reachable_one_by_one():
  """Aim both uniforms at a token: the first at its block's middle, the second at its own share.

  The tokens of the tail's common half have about 7e-6 of their block; float32 finds each.
  """
  probs, in_tail = _heavy_tail()
  weights = jnp.asarray(probs, jnp.float32)
  common = np.flatnonzero(in_tail & (probs > 1e-8))[::23]  # a thousand tokens, all blocks
  padded = np.pad(probs, (0, -len(probs) % 256)).reshape(-1, 256)
  ends = np.cumsum(padded.sum(axis=1)) / probs.sum()
  first = (ends - padded.sum(axis=1) / probs.sum() / 2)[common // 256]
  shares = padded / padded.sum(axis=1, keepdims=True)
  second = (np.cumsum(shares, axis=1) - shares / 2)[common // 256, common % 256]
  uniform = jnp.asarray(np.stack([first, second], axis=-1), jnp.float32)
  tokens = jax.jit(jax.vmap(draw.categorical, in_axes=(None, 0)))(weights, uniform)
  np.testing.assert_array_equal(tokens, common)


def test_tokens_of_probability_1e_7_are_present_in_aggregate():
  """20,000 tokens of 1e-7 each (0.2 % in all) spread over every block of a real vocabulary."""
  vocabulary, rare = 50258, 20_000
  where = np.random.default_rng(4).permutation(vocabulary)
  probs = np.zeros(vocabulary)
  probs[where[:rare]] = 1e-7
  probs[where[rare : rare + 50]] = (1 - rare * 1e-7) / 50
  samples = 65_536
  tokens = _draw_many(probs, samples, seed=13, chunk=4096)
  is_rare = np.zeros(vocabulary, bool)
  is_rare[where[:rare]] = True
  hits = int(is_rare[tokens].sum())
  assert scipy.stats.binomtest(hits, samples, rare * 1e-7).pvalue > FOLLOWS
  assert np.all(probs[tokens] > 0)


def _gumbel_draws(probs, samples, chunk=1024):
  logits_V = jnp.log(jnp.asarray(probs, jnp.float32))
  draw_one = jax.jit(
    lambda keys: jax.lax.map(lambda k: draw.gumbel_max(logits_V, k), keys, batch_size=chunk)
  )
  return np.asarray(draw_one(jax.random.split(jax.random.key(17), samples)))


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("vocabulary", [1, 5, 257])
def test_gumbel_law(vocabulary):
  probs = np.random.default_rng(vocabulary).dirichlet(np.full(vocabulary, 0.3)).astype(np.float32)
  probs[vocabulary // 2 + 1 :: 7] = 0.0
  tokens = _gumbel_draws(probs, 32_768)
  assert tokens.dtype == np.int32 and np.all(probs[tokens] > 0)
  if vocabulary > 1:
    assert _p_value(tokens, probs) > FOLLOWS


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_gumbel_reaches_the_tail():
  """The noise is the fine one, and a tail of 0.1 % of the mass comes up as often as it should."""
  probs, in_tail = _heavy_tail(vocabulary=512, tail=480)
  hits = int(in_tail[_gumbel_draws(probs, 65_536)].sum())
  assert scipy.stats.binomtest(hits, 65_536, probs[in_tail].sum()).pvalue > FOLLOWS
  keys = jax.random.split(jax.random.key(3), 64)
  for mode, same in (("high", True), ("low", False)):
    noise = jax.jit(jax.vmap(lambda k: jax.random.gumbel(k, (512,), mode=mode)))(keys)  # noqa: B023
    tokens = gumbel_max(jnp.zeros(512), keys)
    assert np.array_equal(tokens, jnp.argmax(noise, axis=-1)) == same


# --- edges -----------------------------------------------------------------------------------

EXTREMES = [
  (first, second) for first in (0.0, 0.5, LARGEST_UNIFORM) for second in (0.0, 0.5, LARGEST_UNIFORM)
]


@pytest.mark.parametrize("vocabulary", [2, 5, 256, 257, 600, 50258])
def test_weight_zero_is_never_drawn(vocabulary):
  """Put all weight on a few tokens and push both uniforms to their ends."""
  rng = np.random.default_rng(vocabulary)
  scattered = rng.choice(vocabulary, size=min(3, vocabulary - 1), replace=False)
  weights = np.zeros((4, vocabulary), np.float32)
  for row, support in enumerate(([0], [vocabulary - 1], [vocabulary // 2], scattered)):
    weights[row, support] = rng.uniform(0.1, 3.0, size=len(support))
  weights = np.repeat(weights, len(EXTREMES), axis=0)
  uniform = jnp.asarray(np.tile(EXTREMES, (4, 1)), jnp.float32)
  tokens = np.asarray(categorical(jnp.asarray(weights), uniform))
  assert np.all(weights[np.arange(len(weights)), tokens] > 0)


@pytest.mark.parametrize("seed", range(2))
def test_rounding_never_leaves_the_support(seed):
  """Zeros at the end of blocks and rows, tiny and huge weights: the ends stay in the support."""
  rng = np.random.default_rng(seed)
  weights = np.exp(rng.uniform(-80, 80, size=(64, 700))).astype(np.float32)
  weights[rng.uniform(size=weights.shape) < 0.5] = 0.0
  weights[:, -200:] = 0.0
  weights[:, 250:300] = 0.0
  weights[:, 0] = 0.0
  for extreme in EXTREMES:
    uniform = jnp.broadcast_to(jnp.asarray(extreme, jnp.float32), (64, 2))
    tokens = np.asarray(categorical(jnp.asarray(weights), uniform))
    assert np.all(weights[np.arange(64), tokens] > 0)


@pytest.mark.parametrize("vocabulary", [1, 5, 256, 700])
def test_a_softmax_draws_what_its_weights_draw(vocabulary):
  """The same tokens from the same uniforms, none of logit −inf, and the probabilities of each."""
  rng_logits, rng_token = jax.random.split(jax.random.key(8))
  logits = 4 * jax.random.normal(rng_logits, (3, 400, vocabulary)) + 100
  logits = logits.at[:, :, 1::7].set(-jnp.inf)
  uniform = draw.uniforms(rng_token, (3, 400))
  tokens, probability = _softmax_draw(logits, uniform)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  assert np.array_equal(tokens, categorical(weights, uniform))
  assert not np.any(np.asarray(tokens) % 7 == 1)
  expected = jnp.take_along_axis(jax.nn.softmax(logits), tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(probability, expected, rtol=1e-5)


@jax.jit
def _softmax_draw(logits, uniform):
  softmax = draw.softmax(logits)
  tokens = softmax.draw(uniform)
  return tokens, softmax.probability(tokens)


def test_uniforms_are_in_the_half_open_unit_interval():
  uniform = np.asarray(draw.uniforms(jax.random.key(0), (1000, 50)))
  assert uniform.shape == (1000, 50, 2) and uniform.dtype == np.float32
  assert uniform.min() >= 0 and uniform.max() < 1
  assert abs(np.corrcoef(uniform.reshape(-1, 2).T)[0, 1]) < 0.02


# --- sharpening ------------------------------------------------------------------------------


def _log(probs):
  return jnp.log(jnp.asarray(probs, jnp.float32))


def _sharpen(log_probs, **options):
  return np.asarray(jax.nn.softmax(draw.sharpen(log_probs, **options)))


@pytest.mark.parametrize("temperature", [1e5, 1e8, jnp.float32(1e8)])
def test_no_temperature_makes_the_impossible_possible(temperature):
  """The mask's −1e6 is no logit of the network: divided by 1e5 it would let the mask in."""
  logits = jnp.array([0.3, -2.0, NEG_INF, NEG_INF + 40.0])
  np.testing.assert_allclose(_sharpen(logits, temperature=temperature), [0.5, 0.5, 0, 0], atol=1e-4)


def test_sharpen_defaults_leave_the_distribution():
  probs = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
  np.testing.assert_allclose(_sharpen(_log(probs)), probs, rtol=1e-6)


def test_temperature_by_hand():
  # T = 1/2 squares: (.25, .09, .04)/.38;  T = 2 takes roots: √(9, 4, 1) = (3, 2, 1).
  np.testing.assert_allclose(
    _sharpen(_log([0.5, 0.3, 0.2]), temperature=0.5),
    np.array([0.25, 0.09, 0.04]) / 0.38,
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    _sharpen(_log(np.array([9.0, 4.0, 1.0]) / 14), temperature=2.0),
    np.array([3.0, 2.0, 1.0]) / 6,
    rtol=1e-5,
  )


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-45, 0.0])
def test_temperatures_tend_to_the_most_probable_token(temperature, traced):
  """Logits over 1e-38 overflow unless the largest is 0; the mask's −1e6 is behind all others."""
  logits = jnp.array([[-3.0, 1.0, 20.0, 5.0, NEG_INF], [7.0, -jnp.inf, 6.0, NEG_INF, 0.0]])
  run = lambda t: draw.sharpen(logits, temperature=t, top_k=4)  # noqa: E731
  found = jax.jit(run)(temperature) if traced else run(temperature)
  np.testing.assert_array_equal(jax.nn.softmax(found), [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]])
  uniform = draw.uniforms(jax.random.key(0), (2,))
  np.testing.assert_array_equal(draw.softmax(found).draw(uniform), [2, 0])
  assert np.isneginf(found[0, 4]), "what top-k leaves out is what is impossible"


@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
@pytest.mark.parametrize(
  "options",
  [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"nucleus": 0.5}, {"top_k": 1}],
  ids=str,
)
def test_logits_that_are_no_law_draw_no_token(wrong, options):
  logits = jnp.zeros((3, 600)).at[1, 500].set(wrong).at[2, 9].set(-jnp.inf)
  uniform = draw.uniforms(jax.random.key(0), (3,))
  drawn = draw.softmax(draw.sharpen(logits, **options)).draw(uniform)
  np.testing.assert_array_equal(drawn == draw.NONE, [False, True, False])
  np.testing.assert_array_equal(draw.most_probable(logits), [0, draw.NONE, 0])
  spread = jax.random.uniform(jax.random.key(1), logits.shape)
  for drawn in (draw.categorical(jnp.exp(logits), uniform), draw.race(jnp.exp(logits), spread)):
    np.testing.assert_array_equal(drawn == draw.NONE, [False, True, False])


@pytest.mark.parametrize("traced", [False, True])
def test_ties_are_kept_by_temperatures_above_0(traced):
  logits = jnp.array([1.0, 3.0, 3.0, NEG_INF])
  run = lambda t: draw.sharpen(logits, temperature=t)  # noqa: E731
  run = jax.jit(run) if traced else run
  np.testing.assert_array_equal(jax.nn.softmax(run(1e-37)), [0, 0.5, 0.5, 0])
  np.testing.assert_array_equal(jax.nn.softmax(run(0.0)), [0, 1, 0, 0])


@pytest.mark.parametrize(
  "nucleus,kept",
  [
    (0.3, [0]),  # the first token alone reaches it
    (0.45, [0, 1]),
    (0.65, [0, 1]),
    (0.75, [0, 1, 2]),
    (0.95, [0, 1, 2, 3]),
    (1.0, [0, 1, 2, 3]),
  ],
)
def test_nucleus_by_hand(nucleus, kept):
  probs = np.array([0.4, 0.3, 0.2, 0.1])
  expected = np.where(np.isin(np.arange(4), kept), probs, 0)
  order = np.array([2, 0, 3, 1])  # the rule knows nothing of token order
  weights = _sharpen(_log(probs[order]), nucleus=nucleus)
  np.testing.assert_allclose(
    weights / weights.sum(), expected[order] / expected.sum(), rtol=1e-5, atol=1e-12
  )
  assert np.all((weights > 0) == (expected[order] > 0))


def test_nucleus_acts_after_temperature():
  # T = 1/2 gives (.658, .237, .105): 0.6 keeps one token; at T = 1 it keeps two.
  log_probs = _log([0.5, 0.3, 0.2])
  assert int((_sharpen(log_probs, temperature=0.5, nucleus=0.6) > 0).sum()) == 1
  assert int((_sharpen(log_probs, nucleus=0.6) > 0).sum()) == 2


def test_sharpen_keeps_impossible_tokens_impossible():
  log_probs = jnp.array([jnp.log(0.6), jnp.log(0.4), -1e6])
  for temperature in (0.1, 1.0, 3.0):
    assert _sharpen(log_probs, temperature=temperature)[2] == 0.0


# --- the race of the public code ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", "ab")
@pytest.mark.parametrize("update", ["ddpm", "ddpm_cache"])
def test_golden_race(golden, variant, update):
  """Same weights and uniforms as the reference: the same tokens."""
  vectors, config = golden(f"mdlm_sampler__{variant}")
  drawn = draw.race(jnp.asarray(vectors[f"{update}_probs"]), jnp.asarray(vectors["uniform"]))
  kept = np.where(vectors["x"] == config["mask_index"], drawn, vectors["x"])
  np.testing.assert_array_equal(kept, vectors[f"{update}_next"])


def test_race_loses_the_tail():
  """One token of weight 1 against 50,000 of 2e-8: the tail's mass is 0.1 %.

  Among equal weights the race is won by the largest uniform, so the whole tail is represented by
  the maximum of its 50,000 uniforms, drawn by inverse CDF and put on float32's 2⁻²⁴ grid. The
  smallest exponential is then 6e-8, a tail token wins only if the other one is above 3, and
  about five sixths of the tail are lost. `categorical` draws the same weights at their mass.
  """
  tail, weight, samples = 50_000, 2e-8, 400_000
  rng = np.random.default_rng(5)
  largest = np.floor(rng.uniform(size=samples) ** (1 / tail) * 2.0**24) / 2.0**24
  largest = np.minimum(largest, LARGEST_UNIFORM)
  other = np.floor(rng.uniform(size=samples) * 2.0**24) / 2.0**24
  uniform = jnp.asarray(np.stack([other, largest], axis=-1), jnp.float32)
  weights = jnp.broadcast_to(jnp.array([1.0, weight], jnp.float32), uniform.shape)
  raced = int(np.asarray(draw.race(weights, uniform)).sum())
  mass = tail * weight / (1 + tail * weight)
  assert raced < 0.3 * mass * samples
  assert scipy.stats.binomtest(raced, samples, mass).pvalue < DIFFERS

  every = np.full(tail + 1, weight)
  every[0] = 1.0
  exact = int((_draw_many(every, 131_072, seed=19, chunk=4096) > 0).sum())
  assert scipy.stats.binomtest(exact, 131_072, mass).pvalue > FOLLOWS


def test_seeds_of_64_bits_in_32():
  assert [draw.fold_32(seed) for seed in (0, 5, 2**31, 2**32 - 1)] == [0, 5, 2**31, 2**32 - 1]
  for seeds in (
    [7 + (high << 32) for high in range(5000)],
    [low + (1 << 62) for low in range(5000)],
    [-1 - low for low in range(5000)],
  ):
    folded = {draw.fold_32(seed) for seed in seeds}
    assert len(folded) == len(seeds) and max(folded) < 2**32 and min(folded) >= 0
