# SPDX-License-Identifier: Apache-2.0
"""Rows of a running batch: what each asks for, when it enters, who was there before."""

import functools

import block_toy as toy
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import draw, sample
from dlm_jax.decode import law
from dlm_jax.decode.interfaces import LAWS
from dlm_jax.decode.passes import Bound, block_logits
from dlm_jax.decode.progress import advance, begin
from dlm_jax.models import Cache

KINDS = ("blocks", "stacked", "simsd")
SLOTS, WINDOW, COUNT, COLUMNS, STOPS = 4, 22, 16, 8, 3


@functools.cache
def _rounds(kind):
  """Return rounds and parameters; the draft is the target with some noise."""
  model, params = toy.make(seed=1)
  rule = sample.BlockRule(block_length=4, mask_id=toy.MASK)
  if kind == "blocks":
    return sample.block_decoder(model, rule, WINDOW), params
  draft = jax.tree.map(lambda x, y: x + 0.1 * (y - x), params, toy.make(seed=2)[1])
  options = sample.SpeculativeOptions(target=rule, verify=kind)
  rounds = sample.speculative_decoder(model, model, options, WINDOW)
  return rounds, {"target": params, "draft": draft}


def _requests():
  """Return (prompt [1, P], length [1], options of a row) of requests that differ in everything."""
  rng, found = np.random.default_rng(4), []
  for number in range(COUNT):
    length = int(rng.integers(1, COLUMNS + 1))
    stop_ids = rng.choice(toy.MASK, rng.integers(0, STOPS + 1), replace=False).tolist()
    options = sample.RowOptions.make(
      1,
      jax.random.key(number)[None],
      temperature=[0.0, 0.5, 1.0, 1.6][number % 4],
      top_k=[0, 3, 0, 6, 1][number % 5],
      top_p=[1.0, 0.8, 0.6][number % 3],
      threshold=[0.9, 0.3, 0.6, 1.5, 0.0][number % 5],
      stop_ids=np.asarray([stop_ids + [-1] * (STOPS - len(stop_ids))]),
      minimum=[0, 2, 5][number % 3],
      limit=min(length + 5 + number % 9, WINDOW),
    )
    prompt = jnp.asarray(rng.integers(0, toy.MASK, (1, COLUMNS)), jnp.int32)
    found.append((prompt, jnp.asarray([length]), options))
  return found


def _row(state, row):
  """Return what a row's text is made of."""
  progress = state.progress
  end = int(progress.length_B[row])
  return {
    "tokens": np.asarray(progress.tokens_BW)[row, :end].tolist(),
    "steps": np.asarray(progress.step_BW)[row, :end].tolist(),
    "prompt": int(progress.prompt_B[row]),
    "passes": int(progress.passes_B[row]),
    "reason": int(progress.reason_B[row]),
    "counts": {name: int(count[row]) for name, count in getattr(state, "counts", {}).items()},
    "log_prob": np.asarray(progress.log_prob_BW)[row, :end],
  }


def _spoil(state, row):
  """Return the state with garbage in everything of a row that is done, but that it is."""
  put = lambda x, value: x.at[row].set(value)  # noqa: E731
  nan = jnp.nan
  progress, options = state.progress, state.progress.options
  options = options.replace(
    temperature_B=put(options.temperature_B, nan),
    top_k_B=put(options.top_k_B, -7),
    top_p_B=put(options.top_p_B, nan),
    threshold_B=put(options.threshold_B, nan),
    stop_BS=put(options.stop_BS, 5),
    minimum_B=put(options.minimum_B, 99),
    limit_B=put(options.limit_B, 3),
    rng_B=put(options.rng_B, jax.random.key(77)),
  )
  progress = progress.replace(
    tokens_BW=put(progress.tokens_BW, 9_999),
    step_BW=put(progress.step_BW, 2),
    log_prob_BW=put(progress.log_prob_BW, nan),
    prompt_B=put(progress.prompt_B, 3),
    length_B=put(progress.length_B, 1_000),
    passes_B=put(progress.passes_B, 1_000),
    options=options,
  )
  changed = {"progress": progress, "start_B": put(state.start_B, 12)}
  for name in ("cache", "target_cache", "draft_cache"):
    if hasattr(state, name):
      cache = getattr(state, name)
      k_NBSGC, v_NBSGC = (x.at[:, row].set(nan) for x in (cache.k_NBSGC, cache.v_NBSGC))
      changed[name] = Cache(k_NBSGC, v_NBSGC, put(cache.length_B, 1_000))
  if hasattr(state, "counts"):
    changed |= {
      "step_B": put(state.step_B, 9),
      "counts": jax.tree.map(lambda x: put(x, 9), state.counts),
    }
  return state.replace(**changed)


