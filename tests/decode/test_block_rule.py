# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a block: filters, selection, budgets, coupled noise, options."""

import functools
import itertools

import block_toy as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dlm_jax import draw, sample
from dlm_jax.decode import select

V, MASK = 11, 10
FOLLOWS, DIFFERS = 1e-4, 1e-6


def _options(**changes):
  """Return a rule and what its row asks for, as something that may be a key of a cache."""
  rule, asked = toy.split({"mask_id": MASK} | changes)
  return rule, tuple(asked.items())


def _logits(seed=0, size=4, scale=3.0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(size, V)) * scale, jnp.float32)


@functools.cache
def _rule(rule):
  return jax.jit(functools.partial(toy.reveal_one, rule))


def _row(options, key):
  return sample.RowOptions.make(1, key[None], **dict(options[1]))


def _reveal(options, logits_KV, masked, *, seed=0, step=0, start=0):
  masked_K = jnp.asarray(masked, bool)
  position_K = start + jnp.arange(len(masked))
  tokens_K = jnp.where(masked_K, MASK, 7)
  row = _row(options, jax.random.key(seed))
  return _rule(options[0])(row, tokens_K, masked_K, logits_KV, step, position_K)


# --- filters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdar_generate__a", "sdar_generate__b"])
def test_recorded_filters(golden, name):
  """9.5-b: top-k and top-p as the SDAR release computes them."""
  vectors, _ = golden(name)
  logits = jnp.asarray(vectors["filters/logits"])
  for key, options in (("top_k5", {"top_k": 5}), ("top_p0.8", {"nucleus": 0.8})):
    ours = np.asarray(draw.sharpen(logits, **options))
    np.testing.assert_array_equal(np.where(np.isinf(ours), -1e30, ours), vectors[f"filters/{key}"])


def _filter_in_numpy(logits_V, temperature, top_k, top_p):
  """Return the probabilities after temperature, top-k and top-p by sorting, in float64."""
  logits_V = logits_V.astype(np.float64) / temperature
  order = np.argsort(-logits_V, kind="stable")
  if top_k:
    logits_V = np.where(logits_V >= logits_V[order[top_k - 1]], logits_V, -np.inf)
  probs_V = np.exp(logits_V - logits_V.max())
  probs_V /= probs_V.sum()
  before = np.cumsum(probs_V[order]) - probs_V[order]
  probs_V[order[before > top_p]] = 0.0
  return probs_V / probs_V.sum()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (5, 0.6), (1, 1.0)])
def test_filters_against_sorting(temperature, top_k, top_p):
  """9.5-b: temperature, then top-k, then top-p."""
  logits_KV = _logits(3, size=6, scale=2.0)
  sharp_KV = draw.sharpen(logits_KV, temperature, top_p, top_k)
  ours_KV = jax.nn.softmax(sharp_KV, axis=-1)
  for ours_V, logits_V in zip(np.asarray(ours_KV), np.asarray(logits_KV), strict=True):
    expected_V = _filter_in_numpy(logits_V, temperature, top_k, top_p)
    np.testing.assert_allclose(ours_V, expected_V, atol=1e-6)


def test_top_k_keeps_ties():
  """9.5-b: what equals the k-th largest logit survives."""
  logits_V = jnp.asarray([3.0, 1.0, 1.0, 0.0])
  kept = np.isfinite(draw.sharpen(logits_V, top_k=2))
  assert kept.tolist() == [True, True, True, False]
  np.testing.assert_array_equal(draw.sharpen(logits_V, top_k=9), logits_V)


def test_temperature_zero_takes_the_most_probable_token():
  """9.5-b: no noise, the lowest id among ties, never the mask, confidence of temperature 1."""
  logits_KV = _logits(1).at[:, MASK].set(50.0)
  logits_KV = logits_KV.at[2, 3].set(20.0).at[2, 5].set(20.0)
  options = _options(temperature=0.0, strategy="sequential", steps=1)
  result = _reveal(options, logits_KV, [1, 1, 1, 1])
  expected_K = np.argmax(np.asarray(logits_KV)[:, :MASK], axis=-1)
  assert expected_K[2] == 3
  np.testing.assert_array_equal(result.tokens_BK, expected_K)
  probs_KV = jax.nn.softmax(logits_KV[:, :MASK], axis=-1)
  np.testing.assert_allclose(
    result.log_prob_BK, np.log(probs_KV[np.arange(4), expected_K]), rtol=1e-5
  )


