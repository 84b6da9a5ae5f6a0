# SPDX-License-Identifier: Apache-2.0
"""Block decoding: recorded runs, decoding without a cache, folding, batches, boundaries, stops."""

import functools
import itertools

import block_toy as toy
import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiled import at_most

from dlm_jax import models, sample
from dlm_jax.decode import select


def _one(default, names):
  """Return the parameters of a test of which the default run takes one."""
  return [pytest.param(n, marks=() if n == default else pytest.mark.slow) for n in names]


FOLLOWS = 1e-4
KEY = jax.random.key(0)
# No empty prompt: a block of masks that sees nothing else is the same at every position.
PROMPTS = ([1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 1], [11], [5] * 8, [2, 7, 1, 8, 2, 8])
WINDOW = 22


def _options(**changes):
  """Return a rule, and what its rows ask for."""
  return toy.split(changes)


def _rows(options, count):
  return sample.RowOptions.make(count, **options[1])


def _decode(model, params, options, prompts, rng, window=WINDOW, **given):
  """Run the whole decode as one compiled call."""
  prompt, lengths = sample.pad_prompts(prompts)
  rounds = sample.block_decoder(model, options[0], window)
  given = {"options": _rows(options, len(prompts))} | given
  run = jax.jit(
    lambda params, rng, given: sample.decode(rounds, params, prompt, rng, **given, lengths=lengths)
  )
  return run(params, rng, given)


def _equal(ours, theirs, atol=1e-4):
  """Compare (tokens, info) pairs: integers exactly, log-probabilities nearly."""
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    if jnp.issubdtype(a.dtype, jnp.integer):
      np.testing.assert_array_equal(a, b)
    else:
      np.testing.assert_allclose(a, b, atol=atol)


# --- recorded runs --------------------------------------------------------------------------------


def _recorded_steps(inputs, stored, mask_id):
  """Return the reveal step of every token from the blocks before each call, in order."""
  steps, number, rows = [], 0, []
  for k in range(len(inputs)):
    if stored[k]:
      if rows:
        steps += np.where(inputs[k] == rows[0], -1, _first_change(rows, inputs[k])).tolist()
      rows = []
      continue
    rows.append(inputs[k])
    number += 1
  del mask_id
  return steps, number


def _first_change(rows, final):
  known = np.stack([row == final for row in [*rows, final]])
  return known.argmax(axis=0) - 1


@pytest.mark.parametrize("name", _one("sdar_generate__a", ["sdar_generate__a", "sdar_generate__b"]))
@pytest.mark.parametrize("run", _one(0, range(5)))
def test_recorded_decoding(golden, name, run):
  """9.5-a: token for token, step for step and pass for pass the SDAR release's greedy decode."""
  vectors, config = golden(name)
  model, params = golden_networks.decoder(vectors, config)
  settings, mask_id = config["runs"][run], config["mask_token_id"]
  prompt, expected = vectors[f"run{run}/prompt"], vectors[f"run{run}/output"]
  greedy = {"temperature": 0.0}
  if settings["temperature"] != 1.0:  # tempered confidences, the most probable token all the same
    greedy = {"temperature": settings["temperature"], "top_k": 1}
  options = _options(
    block_length=settings["block_length"],
    mask_id=mask_id,
    steps=settings["denoising_steps"],
    strategy=settings["strategy"],
    threshold=settings["confidence_threshold"],
    budget="block",
    count_mask=True,
    fold=run % 2 == 0,
    **greedy,
  )
  tokens, info = _decode(
    model, params, options, [prompt.tolist()], jax.random.key(0), window=len(expected)
  )
  np.testing.assert_array_equal(tokens[0], expected)
  inputs, stored = vectors[f"run{run}/forward_inputs"], vectors[f"run{run}/forward_stored"]
  steps, passes = _recorded_steps(inputs, stored, mask_id)
  size = options[0].block_length
  aligned = len(prompt) // size * size
  generated = slice(len(prompt), None)
  np.testing.assert_array_equal(info.step_BL[0, generated], steps[len(prompt) - aligned :])
  blocks = (len(expected) - aligned) // size
  assert int(info.passes_B[0]) == passes + (0 if options[0].fold else blocks - 1)


# --- without a cache ------------------------------------------------------------------------------

CASES = {
  "static": {"strategy": "low_confidence_static", "steps": 2, "temperature": 0.0},
  "dynamic": {"threshold": 0.5, "temperature": 0.7, "top_k": 6, "stop_ids": (0, 4)},
  "sequential": {"strategy": "sequential", "top_p": 0.9, "fold": False},
  "first_hitting": {"strategy": "first_hitting", "stop_ids": (3,)},
}


