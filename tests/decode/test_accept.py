# SPDX-License-Identifier: Apache-2.0
"""Rules of acceptance: recorded rounds, a plain reference, and the law of the emitted text."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dlm_jax.decode.accept import FILLS, greedy_match, rejection

RECORDED = ["simsd_acceptance__a", "simsd_acceptance__b"]


def _listed(verdict):
  """Return the decided tokens of every row, padded with −1 behind."""
  rows = np.full(verdict.tokens_BK.shape, -1)
  for row, (tokens, kept) in enumerate(zip(verdict.tokens_BK, verdict.kept_BK, strict=True)):
    chosen = np.asarray(tokens)[np.asarray(kept)]
    rows[row, : len(chosen)] = chosen
  return rows


def _bonus(verdict):
  """Return the last decided token where it is a bonus, else −1."""
  lists = _listed(verdict)
  last = np.maximum((lists >= 0).sum(1) - 1, 0)
  return np.where(verdict.bonus_B, lists[np.arange(len(lists)), last], -1)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_greedy_match(golden, name):
  """9.3-e: accepted counts, bonus tokens and lists of the release."""
  v, _ = golden(name)
  draft = jnp.asarray(v["draft_ids"], jnp.int32)
  verdict = greedy_match(draft, jnp.asarray(v["target_probs"]), jnp.ones_like(draft, bool))
  np.testing.assert_array_equal(verdict.accepted_B, v["greedy_n_accepted"])
  np.testing.assert_array_equal(_listed(verdict), v["greedy_accepted_ids"])
  np.testing.assert_array_equal(_bonus(verdict), v["greedy_bonus_token"])


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_rejection(golden, name):
  """9.3-e: the same uniforms give the same accepted counts, residual draws and lists."""
  v, _ = golden(name)
  draft = jnp.asarray(v["draft_ids"], jnp.int32)
  # A vocabulary below 256 is one block of the two-level draw: its first uniform does nothing.
  bonus = jnp.concatenate([jnp.zeros_like(v["bonus_uniform"]), v["bonus_uniform"]], axis=1)
  verdict = rejection(
    draft,
    jnp.asarray(v["draft_probs"]),
    jnp.asarray(v["target_probs"]),
    jnp.ones_like(draft, bool),
    jnp.asarray(v["accept_uniforms"]),
    bonus,
  )
  np.testing.assert_array_equal(verdict.accepted_B, v["n_accepted"])
  np.testing.assert_array_equal(_listed(verdict), v["accepted_ids"])
  np.testing.assert_array_equal(_bonus(verdict), v["bonus_token"])
  assert (v["n_accepted"] == 4).any()
  assert (v["n_accepted"] == 0).any()


def _reference(draft, best, fails, bonus, is_open, fill):
  """Apply a rule to one row as the words say; returns (decided {position: token}, accepted)."""
  todo = [i for i, o in enumerate(is_open) if o]
  final, stopped = [], False
  for i in todo:
    if fails[i]:
      final.append(bonus[i])
      stopped = True
      break
    final.append(draft[i])
  accepted = len(final) - stopped
  if fill == "truncate_no_bonus" and stopped and accepted:
    final = final[:-1]
  if stopped:
    rest = todo[len(final) :]
    if fill == "target_argmax":
      final += [best[i] for i in rest]
    elif fill == "target_argmax_all":
      final = [best[i] for i in todo]
    elif fill == "draft_argmax":
      final += [draft[i] for i in rest]
  return dict(zip(todo, final, strict=False)), accepted


@pytest.mark.first_case
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("rule", ["greedy_match", "rejection"])
def test_rules_against_a_reference(rule, fill):
  """9.3-e: both rules, all fill modes, any set of open positions (none and all included)."""
  rng, (batch, size, vocabulary) = np.random.default_rng(3), (200, 5, 4)
  draft = rng.integers(0, vocabulary, (batch, size)).astype(np.int32)
  p, q = rng.dirichlet(np.ones(vocabulary), (2, batch, size)).astype(np.float32)
  is_open = rng.random((batch, size)) < 0.7
  is_open[:2] = [[False] * size, [True] * size]
  uniform, bonus = rng.random((batch, size)), rng.random((batch, 2))
  best = q.argmax(-1)
  if rule == "greedy_match":
    verdict = greedy_match(jnp.asarray(draft), jnp.asarray(q), jnp.asarray(is_open), fill=fill)
    fails, put = best != draft, best
  else:
    verdict = rejection(
      jnp.asarray(draft),
      jnp.asarray(p),
      jnp.asarray(q),
      jnp.asarray(is_open),
      jnp.asarray(uniform, jnp.float32),
      jnp.asarray(bonus, jnp.float32),
      fill=fill,
    )
    ratio = _pick(q, draft) / _pick(p, draft)
    fails = ~(uniform.astype(np.float32) < np.minimum(1, ratio))
    cdf = np.cumsum(np.maximum(q - p, 0), -1)
    put = (cdf <= bonus[:, None, 1:] * cdf[..., -1:]).sum(-1)
  for row in range(batch):
    wanted, accepted = _reference(draft[row], best[row], fails[row], put[row], is_open[row], fill)
    kept = np.flatnonzero(verdict.kept_BK[row])
    assert {i: int(verdict.tokens_BK[row, i]) for i in kept} == wanted
    assert int(verdict.accepted_B[row]) == accepted
    assert bool(verdict.bonus_B[row]) == bool((is_open[row] & fails[row]).any())
    assert len(kept) > 0 or not is_open[row].any()


@pytest.mark.slow
def test_unlikely_stop_is_no_bonus():
  """9.3-e: below `eos_min_prob` the bonus is another token, and a round still decides one."""
  draft = jnp.zeros((2, 2), jnp.int32)
  target = jnp.asarray([[[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]], [[0.2, 0.1, 0.7], [0.2, 0.3, 0.5]]])
  is_open = jnp.ones((2, 2), bool)
  for gate, wanted in ((0.0, [2, 2]), (0.6, [1, 2]), (0.9, [1, 0])):
    options = {"stop_BV": jnp.arange(3)[None] == jnp.full((2, 1), 2), "eos_min_prob": gate}
    verdict = greedy_match(draft, target, is_open, **options)
    np.testing.assert_array_equal(verdict.tokens_BK[:, 0], wanted)
    np.testing.assert_array_equal(verdict.kept_BK, [[True, False]] * 2)
    uniform, bonus = jnp.full((2, 2), 0.999), jnp.full((2, 2), 0.999)
    draft_p = jnp.asarray([[[0.9, 0.05, 0.05]] * 2] * 2)
    drawn = rejection(draft, draft_p, target, is_open, uniform, bonus, **options)
    np.testing.assert_array_equal(drawn.tokens_BK[:, 0] == 2, np.array(wanted) == 2)


# --- the law of the text on two positions of three symbols -------------------------------------

_SYMBOLS = 3


def _tables(seed):
  """Return first[position, x] and second[position, x of the other, y] of a target and a draft."""
  rng = np.random.default_rng(seed)
  first = rng.dirichlet(np.ones(_SYMBOLS), 2)
  second = rng.dirichlet(np.ones(_SYMBOLS), (2, _SYMBOLS))
  noise = rng.dirichlet(np.ones(_SYMBOLS), (2, 1 + _SYMBOLS))
  draft = 0.7 * first + 0.3 * noise[:, 0], 0.7 * second + 0.3 * noise[:, 1:]
  return (first, second), draft


def _drafted(tables, confident, values):
  """Return (order, probability of these tokens in this order) of a run of two reveals.

  Both positions draw; the most confident, or else the left one, is revealed; the other is drawn
  again given it.
  """
  first, second = tables
  found = []
  for other in range(_SYMBOLS):  # what the position that is not revealed first had drawn
    for order in ((0, 1), (1, 0)):
      a, b = order
      chance = first[a][values[a]] * first[b][other]
      left = (
        first[a][values[a]] >= first[b][other]
        if a == 0
        else (first[a][values[a]] > first[b][other])
      )
      taken = left if confident else a == 0
      if taken:
        found.append((order, chance * second[b][values[a]][values[b]]))
  return found


def _law(tables, confident):
  law = np.zeros((_SYMBOLS, _SYMBOLS))
  for values in itertools.product(range(_SYMBOLS), repeat=2):
    law[values] = sum(chance for _, chance in _drafted(tables, confident, values))
  return law


def _pick(rows, ids):
  return np.take_along_axis(np.asarray(rows), np.asarray(ids)[..., None], -1)[..., 0]


def _speculative_law(target, draft, confident):
  """Enumerate one round and, after a rejection at 0, the target's own draw of position 1.

  Exact q: each position's conditional given what was revealed before it in the draft's order.
  """
  law, cases = np.zeros((_SYMBOLS, _SYMBOLS)), []
  for values in itertools.product(range(_SYMBOLS), repeat=2):
    for (a, b), chance in _drafted(draft, confident, values):
      p, q = np.zeros((2, 2, _SYMBOLS))
      for row, (first, second) in ((p, draft), (q, target)):
        row[a], row[b] = first[a], second[b][values[a]]
      cases.append((values, chance, p, q))
  values = np.array([case[0] for case in cases], np.int32)
  p, q = (np.array([case[i] for case in cases], np.float32) for i in (2, 3))
  accept = np.minimum(1, _pick(q, values) / _pick(p, values))
  # The bonus by midpoints of its uniform; uniforms of 1 reject where they can, of 0 never do.
  count, grid = len(cases), 240
  repeat = lambda x: jnp.repeat(jnp.asarray(x), grid, axis=0)  # noqa: E731
  bonus = jnp.tile(jnp.asarray((np.arange(grid) + 0.5) / grid, jnp.float32), count)
  bonus = jnp.stack([jnp.zeros_like(bonus), bonus], 1)
  for at, uniform in enumerate(([1.0, 0.0], [0.0, 1.0])):
    verdict = rejection(
      repeat(values),
      repeat(p),
      repeat(q),
      jnp.ones((count * grid, 2), bool),
      jnp.tile(jnp.asarray(uniform), (count * grid, 1)),
      bonus,
    )
    tokens = np.asarray(verdict.tokens_BK[:, at]).reshape(count, grid)
    tokens = np.array([np.bincount(row, minlength=_SYMBOLS) / grid for row in tokens])
    for row, ((a, _), chance, _, _) in enumerate(cases):
      if at == 0:
        law += chance * (1 - accept[row, 0]) * tokens[row][:, None] * target[1][1]
      else:
        law[a] += chance * accept[row, 0] * (1 - accept[row, 1]) * tokens[row]
  for row, (pair, chance, _, _) in enumerate(cases):
    law[pair] += chance * accept[row].prod()
  return law


def test_law_of_rejection_by_enumeration():
  """9.3-e: with exact q, left-to-right drafts give the target's law, confident-first ones do not.

  Total variation over 8 pairs of tables: below 0.004 in sequence (the grid's error); 0.06 … 0.4 by
  confidence.
  """
  found = {True: [], False: []}
  for seed in range(8):
    target, draft = _tables(seed)
    for confident in (False, True):
      wanted = _law(target, confident)
      law = _speculative_law(target, draft, confident)
      assert abs(law.sum() - 1) < 1e-6 and abs(wanted.sum() - 1) < 1e-9
      found[confident].append(0.5 * np.abs(law - wanted).sum())
  assert max(found[False]) < 0.004, found
  assert np.mean(found[True]) > 0.02, found


@pytest.mark.slow
def test_law_of_rejection_by_drawing():
  """9.3-e: 40,000 sequential rounds against the target's law, chi-square on nine pairs."""
  (first, second), (draft_first, draft_second) = _tables(5)
  count = 40_000
  rng = np.random.default_rng(0)

  def draws(table):
    return jnp.asarray((rng.random((len(table), 1)) > table.cumsum(-1)).sum(-1))

  a = draws(np.broadcast_to(draft_first[0], (count, _SYMBOLS)))
  b = draws(draft_second[1][a])
  p = jnp.stack([np.broadcast_to(draft_first[0], (count, _SYMBOLS)), draft_second[1][a]], 1)
  q = jnp.stack([np.broadcast_to(first[0], (count, _SYMBOLS)), second[1][a]], 1)
  rng_accept, rng_bonus = jax.random.split(jax.random.key(1))
  verdict = rejection(
    jnp.stack([a, b], 1).astype(jnp.int32),
    p.astype(jnp.float32),
    q.astype(jnp.float32),
    jnp.ones((count, 2), bool),
    jax.random.uniform(rng_accept, (count, 2)),
    jax.random.uniform(rng_bonus, (count, 2)),
  )
  left = np.asarray(verdict.tokens_BK[:, 0])
  right = np.where(verdict.kept_BK[:, 1], verdict.tokens_BK[:, 1], draws(second[1][left]))
  observed = np.bincount(left * _SYMBOLS + right, minlength=_SYMBOLS**2)
  wanted = (first[0][:, None] * second[1]).reshape(-1)
  assert scipy.stats.chisquare(observed, wanted * count).pvalue > 1e-3
  drafted = (draft_first[0][:, None] * draft_second[1]).reshape(-1)
  assert scipy.stats.chisquare(observed, drafted * count).pvalue < 1e-6


def test_unknown_fill_is_named():
  with pytest.raises(ValueError, match="fill='redraft' is unknown; use one of truncate"):
    greedy_match(
      jnp.zeros((1, 2), int), jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool), fill="redraft"
    )