def test_confidence_conventions():
  """9.5-b: with top_k = 1 the filtered confidence is 1 everywhere, the unfiltered one is not.

  The mask's share lowers confidences only where it is counted.
  """
  logits_KV = jnp.zeros((2, V)).at[0, 1].set(3.0).at[1, 2].set(4.0)
  chosen = lambda **given: np.asarray(  # noqa: E731
    _reveal(_options(block_length=2, top_k=1, **given), logits_KV, [1, 1]).revealed_BK
  ).tolist()
  assert chosen(strategy="low_confidence_static") == [False, True]
  assert chosen(strategy="low_confidence_static", confidence="filtered") == [True, False]
  assert chosen(threshold=0.999, confidence="filtered") == [True, True]
  logits_KV = logits_KV.at[1, MASK].set(6.0)
  assert chosen(strategy="low_confidence_static") == [False, True]
  assert chosen(strategy="low_confidence_static", count_mask=True) == [True, False]


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", select.BUDGETS)
def test_budget_of_every_schedule(kind):
  """9.5-a: the budgets sum to the masked positions for all (n, T), no step of a full block idle."""
  for size, steps in itertools.product(range(1, 10), range(1, 10)):
    if steps > size:
      continue
    for known in range(size + 1):
      masked = np.arange(size) >= known
      for step in range(steps):
        count = int(select.budget(jnp.asarray(masked), jnp.asarray(step), steps, kind))
        assert count > 0 or not masked.any() or kind == "remaining"
        masked[np.flatnonzero(masked)[:count]] = False
      assert not masked.any(), (size, steps, known)


def test_recorded_schedules(golden):
  """9.5-a: full blocks are revealed as the SDAR release does, with either budget."""
  vectors, config = golden("sdar_generate__a")
  cases = zip(config["transfer_schedule_cases"], vectors["transfer_schedule"], strict=True)
  for (size, steps), expected in cases:
    for kind in select.BUDGETS:
      masked, counts = np.ones(size, bool), []
      for step in range(steps):
        counts.append(int(select.budget(jnp.asarray(masked), jnp.asarray(step), steps, kind)))
        masked[np.flatnonzero(masked)[: counts[-1]]] = False
      if kind == "block":
        assert counts == expected[:steps].tolist()
      assert sum(counts) == size and sorted(counts, reverse=True) == expected[:steps].tolist()


def _select_in_numpy(strategy, masked, confidence, entropy, count, limit):
  """Return the chosen positions by a loop over the masked positions in order."""
  where = [i for i in range(len(masked)) if masked[i]]
  surest = sorted(where, key=lambda i: -confidence[i])
  if strategy == "sequential":
    return set(where[:count])
  if strategy == "low_confidence_static":
    return set(surest[:count])
  if strategy == "low_confidence_dynamic":
    above = [i for i in where if confidence[i] > limit]
    return set(above) if len(above) >= count else set(surest[:count])
  if strategy == "entropy_bounded":
    order, fitting, total = sorted(where, key=lambda i: entropy[i]), 0, 0.0
    for i in order:
      total += entropy[i]
      if total >= limit:
        break
      fitting += 1
    return set(order[: max(fitting, count)])
  largest = 0
  for m in range(1, len(surest) + 1):
    if not (m + 1) * (1 - confidence[surest[m - 1]]) < limit:
      break
    largest = m
  return set(surest[: max(largest, count)])


@pytest.mark.slow
def test_strategies_against_loops():
  """9.5-c: every strategy on random blocks with ties; never a known position, never too few."""
  rng = np.random.default_rng(0)
  for _ in range(150):
    masked = rng.random(6) < 0.7
    confidence = rng.integers(1, 10, 6).astype(np.float32) / 10  # ties are frequent
    entropy = rng.integers(1, 10, 6).astype(np.float32) / 8
    count = int(rng.integers(0, 4))
    limit = float(rng.choice([0.0, 0.35, 0.55, 0.95, 1.3, 5.0]))
    arrays = [jnp.asarray(x) for x in (masked, confidence, entropy, np.int32(count))]
    for strategy in select.STRATEGIES[:-1]:
      ours = _run(strategy, *arrays, limit)
      expected = _select_in_numpy(strategy, masked, confidence, entropy, count, limit)
      assert set(np.flatnonzero(ours)) == expected, strategy


def _run(strategy, masked, confidence, entropy, count, limit):
  if strategy == "sequential":
    return select.sequential(masked, count)
  if strategy == "low_confidence_static":
    return select.best(masked, confidence, count)
  if strategy == "low_confidence_dynamic":
    return select.dynamic(masked, confidence, count, limit)
  if strategy == "entropy_bounded":
    return select.entropy_bounded(masked, entropy, count, limit)
  return select.factor(masked, confidence, count, limit)