@functools.cache
def _case(name):
  """Return a case's network, options and its decode of PROMPTS in one batch."""
  model, params = toy.make(seed=1)
  options = _options(**CASES[name])
  return model, params, options, _decode(model, params, options, PROMPTS, jax.random.key(5))


@pytest.mark.parametrize("name", _one("dynamic", CASES))
def test_cached_decode_equals_uncached(name):
  """9.2-a, 9.5-e: each row of a ragged batch, cached, equals its own uncached decode.

  Every step of the latter is one forward of the whole row under the block-causal mask.
  """
  model, params, options, (tokens, info) = _case(name)
  for row, prompt in enumerate(PROMPTS):
    key = jax.random.fold_in(jax.random.key(5), row)
    expected, steps, log_probs, passes, reason = toy.decode_uncached(
      model, params, options, prompt, key, WINDOW
    )
    end = int(info.lengths_B[row])
    assert end == len(expected) and int(info.reason_B[row]) == reason
    np.testing.assert_array_equal(tokens[row, :end], expected)
    np.testing.assert_array_equal(info.step_BL[row, :end], steps)
    np.testing.assert_allclose(info.log_prob_BL[row, :end], log_probs, atol=1e-4)
    assert not tokens[row, end:].any() and not info.log_prob_BL[row, end:].any()
    blocks = -(-WINDOW // 4) - len(prompt) // 4
    assert int(info.passes_B[row]) == passes + (0 if options[0].fold else blocks - 1)
  generated = np.concatenate([tokens[r, len(p) :] for r, p in enumerate(PROMPTS)])
  assert len(np.unique(generated)) > 4  # not vacuous
  assert toy.MASK not in np.asarray(tokens)


@pytest.mark.slow
def test_a_dit_of_blocks_is_decoded_as_decoders_are():
  """Public BD3-LMs: other layers, the same rounds; cached equals uncached."""
  config = models.BlockDiTConfig(
    vocab_size=toy.V, dim=16, cond_dim=8, layers=2, heads=2, length=64, dtype="float32"
  )
  model, rng = models.BlockDiT(config), np.random.default_rng(3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)
  options = _options(**CASES["static"])
  tokens, info = _decode(model, params, options, PROMPTS[:2], jax.random.key(5))
  for row, prompt in enumerate(PROMPTS[:2]):
    key = jax.random.fold_in(jax.random.key(5), row)
    expected, steps, *_ = toy.decode_uncached(model, params, options, prompt, key, WINDOW)
    np.testing.assert_array_equal(tokens[row, : len(expected)], expected)
    np.testing.assert_array_equal(info.step_BL[row, : len(expected)], steps)
  assert len(np.unique(tokens)) > 3


@pytest.mark.slow
def test_folded_equals_separate():
  """9.2-d: folding changes passes, neither tokens nor log-probabilities nor what is cached."""
  model, params, options, folded = _case("static")
  changed = _options(**CASES["static"] | {"fold": False})
  separate = _decode(model, params, changed, PROMPTS, jax.random.key(5))
  blocks = np.array([-(-WINDOW // 4) - len(prompt) // 4 for prompt in PROMPTS])
  np.testing.assert_array_equal(separate[1].passes_B - folded[1].passes_B, blocks - 1)
  _equal((folded[0], folded[1].replace(passes_B=separate[1].passes_B)), separate)

  caches = []
  for fold, rounds in ((True, 3), (False, 2)):
    changed = _options(**CASES["static"] | {"fold": fold})
    decoder = sample.block_decoder(model, changed[0], WINDOW)
    prompt, lengths = sample.pad_prompts(PROMPTS)
    rows = _rows(changed, len(PROMPTS))
    state = sample.start(decoder, params, prompt, jax.random.key(5), lengths=lengths, options=rows)
    for _ in range(rounds):
      state = jax.jit(decoder.round)(params, state)
    caches.append(state.cache)
  np.testing.assert_array_equal(caches[0].length_B, caches[1].length_B)
  assert caches[0].length_B.tolist() == [16, 8, 8, 16, 12]
  used = np.arange(caches[0].capacity)[None] < np.asarray(caches[0].length_B)[:, None]
  for name in ("k_NBSGC", "v_NBSGC"):
    ours, theirs = (np.asarray(getattr(cache, name)) for cache in caches)
    np.testing.assert_allclose(ours[:, used], theirs[:, used], atol=1e-5)
  assert options[0].fold


@pytest.mark.slow
def test_garbage_in_the_cache_is_never_read():
  """9.2-e: slots beyond each row's length hold NaN before every round; nothing changes."""
  model, params, options, expected = _case("dynamic")
  decoder = sample.block_decoder(model, options[0], WINDOW)
  prompt, lengths = sample.pad_prompts(PROMPTS)
  rows = _rows(options, len(PROMPTS))
  state = sample.start(decoder, params, prompt, jax.random.key(5), lengths=lengths, options=rows)

  def poison(cache):
    free_BS = jnp.arange(cache.capacity)[None] >= cache.length_B[:, None]
    spoil = lambda x: jnp.where(free_BS[None, :, :, None, None], jnp.nan, x)  # noqa: E731
    return cache.replace(k_NBSGC=spoil(cache.k_NBSGC), v_NBSGC=spoil(cache.v_NBSGC))

  poisoned = decoder._replace(
    admit=lambda *_: state,
    round=lambda params, s: decoder.round(params, s.replace(cache=poison(s.cache))),
  )
  ours = jax.jit(
    lambda params: sample.decode(poisoned, params, prompt, jax.random.key(5), lengths=lengths)
  )(params)
  _equal(ours, expected)
  assert np.isfinite(ours[1].log_prob_BL).all()


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch():
  """9.5-e, 9.4-d: permuted, subset and padded batches give every row what it had.

  The same key gives the same sampled tokens wherever its row is; what pads a prompt is irrelevant.
  """
  model, params, options, (tokens, info) = _case("dynamic")
  keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(5), row))(jnp.arange(5))
  order = np.array([4, 2, 0, 3])
  prompt, lengths = sample.pad_prompts([PROMPTS[row] for row in order], length=14)
  dirty = jnp.where(jnp.arange(14)[None] < lengths[:, None], prompt, 10_000)
  decoder, rows = sample.block_decoder(model, options[0], WINDOW), _rows(options, 4)
  ours = jax.jit(
    lambda params, keys: sample.decode(decoder, params, dirty, keys, lengths=lengths, options=rows)
  )(params, keys[order])
  _equal(ours, jax.tree.map(lambda x: x[order], (tokens, info)))
  assert len(np.unique(info.lengths_B)) > 1  # rows end at different rounds


@pytest.mark.slow
def test_rows_that_are_done_stay_as_they_are():
  """9.5-e: after its end nothing of a row changes, and limits hold row by row."""
  params = toy.script(jnp.arange(WINDOW + 2) % 11 + 1)
  options = _options(temperature=0.0, stop_ids=(9,))
  decoder = sample.block_decoder(toy.Script(), options[0], WINDOW)
  prompt, lengths = sample.pad_prompts([[1], [2, 2], [3] * 6, [4] * 9])
  limits = jnp.asarray([5, WINDOW, 6, WINDOW])
  rows = _rows(options, 4)
  state = sample.start(
    decoder, params, prompt, jax.random.key(0), lengths=lengths, max_length=limits, options=rows
  )
  assert decoder.done(state).tolist() == [False, False, True, False]
  step, previous = jax.jit(decoder.round), state
  for _ in range(8):
    state = step(params, previous)
    done = np.asarray(decoder.done(previous))
    rows = lambda s: [s.progress.replace(options=None), s.cache.length_B]  # noqa: E731
    for new, old in zip(jax.tree.leaves(rows(state)), jax.tree.leaves(rows(previous)), strict=True):
      np.testing.assert_array_equal(new[done], old[done])
    previous = state
  progress = state.progress
  assert decoder.done(state).all()
  assert progress.length_B.tolist() == [5, 9, 6, 20]
  assert progress.reason_B.tolist() == [sample.LENGTH, sample.STOP, sample.LENGTH, sample.STOP]


@pytest.mark.slow
def test_jit_equals_eager_and_compiles_once():
  """9.5-g: the plain call equals the compiled one; lengths inside a bucket share a program."""
  params = toy.script(jnp.arange(40) % 11 + 1, sharpness=2.0)
  options = _options(temperature=0.7, threshold=0.4)
  decoder, rows = sample.block_decoder(toy.Script(), options[0], 16), _rows(options, 2)

  @jax.jit
  @at_most
  def run(params, prompt, lengths, limits, rng):
    given = {"lengths": lengths, "max_length": limits, "options": rows}
    return sample.decode(decoder, params, prompt, rng, **given)

  for row in range(3):
    prompt, lengths = sample.pad_prompts([[1] * (row + 3), [2] * (7 - row)], length=8)
    arguments = (params, prompt, lengths, jnp.asarray([16 - row, 12 + row]), jax.random.key(row))
    compiled = run(*arguments)
    if row != 1:
      given = {"lengths": lengths, "max_length": arguments[3], "options": rows}
      eager = sample.decode(decoder, params, prompt, jax.random.key(row), **given)
      _equal(eager, compiled, atol=1e-6)


@pytest.mark.slow
def test_streaming():
  """Each round shows a longer decided prefix; the last one is the result of the compiled loop."""
  model, params, options, expected = _case("dynamic")
  decoder = sample.block_decoder(model, options[0], WINDOW)
  prompt, lengths = sample.pad_prompts(PROMPTS)
  shown = []
  result = sample.decode(
    decoder,
    params,
    prompt,
    jax.random.key(5),
    lengths=lengths,
    options=_rows(options, len(PROMPTS)),
    on_round=lambda tokens, lengths: shown.append((tokens, lengths)),
  )
  _equal(result, expected)
  for (tokens, ends), (later, later_ends) in itertools.pairwise(shown):
    assert isinstance(tokens, np.ndarray) and (later_ends >= ends).all()
    for row, end in enumerate(ends):
      np.testing.assert_array_equal(tokens[row, :end], later[row, :end])
  np.testing.assert_array_equal(shown[-1][0], expected[0])
  assert len(shown) == -(-WINDOW // 4)


# --- strategies -----------------------------------------------------------------------------------


@functools.cache
def _scripted(**changes):
  """Decode two rows of a random script greedily; return (tokens, info, network calls)."""
  calls = []
  params = jnp.asarray(np.random.default_rng(7).normal(size=(24, toy.V)) * 2, jnp.float32)
  model = toy.Script(seen=lambda tokens: calls.append(tokens.shape))
  options = _options(**{"temperature": 0.0, "block_length": 8} | changes)
  tokens, info = _decode(model, params, options, [[1, 2, 3], [4] * 8], jax.random.key(0), window=24)
  jax.effects_barrier()
  return tokens, info, len(calls)


@pytest.mark.slow
def test_thresholds_through_decoding():
  """9.5-c: threshold above 1 is the static strategy; 0 takes one pass a block, and really one."""
  _, static, calls = _scripted(strategy="low_confidence_static")
  _, dynamic, _ = _scripted(threshold=1.5)
  np.testing.assert_array_equal(static.step_BL, dynamic.step_BL)
  assert static.passes_B.tolist() == [21, 16]
  assert calls == 1 + 24  # the prefill; three rounds, the first as long as its slower row
  for changes in (
    {"threshold": 0.0},
    {"strategy": "entropy_bounded", "entropy_bound": 1e9},
    {"strategy": "factor", "factor": 1e9},
  ):
    _, info, calls = _scripted(**changes)
    assert info.passes_B.tolist() == [3, 2] and calls == 1 + 3
    assert (np.asarray(info.step_BL)[0, 3:] == 0).all()
  _, single, _ = _scripted(strategy="entropy_bounded", entropy_bound=0.0)
  assert single.passes_B.tolist() == [21, 16]


@pytest.mark.parametrize("strategy", _one("entropy_bounded", select.STRATEGIES))
def test_every_strategy_ends_in_time(strategy):
  """9.5-a: T passes a block at the most, the prompt unchanged, no mask although it is likeliest."""
  params = toy.script(jnp.full(24, toy.MASK)) + (jnp.arange(toy.V) % 5 * 0.3)[None]
  steps = 8 if strategy == "first_hitting" else 3
  options = _options(
    block_length=8,
    steps=steps,
    strategy=strategy,
    entropy_bound=0.0,
    factor=0.0,
    temperature=float(strategy == "sequential"),
  )
  prompts = [[1, 2, 3], [4] * 8]
  tokens, info = _decode(toy.Script(), params, options, prompts, jax.random.key(0), window=24)
  assert tokens[0, :3].tolist() == [1, 2, 3] and tokens[1, :8].tolist() == [4] * 8
  assert toy.MASK not in np.asarray(tokens) and info.lengths_B.tolist() == [24, 24]
  assert np.asarray(info.step_BL).max() == steps - 1
  assert info.passes_B[1] == 2 * steps
  if strategy == "first_hitting":
    steps_of_block = np.sort(np.asarray(info.step_BL)[1, 8:16])
    np.testing.assert_array_equal(steps_of_block, np.arange(8))


@pytest.mark.slow
def test_law_through_decoding():
  """9.5-b: at temperature 0.7 the tokens of 4,000 rows follow the tempered distribution."""
  params = jnp.asarray(np.random.default_rng(2).normal(size=(4, toy.V)), jnp.float32)
  # The leftmost first: confidence would prefer likely tokens of the first step.
  options = _options(block_length=2, temperature=0.7, strategy="sequential")
  prompt = jnp.ones((4000, 1), jnp.int32)
  decoder, rows = sample.block_decoder(toy.Script(), options[0], 4), _rows(options, 4000)
  run = jax.jit(lambda rng: sample.decode(decoder, params, prompt, rng, options=rows))
  tokens, _ = run(jax.random.key(3))
  for position in (1, 2, 3):
    probs = np.exp(np.asarray(params[position, : toy.MASK], np.float64) / 0.7)
    counts = np.bincount(tokens[:, position], minlength=toy.V)
    assert counts[toy.MASK] == 0
    expected = probs / probs.sum() * 4000
    assert scipy.stats.chisquare(counts[: toy.MASK], expected).pvalue > FOLLOWS
  pairs = tokens[:, 2] * toy.V + tokens[:, 3]
  joint = scipy.stats.contingency.crosstab(tokens[:, 2], tokens[:, 3]).count
  assert len(np.unique(pairs)) > 100 and scipy.stats.chi2_contingency(joint).pvalue > FOLLOWS


# --- stop ids and boundaries ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fold", _one(True, [True, False]))
def test_stop_ids(fold):
  """9.5-d: first, in the middle and last in a block, in the prompt, at and beyond the limit."""
  text = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2, 3, 1, 1])
  cases = (  # prompt, stop id, limit, length, reason
    ([1, 2], 5, 16, 5, sample.STOP),  # first place of block 1
    ([1, 2], 6, 16, 6, sample.STOP),  # in the middle
    ([1, 2], 8, 16, 8, sample.STOP),  # last place
    ([1, 2], 3, 16, 3, sample.STOP),  # the first token generated
    ([6, 6, 6], 6, 16, 6, sample.STOP),  # in the prompt too: does not count
    ([1] * 6, 5, 16, 16, sample.LENGTH),  # where the prompt is: never generated
    ([1, 2], 8, 8, 8, sample.STOP),  # the last token allowed
    ([1, 2], 8, 7, 7, sample.LENGTH),  # beyond the limit, in the same block
    ([], 1, 16, 1, sample.STOP),
  )
  for prompt, stop_id, limit, length, reason in cases:
    tokens, info = _run_script(fold, (stop_id,), prompt, limit)
    assert int(info.lengths_B[0]) == length and int(info.reason_B[0]) == reason, (prompt, stop_id)
    expected = np.concatenate([prompt, text[len(prompt) : length], np.zeros(16 - length)])
    np.testing.assert_array_equal(tokens[0], expected)
  _, info = _run_script(fold, (11, 7, 0), [1, 2], 16)
  assert int(info.lengths_B[0]) == 7  # the first of several


def _run_script(fold, stop_ids, prompt, limit):
  text = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2, 3, 1, 1])
  run = _compiled_script(fold, stop_ids)
  tokens, lengths = sample.pad_prompts([prompt], length=8)
  return run(toy.script(text), tokens, lengths, jnp.asarray([limit]))