def _others(state, row):
  """Return every array of a state without a row; caches have rows on their second axis."""
  plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
  return [np.delete(plain(x), row, axis=int(x.ndim == 5)) for x in jax.tree.leaves(state)]


def _serve(rounds, params, requests):
  """Run a batch of slots as a server does; return each request's row, and how full it was.

  Requests enter free slots at random rounds; what is done is spoilt at once, and stays so.
  """
  admit, one_round = jax.jit(rounds.admit), jax.jit(rounds.round)
  rng, waiting, here, found = np.random.default_rng(0), list(range(COUNT)), {}, {}
  state, full = rounds.init(SLOTS, STOPS), []
  for row in range(SLOTS):
    state = _spoil(state, row)
  while waiting or here:
    free = [row for row in range(SLOTS) if row not in here]
    for row in rng.permutation(free)[: rng.integers(0, len(free) + 1)].tolist():
      if waiting:
        here[row] = waiting.pop(0)
        before = _others(state, row)
        prompt, lengths, options = requests[here[row]]
        state = admit(params, state, jnp.asarray([row]), prompt, lengths, options)
        jax.tree.map(np.testing.assert_array_equal, before, _others(state, row))
    state = one_round(params, state)
    full.append(len(here))
    for row in [row for row in here if rounds.done(state)[row]]:
      found[here.pop(row)] = _row(state, row)
      state = _spoil(state, row)
  return found, full


@functools.cache
def _alone(kind):
  """Return each request's row in a batch of its own that it enters first."""
  rounds, params = _rounds(kind)

  @jax.jit
  def run(params, prompt, lengths, options):
    state = rounds.admit(params, rounds.init(1, STOPS), jnp.arange(1), prompt, lengths, options)
    return sample.finish(rounds, params, state)

  return [_row(run(params, *request), 0) for request in _requests()]


@pytest.mark.parametrize(
  "kind", ["blocks", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])]
)
def test_a_request_does_not_depend_on_its_batch(kind):
  """16 requests enter 4 slots at random rounds, where garbage is: each gets what it gets alone."""
  rounds, params = _rounds(kind)
  requests = _requests()
  found, full = _serve(rounds, params, requests)
  for number, alone in enumerate(_alone(kind)):
    ours = found[number]
    log_prob, expected = ours.pop("log_prob"), dict(alone)
    np.testing.assert_allclose(log_prob, expected.pop("log_prob"), atol=1e-4)
    assert ours == expected, number
    new, options = ours["tokens"][ours["prompt"] :], requests[number][2]
    stops = set(options.stop_BS[0].tolist())
    assert len(new) > int(options.minimum_B[0]) or ours["reason"] == sample.LENGTH
    assert not stops & set(new[: int(options.minimum_B[0])]) and not stops & set(new[:-1])
    assert (new[-1] in stops) == (ours["reason"] == sample.STOP)
  assert {row["reason"] for row in found.values()} == {sample.STOP, sample.LENGTH}
  assert max(full) == SLOTS and len(set(full)) > 2


@pytest.mark.slow
def test_stacked_rows_have_the_text_of_the_target_alone():
  """Every option of rows means the same to the target's own rounds and to verified ones."""
  for ours, theirs in zip(_alone("stacked"), _alone("blocks"), strict=True):
    assert [ours[n] for n in ("tokens", "steps", "reason")] == [
      theirs[n] for n in ("tokens", "steps", "reason")
    ]


# --- one row's options ----------------------------------------------------------------------------


@functools.cache
def _scripted():
  """Return compiled decoding of five rows by a script whose likeliest token is 3, then 5."""
  rounds = sample.block_decoder(
    toy.Script(), sample.BlockRule(block_length=4, mask_id=toy.MASK), 16
  )

  def run(params, options):
    prompt = jnp.ones((5, 2), jnp.int32)
    return sample.decode(rounds, params, prompt, jax.random.key(3), options=options)

  # other values of options are no other program
  return jax.jit(chex.assert_max_traces(run, n=1))


def _params():
  likely = jax.nn.one_hot(jnp.full(16, 3), toy.V) * 9 + jax.nn.one_hot(jnp.full(16, 5), toy.V) * 6
  return likely + 0.3 * jax.random.normal(jax.random.key(0), likely.shape)


@pytest.fixture
def scripted():
  yield _scripted()