def test_extremes_of_thresholds():
  """9.5-c: threshold 0 and huge bounds reveal all at once, bound 0 and threshold > 1 the budget."""
  logits_KV, masked = _logits(5), [0, 1, 1, 1]
  revealed = lambda **given: np.asarray(  # noqa: E731
    _reveal(_options(temperature=0.0, **given), logits_KV, masked).revealed_BK
  ).tolist()
  static = revealed(strategy="low_confidence_static")
  assert sum(static) == 1
  assert revealed(strategy="low_confidence_dynamic", threshold=1.5) == static
  assert revealed(strategy="low_confidence_dynamic", threshold=0.0) == [False, True, True, True]
  assert revealed(strategy="entropy_bounded", entropy_bound=1e9) == [False, True, True, True]
  assert sum(revealed(strategy="entropy_bounded", entropy_bound=0.0)) == 1
  assert revealed(strategy="factor", factor=1e9) == [False, True, True, True]
  assert revealed(strategy="factor", factor=0.0) == static


@pytest.mark.parametrize("strategy", select.STRATEGIES)
def test_ties_and_known_positions(strategy):
  """9.5-a: equal positions are taken from the left; known ones never; a full block is left alone.

  First hitting has no ties.
  """
  options = _options(strategy=strategy, temperature=0.0, entropy_bound=0.0, factor=0.0)
  logits_KV = jnp.zeros((4, V)).at[:, 3].set(1.0)
  result = _reveal(options, logits_KV, [0, 1, 0, 1])
  assert int(result.revealed_BK.sum()) == 1 and not result.revealed_BK[jnp.array([0, 2])].any()
  if strategy != "first_hitting":
    assert bool(result.revealed_BK[1]) and result.tokens_BK.tolist() == [7, 3, 7, MASK]
  nothing = _reveal(options, logits_KV, [0, 0, 0, 0])
  assert not nothing.revealed_BK.any() and nothing.tokens_BK.tolist() == [7] * 4
  assert not nothing.log_prob_BK.any()


# --- noise ----------------------------------------------------------------------------------------


def test_noise_is_a_function_of_key_position_and_step():
  """9.4-d: the same (key, position, step) gives the same token whatever else is in the call."""
  options = _options(strategy="sequential", steps=1)
  logits_KV = jnp.tile(_logits(2, size=1, scale=0.2), (4, 1))
  far = _reveal(options, logits_KV, [1, 1, 1, 1], start=40)
  near = _reveal(options, logits_KV, [1, 1, 1, 1], start=42)
  np.testing.assert_array_equal(far.tokens_BK[2:], near.tokens_BK[:2])
  part = _reveal(options, logits_KV, [0, 1, 0, 1], start=40)
  np.testing.assert_array_equal(part.tokens_BK[1::2], far.tokens_BK[1::2])
  # The draw changes with the step, with the key and with the position.
  draws = np.stack(
    [
      np.asarray(_reveal(options, logits_KV, [1] * 4, seed=seed, step=step).tokens_BK)
      for seed in range(6)
      for step in range(2)
    ]
  )
  assert len(np.unique(draws, axis=0)) == 12 and all(len(np.unique(row)) > 1 for row in draws[::3])


def test_stacked_copies_agree_with_single_calls():
  """9.4-d: `vmap` over copies at different steps equals one call each."""
  options = _options(strategy="low_confidence_static", temperature=0.7)
  masked_CK = jnp.asarray([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]], bool)
  logits_CKV = jnp.stack([_logits(seed) for seed in range(3)])
  tokens_CK = jnp.where(masked_CK, MASK, 7)
  row = _row(options, jax.random.key(0))
  one = functools.partial(toy.reveal_one, options[0], row)
  stacked = jax.vmap(one, in_axes=(0, 0, 0, 0, None))(
    tokens_CK, masked_CK, logits_CKV, jnp.arange(3), jnp.arange(4)
  )
  for copy in range(3):
    single = _reveal(options, logits_CKV[copy], masked_CK[copy], step=copy)
    for ours, theirs in zip(stacked, single, strict=True):
      np.testing.assert_allclose(ours[copy], theirs, atol=1e-6)


def _tokens(options, logits_V, keys):
  """Return one token per key, drawn by `reveal` for a block of one."""

  def one(key):
    tokens_K, masked_K = jnp.full(1, MASK), jnp.ones(1, bool)
    row = _row(options, key)
    result = toy.reveal_one(options[0], row, tokens_K, masked_K, logits_V[None], 0, jnp.arange(1))
    return result.tokens_BK[0]

  keys = jax.random.split(jax.random.key(9), keys)
  return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=4096))(keys))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 0.9)])
