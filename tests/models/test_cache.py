# SPDX-License-Identifier: Apache-2.0
"""Keys and values of committed tokens: what a cached step sees, and what commits leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny

from dlm_jax.models import KV, Cache, commit, masks, refill

BLOCK = 4


def _visible(length):
  return masks.block_causal(masks.sequence_slots(jnp.arange(length), BLOCK))[None]


def _prefilled(tokens, capacity, count_B=None):
  model, params = tiny.make()
  cache = Cache.make(model.config, tokens.shape[0], capacity)
  _, kv = tiny.extend(model, params, tokens, None, _visible(tokens.shape[1]), cache)
  return commit(cache, kv, count_B)


def _step(tokens, visible, cache):
  model, params = tiny.make()
  hidden, kv = tiny.extend(model, params, tokens, None, visible, cache)
  return tiny.head(model, params, hidden), kv


@pytest.mark.parametrize("changes", [{}, tiny.EXPERTS], ids=["dense", "experts"])
def test_cached_blocks_are_one_pass(changes):
  """9.2-a: prefill and one step per block give what one uncached block-causal pass does."""
  model, params = tiny.make(dataclasses.replace(tiny.DENSE, **changes))
  tokens = tiny.tokens(2, 16)
  whole = tiny.logits(model, params, tokens, None, _visible(16))
  cache = Cache.make(model.config, 2, 19)
  rows = []
  for start, stop in ((0, 8), (8, 12), (12, 16)):
    visible = _visible(stop - start)
    hidden, kv = tiny.extend(model, params, tokens[:, start:stop], None, visible, cache)
    rows.append(tiny.head(model, params, hidden))
    cache = commit(cache, kv)
  np.testing.assert_allclose(np.concatenate(rows, 1), whole, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(cache.length_B, 16)


def test_no_cache_is_an_empty_cache():
  """9.2-a: `cache=None` returns the same hidden states, keys and values as an empty cache."""
  model, params = tiny.make()
  tokens = tiny.tokens(2, 8)
  bare = tiny.extend(model, params, tokens, None, _visible(8), None)
  empty = Cache.make(model.config, 2, 5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
    bare,
    tiny.extend(model, params, tokens, None, _visible(8), empty),
  )


def test_folded_is_separate():
  """9.2-d: [clean block | next noisy block] in one call: the same cache, the same logits."""
  prompt, pair = tiny.tokens(2, 8), tiny.tokens(2, 8, seed=1)
  start = _prefilled(prompt, 24)
  _, kv = _step(pair[:, :BLOCK], None, start)
  separate = commit(start, kv)
  wanted, noisy = _step(pair[:, BLOCK:], None, separate)

  logits, kv = _step(pair, _visible(8), start)
  folded = commit(start, kv, jnp.full(2, BLOCK))
  np.testing.assert_allclose(logits[:, BLOCK:], wanted, rtol=0, atol=1e-4)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
  jax.tree.map(close, folded, separate)
  # and the second half alone can be kept later
  after = commit(folded, jax.tree.map(lambda x: x[:, :, BLOCK:], kv))
  jax.tree.map(close, after, commit(separate, noisy))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e3])
def test_poison(poison):
  """9.2-e: whatever slots at or beyond a row's length hold, results are the same, bit for bit."""
  counts = jnp.array([5, 8, 0])
  cache = _prefilled(tiny.tokens(3, 8), 16, counts)
  beyond = (jnp.arange(16)[None] >= counts[:, None])[None, :, :, None, None]
  bad = cache.replace(
    k_NBSGC=jnp.where(beyond, poison, cache.k_NBSGC),
    v_NBSGC=jnp.where(beyond, poison, cache.v_NBSGC),
  )
  tokens = tiny.tokens(3, BLOCK, seed=2)
  blind = jnp.ones((1, BLOCK, BLOCK), bool).at[0, 1].set(False)
  for visible in (None, blind):
    clean, dirty = (_step(tokens, visible, c) for c in (cache, bad))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
  assert np.isfinite(dirty[0]).all()


@pytest.mark.slow
def test_rows_are_independent():
  """9.2-a: rows at different lengths, committing different counts, are what each row is alone."""
  counts, more = jnp.array([8, 3, 0]), jnp.array([0, 4, 2])
  tokens, block = tiny.tokens(3, 8), tiny.tokens(3, BLOCK, seed=3)
  cache = _prefilled(tokens, 16, counts)
  _, kv = _step(block, None, cache)
  cache = commit(cache, kv, more)
  np.testing.assert_array_equal(cache.length_B, counts + more)
  last = tiny.tokens(3, 2, seed=4)
  together, _ = _step(last, None, cache)
  for row in range(3):
    one = slice(row, row + 1)
    alone = _prefilled(tokens[one], 16, counts[one])
    _, kv = _step(block[one], None, alone)
    alone, _ = _step(last[one], None, commit(alone, kv, more[one]))
    np.testing.assert_allclose(together[one], alone, rtol=0, atol=1e-5)