@functools.cache
def _compiled_script(fold, stop_ids):
  options = _options(temperature=0.0, threshold=0.0, stop_ids=stop_ids, fold=fold)
  decoder, rows = sample.block_decoder(toy.Script(), options[0], 16), _rows(options, 1)

  @jax.jit
  def run(params, prompt, lengths, limits):
    given = {"lengths": lengths, "max_length": limits, "options": rows}
    return sample.decode(decoder, params, prompt, jax.random.key(0), **given)

  return run


@pytest.mark.slow
@pytest.mark.parametrize("window", _one(10, [8, 10]))
def test_boundaries(window):
  """9.5-f: all prompt lengths from none to a full window, all limits; no cache is overrun."""
  params = toy.script(jnp.arange(12) + 1 - (jnp.arange(12) == 11))
  options = _options(temperature=0.0, strategy="sequential", steps=2)
  decoder = sample.block_decoder(toy.Script(), options[0], window)
  pairs = [(p, limit) for p in range(window + 1) for limit in range(window + 1)]
  prompt, lengths = sample.pad_prompts([[9] * p for p, _ in pairs], length=window)
  limits = jnp.asarray([limit for _, limit in pairs])

  @jax.jit
  def run(params):
    given = {"lengths": lengths, "max_length": limits, "options": _rows(options, len(pairs))}
    state = sample.start(decoder, params, prompt, jax.random.key(0), **given)
    state = jax.lax.fori_loop(0, 5, lambda _, s: decoder.round(params, s), state)
    result = sample.decode(decoder, params, prompt, jax.random.key(0), **given)
    return result, state.cache.length_B > state.cache.capacity

  (tokens, info), overflow = run(params)
  assert not overflow.any() and tokens.shape == (len(pairs), window)
  for row, (p, limit) in enumerate(pairs):
    end = max(p, limit)
    assert int(info.lengths_B[row]) == end and int(info.reason_B[row]) == sample.LENGTH
    expected = np.concatenate([[9] * p, np.asarray(jnp.argmax(params, -1))[p:end]])
    np.testing.assert_array_equal(tokens[row, :end], expected)
    in_first = 4 - p % 4
    blocks_after = -(-limit // 4) - p // 4 - 1
    passes = min(in_first, 2) + 2 * blocks_after if limit > p else 0
    assert int(info.passes_B[row]) == passes


def test_prompt_may_hold_the_mask():
  """What a prompt holds is given, the mask token included: nothing in it is decided."""
  params = toy.script(jnp.arange(8) + 1)
  prompts = [[1, toy.MASK, 3, toy.MASK, toy.MASK]]
  tokens, info = _decode(
    toy.Script(), params, _options(strategy="sequential"), prompts, jax.random.key(0), window=8
  )
  assert tokens[0].tolist() == [*prompts[0], 6, 7, 8] and info.passes_B.tolist() == [3]


# --- input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"prompt": jnp.ones(3, jnp.int32)}, "shape (3,)"),
    ({"prompt": jnp.ones((2, 9), jnp.int32)}, "max_length=8"),
    ({"max_length": 9}, "max_length=9 must be in 0 … 8"),
    ({"lengths": np.array([1, 4])}, "lengths=[1, 4] must be in 0 … 3"),
    ({"lengths": np.array([1, 2, 3])}, "one for each of 2 rows"),
    ({"rng": jax.random.split(jax.random.key(0), 3)}, "one for each of 2 rows"),
  ],
)
def test_input_is_checked(changes, words):
  decoder = sample.block_decoder(toy.Script(), _options()[0], 8)
  given = {"prompt": jnp.ones((2, 3), jnp.int32), "rng": jax.random.key(0)} | changes
  prompt, rng = given.pop("prompt"), given.pop("rng")
  with pytest.raises(Exception) as caught:
    sample.decode.__wrapped__(decoder, toy.script(range(8)), prompt, rng, **given)
  assert words in str(caught.value)