def test_law_of_the_drawn_token(top_k, top_p):
  """9.5-b: chi-square at temperature 0.7; the mask and what is filtered out never come up."""
  options = _options(block_length=1, temperature=0.7, top_k=top_k, top_p=top_p)
  logits_V = _logits(4, size=1, scale=1.0)[0].at[MASK].set(3.0)
  expected_V = _filter_in_numpy(np.asarray(logits_V)[:MASK], 0.7, top_k, top_p)
  counts_V = np.bincount(_tokens(options, logits_V, 30_000), minlength=V)
  assert counts_V[MASK] == 0 and not counts_V[:MASK][expected_V == 0].any()
  kept = expected_V > 0
  assert kept.sum() == (10 if top_p == 1 else 3)
  observed, expected = counts_V[:MASK][kept], expected_V[kept] * 30_000
  assert scipy.stats.chisquare(observed, expected).pvalue > FOLLOWS
  flat = expected_V[kept] ** 0.7
  assert scipy.stats.chisquare(observed, flat / flat.sum() * 30_000).pvalue < DIFFERS


def test_first_hitting_takes_a_uniform_order():
  """9.5-c: all orders of three masked positions are equally likely; the times are uniform."""
  options = _options(strategy="first_hitting", temperature=0.0)
  logits_KV, known = _logits(0), jnp.asarray([False, True, False, False])

  def order(key):
    masked_K, picks = ~known, []
    for step in range(3):
      tokens_K = jnp.where(masked_K, MASK, 7)
      result = toy.reveal_one(
        options[0], _row(options, key), tokens_K, masked_K, logits_KV, step, jnp.arange(4)
      )
      picks.append(jnp.argmax(result.revealed_BK))
      masked_K &= ~result.revealed_BK
    return jnp.stack(picks)

  keys = jax.random.split(jax.random.key(1), 6000)
  orders = np.asarray(jax.jit(jax.vmap(order))(keys))
  kinds, counts = np.unique(orders, axis=0, return_counts=True)
  assert len(kinds) == 6 and 1 not in kinds
  assert scipy.stats.chisquare(counts).pvalue > FOLLOWS
  times = np.asarray(jax.jit(jax.vmap(lambda key: sample.hitting_times(key, jnp.arange(4))))(keys))
  np.testing.assert_array_equal(orders, np.argsort(-np.where(known, -1, times), axis=1)[:, :3])
  assert scipy.stats.kstest(times.max(axis=1), lambda t: t**4).pvalue > FOLLOWS


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"block_length": 0}, "block_length=0"),
    ({"steps": 5}, "steps=5 must be in 1 … block_length=4"),
    ({"steps": 0}, "steps=0"),
    ({"strategy": "sequentiel"}, "did you mean 'sequential'"),
    ({"strategy": "first_hitting", "steps": 2}, "leave steps out"),
    ({"confidence": "raw"}, "confidence='raw'"),
    ({"budget": "row"}, "budget='row'"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_k": -1}, "top_k=-1"),
    ({"mask_id": -1}, "mask_id=-1"),
    ({"stop_ids": (3, -2)}, "must be token ids, 0 or more"),
    ({"threshold": -0.1}, "threshold=-0.1"),
    ({"entropy_bound": -0.1}, "entropy_bound=-0.1"),
    ({"minimum": -1}, "minimum=-1"),
    ({"temperature": [0.0, 1.0, float("nan")]}, "temperature=[0.0, 1.0, nan] must be 0 or more"),
    ({"temperature": [0.0, 1.0]}, "one for each of 3 rows"),
    ({"stop_ids": [[1], [2]]}, "stop_ids are 2 lists; give one list, or one for each of 3 rows"),
  ],
)
def test_options_are_checked(changes, words):
  with pytest.raises(ValueError) as caught:
    sample.RowOptions.make(3, **dict(_options(**changes)[1]))
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_options_are_static_and_complete():
  rule = _options()[0]
  assert rule.steps == 4 and hash(rule) == hash(_options(steps=4)[0])


def test_values_are_broadcast_to_rows():
  rows = sample.RowOptions.make(3, temperature=0.5, top_k=[1, 2, 3], stop_ids=[[4], [], [5, 6]])
  assert rows.temperature_B.tolist() == [0.5] * 3 and rows.top_k_B.tolist() == [1, 2, 3]
  assert rows.stop_BS.tolist() == [[4, -1], [-1, -1], [5, 6]]
  assert sample.RowOptions.make(2, stop_ids=(7, 8)).stop_BS.tolist() == [[7, 8]] * 2
  assert rows.widen(4).stop_BS.tolist()[2] == [5, 6, -1, -1]
  with pytest.raises(ValueError, match="up to 2 stop ids and the batch has room for 1"):
    rows.widen(1)
  limited = jax.jit(lambda t: sample.RowOptions.make(3, temperature=t))(jnp.float32(-1.0))
  assert limited.temperature_B.tolist() == [-1.0] * 3  # not known inside `jit`