def test_minimum_and_stop_ids(scripted):
  """A stop id has no probability before the minimum, and −1 is none; one program for all."""
  options = sample.RowOptions.make(
    5,
    temperature=0.0,
    stop_ids=[[3], [3, 5], [3], [-1, -1], []],
    minimum=[0, 0, 6, 2, 0],
    limit=[16, 16, 16, 9, 4],
  )
  tokens, info = scripted(_params(), options.widen(2))
  assert info.lengths_B.tolist() == [3, 3, 9, 9, 4]
  assert tokens[2, 2:9].tolist() == [5] * 6 + [3] and tokens[3, 2:9].tolist() == [3] * 7
  assert info.reason_B.tolist() == [sample.STOP] * 3 + [sample.LENGTH] * 2
  hot = options.replace(temperature_B=jnp.asarray([0.0, 3.0, 2.0, 0.0, 50.0]))
  again, drawn = scripted(_params(), hot.widen(2))
  np.testing.assert_array_equal(again[jnp.array([0, 3])], tokens[jnp.array([0, 3])])
  assert (again[4] != tokens[4]).any() and 3 not in again[2, 2:8].tolist()
  cut = hot.replace(top_k_B=jnp.asarray([0, 1, 1, 9, 1]), top_p_B=jnp.full(5, 0.9, jnp.float32))
  np.testing.assert_array_equal(scripted(_params(), cut.widen(2))[0], tokens)  # top-1 is greedy
  assert drawn.lengths_B[2] >= 9


def test_no_token_is_a_stop_id_of_minus_one():
  """Not even a token that has no id."""
  options = sample.RowOptions.make(1, jax.random.key(0), stop_ids=[-1], limit=4)
  shape = {"window": 4, "block_length": 4, "mask_id": toy.MASK}
  progress = begin(np.zeros((1, 1)), None, options, **shape)
  decided = progress.replace(tokens_BW=jnp.full((1, 4), -1), step_BW=jnp.zeros((1, 4), jnp.int32))
  after = advance(decided)
  assert int(after.length_B[0]) == 4 and int(after.reason_B[0]) == sample.LENGTH


@pytest.mark.slow
def test_what_no_row_asks_for_is_not_computed(monkeypatch):
  """No noise for greedy rows, no sorting without truncation; rows that are done ask for nothing."""
  calls = {"drawn": 0, "sorted": 0}

  def counted(name, original):
    def run(*arguments):
      jax.debug.callback(lambda: calls.update({name: calls[name] + 1}))
      return original(*arguments)

    return run

  monkeypatch.setattr(draw, "gumbel_max", counted("drawn", draw.gumbel_max))
  monkeypatch.setattr(law, "truncate", counted("sorted", law.truncate))
  rounds = sample.block_decoder(toy.Script(), sample.BlockRule(block_length=2, mask_id=toy.MASK), 6)
  run = jax.jit(
    lambda options: sample.decode(
      rounds, _params()[:6], jnp.ones((2, 1), jnp.int32), jax.random.key(0), options=options
    )[0]
  )
  make = functools.partial(sample.RowOptions.make, 2)
  for asked, drawn, truncated in (
    ({"temperature": 0.0, "top_k": 3, "top_p": 0.5}, False, False),
    ({"temperature": [0.0, 0.7]}, True, False),
    ({"temperature": [0.0, 0.7], "top_p": [1.0, 0.5]}, True, True),
    ({"temperature": [0.0, 0.7], "top_p": [0.5, 1.0]}, True, False),
    ({"temperature": [0.0, 0.7], "top_k": 2, "limit": [6, 1]}, False, False),
  ):
    calls.update(drawn=0, sorted=0)
    run(make(**asked)).block_until_ready()
    jax.effects_barrier()
    assert (calls["drawn"] > 0, calls["sorted"] > 0) == (drawn, truncated), asked


# --- admission ------------------------------------------------------------------------------------


def test_admission_is_checked_and_rows_beyond_the_last_are_dropped():
  rounds, params = _rounds("blocks")
  state = rounds.init(2, 1)
  assert rounds.done(state).tolist() == [True, True]
  prompt, options = jnp.ones((2, 4), jnp.int32), sample.RowOptions.make(2, jax.random.key(0))
  admitted = rounds.admit(params, state, jnp.array([2, 0]), prompt, None, options)
  assert rounds.done(admitted).tolist() == [False, True]
  assert admitted.cache.length_B.tolist() == [4, 0]
  assert admitted.progress.options.limit_B.tolist() == [WINDOW, 0]
  wide = sample.RowOptions.make(2, jax.random.key(0), stop_ids=[1, 2])
  with pytest.raises(ValueError, match="up to 2 stop ids and the batch has room for 1"):
    rounds.admit(params, state, jnp.arange(2), prompt, None, wide)
  with pytest.raises(ValueError, match="options are of 3 rows and there are 2 prompts"):
    rows = sample.RowOptions.make(3)
    sample.start(rounds, params, prompt, jax.random.key(0), options=rows)