def test_decoder_and_prompts_are_checked():
  for options, window, words in (
    (_options(), 65, "max_length=65 must be in 1 … 64"),
    (_options(), 0, "max_length=0"),
    (_options(mask_id=toy.V), 8, "not below vocab_size=13"),
    (_options(stop_ids=(99,)), 8, "stop id 99"),
    (_options(stop_ids=(3, toy.MASK)), 8, "the mask must not be a stop id"),
  ):
    with pytest.raises(ValueError) as caught:
      decoder = sample.block_decoder(toy.Script(), options[0], window)
      prompt = jnp.ones((1, 1), jnp.int32)
      sample.start(decoder, toy.script(range(8)), prompt, KEY, options=_rows(options, 1))
    assert words in str(caught.value)
  with pytest.raises(ValueError, match="at least one row"):
    sample.pad_prompts([])
  with pytest.raises(ValueError, match="has 3 tokens and length=2"):
    sample.pad_prompts([[1, 2, 3]], length=2)


def test_untyped_keys_are_refused():
  """Raw uint32 keys are not keys of this library."""
  with pytest.raises(ValueError, match="typed key"):
    sample.RowOptions.make(2, jax.random.PRNGKey(0))


@pytest.mark.slow
def test_no_key_is_used_twice():
  """One key per position and step, and none is used twice; a row's key only has children."""
  options = _options(block_length=2, threshold=0.3)
  decoder, rows = sample.block_decoder(toy.Script(), options[0], 4), _rows(options, 2)
  prompt = jnp.ones((2, 1), jnp.int32)
  with jax.debug_key_reuse(True):
    sample.decode(decoder, toy.script(range(4)), prompt, jax.random.key(0), options=rows)