def _numbered(queries, batch=3, layers=2):
  """Return keys and values that tell their row and token."""
  value = 100.0 * jnp.arange(1, batch + 1)[:, None] + jnp.arange(queries)[None]
  value = jnp.broadcast_to(value[None, :, :, None, None], (layers, batch, queries, 1, 2))
  return KV(value, -value)


def _blank(capacity, lengths):
  zeros = jnp.zeros((2, 3, capacity, 1, 2))
  return Cache(zeros, zeros, jnp.asarray(lengths, jnp.int32))


def test_commit_writes_what_is_kept_and_nothing_else():
  count = jnp.array([2, 3, 9])  # 9: more than is there
  after = jax.jit(commit)(_blank(7, [0, 1, 3]), _numbered(4), count)
  np.testing.assert_array_equal(
    after.k_NBSGC[1, :, :, 0, 1],
    [[100, 101, 0, 0, 0, 0, 0], [0, 200, 201, 202, 0, 0, 0], [0, 0, 0, 300, 301, 302, 303]],
  )
  np.testing.assert_array_equal(after.k_NBSGC, -after.v_NBSGC)
  np.testing.assert_array_equal(after.length_B, [2, 4, 7])


def test_a_full_row_loses_tokens_but_never_committed_ones():
  """What does not fit is dropped, and the length tells."""
  before = _blank(4, [0, 2, 4])
  before = before.replace(k_NBSGC=before.k_NBSGC + 7, v_NBSGC=before.v_NBSGC + 7)
  after = commit(before, _numbered(3))
  np.testing.assert_array_equal(
    after.k_NBSGC[0, :, :, 0, 0], [[100, 101, 102, 7], [7, 7, 200, 201], [7, 7, 7, 7]]
  )
  np.testing.assert_array_equal(after.length_B, [3, 5, 7])
  again = commit(after, _numbered(3))  # of a row that overflowed already
  np.testing.assert_array_equal(again.k_NBSGC[0, 2], after.k_NBSGC[0, 2])


def test_refilled_rows_start_anew_and_others_stay():
  """Rows take the call's rows in the order asked for; one beyond the last is dropped."""
  before = _blank(4, [1, 2, 3])
  kv = jax.tree.map(lambda x: x + 1, _numbered(2))
  after = jax.jit(refill)(before, jnp.array([2, 0, 3]), kv, jnp.array([2, 1, 2]))
  np.testing.assert_array_equal(
    after.k_NBSGC[1, :, :, 0, 0], [[201, 202, 0, 0], [0] * 4, [101, 102, 0, 0]]
  )
  np.testing.assert_array_equal(after.length_B, [1, 2, 2])
  nothing = jax.tree.map(lambda x: x[:, :, :0], kv)
  emptied = refill(before, jnp.array([2, 0, 3]), nothing, jnp.zeros(3, jnp.int32))
  np.testing.assert_array_equal(emptied.length_B, [0, 2, 0])


def test_a_rejected_draft_leaves_no_trace():
  """Tokens that were written but do not count change no later step."""
  cache = _prefilled(tiny.tokens(2, 8), 20)
  _, kv = _step(tiny.tokens(2, BLOCK, seed=5), None, cache)
  back = commit(cache, kv).replace(length_B=cache.length_B)
  block = tiny.tokens(2, BLOCK, seed=6)
  wanted, got = (_step(block, None, c) for c in (cache, back))
  jax.tree.map(np.testing.assert_array_equal, wanted, got)


@pytest.mark.slow
def test_steps_inside_a_loop_with_a_donated_cache():
  """The whole interface under jit, in a while loop, state on the device; one compilation."""
  model, params = tiny.make()
  tokens = tiny.tokens(2, 3 * BLOCK)

  @functools.partial(jax.jit, donate_argnums=1)
  def run(params, cache):
    def body(state):
      block, cache = state
      now = jax.lax.dynamic_slice_in_dim(tokens, block * BLOCK, BLOCK, axis=1)
      _, kv = model.apply({"params": params}, now, None, None, cache, method="extend")
      return block + 1, commit(cache, kv, jnp.array([BLOCK, 2]))

    return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, cache))[1]

  cache = Cache.make(model.config, 2, 16)
  after = run(params, cache)
  assert cache.k_NBSGC.is_deleted()
  np.testing.assert_array_equal(after.length_B, [12, 6])
  wanted = _prefilled(tokens, 16)
  np.testing.assert_allclose(after.k_NBSGC[:, 0, :12], wanted.k_NBSGC[:, 0, :12], rtol=0, atol=1e-5)


def test_cache_takes_the_dtype_of_the_network():
  config = dataclasses.replace(tiny.DENSE, dtype="bfloat16")
  assert Cache.make(config, 1, 4).k_NBSGC.dtype == jnp.bfloat16
  assert Cache.make(config, 1, 4, jnp.float32).v_NBSGC.shape == (3, 1, 4, 2, 8)