@pytest.mark.parametrize(
  "law, asked",
  [
    ("greedy", {"temperature": 0.0}),
    ("greedy", {"temperature": [0, 0]}),
    ("drawn", {}),
    ("drawn", {"temperature": [0.0, 0.7], "threshold": 0.3, "limit": 3, "stop_ids": [1]}),
    ("any", {"temperature": 0.0, "top_k": [0, 3]}),
    ("any", {"temperature": 0.7, "top_p": 0.5}),
    ("any", {"temperature": 0.0, "minimum": [0, 1]}),
  ],
)
def test_options_know_their_law(law, asked):
  """It is the least that their values need; inside `jit`, where they are not known, no less."""
  assert sample.RowOptions.make(2, **asked).law == law
  numbers = {name: jnp.asarray(one) for name, one in asked.items() if name != "stop_ids"}
  traced = jax.eval_shape(lambda given: sample.RowOptions.make(2, **given), numbers)
  assert LAWS.index(traced.law) >= LAWS.index(law)


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind", ["blocks", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])]
)
def test_a_law_changes_no_token(kind):
  """Rows give the same texts in batches that were made for more than they ask."""
  rounds, params = _rounds(kind)
  prompt = jnp.asarray(np.random.default_rng(0).integers(0, toy.MASK, (2, 5)), jnp.int32)
  run = jax.jit(
    lambda options: sample.decode(rounds, params, prompt, jax.random.key(0), options=options)
  )
  for least, temperature in (("greedy", 0.0), ("drawn", [0.0, 0.9])):
    options = sample.RowOptions.make(2, temperature=temperature)
    assert options.law == least
    chex.assert_trees_all_close(run(options.replace(law="any")), run(options), atol=1e-5)


def test_a_batch_refuses_rows_beyond_its_law():
  rounds, params = _rounds("blocks")
  prompt = jnp.ones((1, 4), jnp.int32)
  admit = functools.partial(rounds.admit, params)
  greedy = sample.RowOptions.make(1, jax.random.key(0), temperature=0.0)
  state = admit(rounds.init(2, 1, "greedy"), jnp.arange(1), prompt, None, greedy)
  assert rounds.done(state).tolist() == [False, True]
  hot = sample.RowOptions.make(1, jax.random.key(0))
  with pytest.raises(ValueError, match="the law 'drawn' and the batch was made for 'greedy'"):
    jax.eval_shape(admit, state, jnp.arange(1), prompt, None, hot)
  for more in ({"temperature_B": jnp.ones(1)}, {"minimum_B": jnp.ones(1, jnp.int32)}):
    with pytest.raises(ValueError, match="values beyond their law='greedy'"):
      admit(state, jnp.arange(1), prompt, None, greedy.replace(**more))
  with pytest.raises(ValueError, match="law='gredy'"):
    rounds.init(2, 1, "gredy")


def test_rounds_have_a_bound():
  """A round that settles nothing, which is a mistake of its maker, ends after W of them."""
  rounds, params = _rounds("blocks")
  idle = rounds._replace(round=lambda params, state: state)
  state = sample.start(idle, params, jnp.ones((1, 3), jnp.int32), jax.random.key(0))
  assert not idle.done(sample.finish(idle, params, state)).any()


@pytest.mark.slow
def test_the_block_in_work_does_not_reach_the_folded_one():
  """9.2-d: what is stored of the block before is the same whatever the next block holds."""
  model, params = toy.make(seed=1)
  options = sample.RowOptions.make(2, jax.random.key(0))
  shape = {"window": 12, "block_length": 4, "mask_id": toy.MASK}
  prompt = jnp.asarray(np.random.default_rng(0).integers(0, toy.MASK, (2, 8)), jnp.int32)
  progress = begin(prompt, None, options, **shape)
  network, position_BK = Bound(model, params), jnp.broadcast_to(8 + jnp.arange(4), (2, 4))
  visible = jnp.ones((1, 4, 4), bool)
  kv = network.extend(prompt[:, :4], None, visible, None)[1]
  start = Cache(
    *(jnp.pad(x, ((0, 0), (0, 0), (0, 4), (0, 0), (0, 0))) for x in (kv.k_NBQGC, kv.v_NBQGC)),
    jnp.full(2, 4),
  )
  found = []
  for token in (toy.MASK, 3):
    tokens_BK = jnp.full((2, 4), token)
    found.append(block_logits(network, progress, start, tokens_BK, position_BK, folded=True))
  (logits, cache), (others, same) = found
  assert cache.length_B.tolist() == [8, 8] and float(jnp.abs(logits - others).max()) > 0.1
  jax.tree.map(np.testing.assert_array_equal, cache, same)
  separate = network.extend(prompt[:, 4:], None, None, start)[1]
  np.testing.assert_allclose(cache.k_NBSGC[:, :, 4:], separate.k_NBQGC, atol=1e-5)
