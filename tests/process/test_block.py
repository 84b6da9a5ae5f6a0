# SPDX-License-Identifier: Apache-2.0
"""Noise of block diffusion: recorded schedules and times, strata, who shares a level, laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from given_schedule import Given

from dlm_jax import process, schedules
from dlm_jax.process import BlockNoise
from dlm_jax.process.block import (
  block_uniforms,
  document_uniforms,
  number_blocks,
  stratify,
)

MASK = 9
PROCESS = process.Absorbing(vocab_size=10, mask_id=MASK, schedule=schedules.LogLinear(eps=0.0))
BLOCKS = BlockNoise(process=PROCESS)
DOCUMENTS = BlockNoise(process=PROCESS, levels="document", at_least_one=True)
# two documents, of 7 and 5 tokens, in blocks of 4
POSITION = jnp.concatenate([jnp.arange(7), jnp.arange(5)])
DOCUMENT = jnp.repeat(jnp.arange(2), jnp.array([7, 5]), total_repeat_length=12)
BLOCK = number_blocks(POSITION, 4)
TOKENS = jnp.arange(12) % 8
ALL = jnp.ones(12, bool)


def _draws(noise, count, valid_L=ALL, interval=(1e-3, 1.0), single=False):
  return _jitted(noise, count, valid_L, jnp.array(interval), jnp.array(single))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jitted(noise, count, valid_L, interval, single):
  def draw(rng, row):
    return noise.draw(
      rng, TOKENS, BLOCK, DOCUMENT, valid_L, interval=interval, single=single, row=row, rows=count
    )

  return jax.vmap(draw)(jax.random.split(jax.random.key(0), count), jnp.arange(count))


# --- recorded numbers -----------------------------------------------------------------------------


def _schedules():
  eps = 1e-3
  yield "loglinear", schedules.LogLinear(eps=0.0)
  yield "square", schedules.Polynomial(power=2.0, eps=0.0)
  yield "square_root", schedules.Polynomial(power=0.5, eps=0.0)
  yield "log", Given(function=lambda t: 1 - jnp.log2(1 + t))
  yield "cosine", Given(function=lambda t: (1 - eps) * jnp.cos(t * jnp.pi / 2))


@pytest.mark.parametrize("name, schedule", [pytest.param(*x, id=x[0]) for x in _schedules()])
def test_recorded_schedules(golden, name, schedule):
  """1.5, 6: mask probability and weight of BD3-LM's schedules, where it clips nothing."""
  vectors, config = golden("noise_bd3__a")
  t, wanted = jnp.asarray(vectors["t"]), vectors[f"{name}/move_chance"]
  chance = 1 - schedule.alpha(t)
  free = wanted > config["eps"] * 1.5  # below, the reference clips
  np.testing.assert_allclose(chance[free], wanted[free], rtol=2e-4)
  weight = -vectors[f"{name}/loss_scaling"]
  if name == "cosine":  # the reference divides by the probability plus ε
    weight = weight * (wanted + config["eps"]) / wanted
  noise = BlockNoise(process=process.Absorbing(vocab_size=3, mask_id=2, schedule=schedule))
  np.testing.assert_allclose(noise.weights(t)[free], weight[free], rtol=2e-4)
  np.testing.assert_array_equal(BlockNoise(process=PROCESS, weight="one").weights(t), 1)


@pytest.mark.parametrize("name", ["bd3_forward__a", "bd3_forward__b"])
def test_recorded_times(golden, name):
  """6: BD3-LM's stratified times from recorded uniforms, on a clipped and the full interval."""
  vectors, config = golden(name)
  u = jnp.asarray(vectors["sample_t_uniform"])
  u = stratify(u, jnp.arange(u.size).reshape(u.shape), u.size)
  for low, high, which in ((0.3, 0.8, "clip_0p3_0p8"), (1e-3, 1.0, "full")):
    t = np.repeat(low + (high - low) * u, config["bs"], axis=1)
    np.testing.assert_allclose(t, vectors[f"sample_t_{which}"], rtol=1e-6)


# --- places ---------------------------------------------------------------------------------------


def test_blocks_are_numbered_along_the_sequence():
  np.testing.assert_array_equal(BLOCK, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3])
  np.testing.assert_array_equal(number_blocks(jnp.arange(4), 1), range(4))
  np.testing.assert_array_equal(number_blocks(jnp.array([2, 3, 4, 5]), 4), [0, 0, 1, 1])
  traced = jax.jit(number_blocks)(POSITION, jnp.array(4))
  np.testing.assert_array_equal(traced, BLOCK)


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_every_stratum_is_hit_once(blocks):
  """6: stratified over batch × blocks; within a row they are spread, in random order."""
  rows = 5
  rngs = jax.random.split(jax.random.key(1), rows)
  u = jax.vmap(lambda rng, row: block_uniforms(rng, jnp.array(blocks), 8, row, rows))(
    rngs, jnp.arange(rows)
  )[:, :blocks]
  hit = np.floor(np.asarray(u) * rows * blocks).astype(int)
  assert sorted(hit.ravel()) == list(range(rows * blocks))
  for row in np.asarray(u):
    assert sorted(np.floor(row * blocks)) == list(range(blocks))


def test_a_block_of_a_batch_has_any_level():
  """Whatever its place in the sequence, over rows and keys a block's level is uniform."""
  rngs = jax.random.split(jax.random.key(2), (500, 4))
  draw = jax.vmap(lambda rng, row: block_uniforms(rng, 3, 3, row, 4))
  u = jax.vmap(draw, (0, None))(rngs, jnp.arange(4))
  for k in range(3):
    assert scipy.stats.kstest(np.asarray(u)[:, :, k].ravel(), "uniform").pvalue > 1e-3
  assert len(np.unique(np.argsort(u, axis=-1).reshape(-1, 3), axis=0)) == 6


def test_documents_are_stratified_over_the_batch():
  rngs = jax.random.split(jax.random.key(3), 50)
  u = np.asarray(jax.vmap(lambda r, i: document_uniforms(r, 4, i, 50))(rngs, jnp.arange(50)))
  assert (u >= 0).all() and (u < 1).all()
  for k in range(4):  # one per stratum, the strata shifted
    gaps = np.diff(np.sort(u[:, k]))
    assert gaps.max() < 2 / 50 + 1e-6
  assert np.abs(np.diff(u, axis=1)).min() > 0.2  # those of one row are apart


# --- what a draw keeps to -------------------------------------------------------------------------


def test_who_shares_a_level():
  for noise, group in ((BLOCKS, BLOCK), (DOCUMENTS, DOCUMENT)):
    time = np.asarray(_draws(noise, 8).time_L)
    for row in time:
      levels = [np.unique(row[np.asarray(group) == g]) for g in np.unique(group)]
      assert all(len(level) == 1 for level in levels)
      assert len(np.unique(np.concatenate(levels))) == len(levels)


def test_prompts_are_never_masked_and_tokens_are_kept():
  valid = jnp.arange(12) >= 3
  for noise in (BLOCKS, DOCUMENTS):
    drawn = _draws(noise, 200, valid)
    masked = np.asarray(drawn.tokens_L) == MASK
    assert not masked[:, :3].any() and masked[:, 3:].any(axis=0).all()
    kept = np.broadcast_to(TOKENS, masked.shape)[~masked]
    np.testing.assert_array_equal(np.asarray(drawn.tokens_L)[~masked], kept)
    np.testing.assert_allclose(drawn.weight_L, 1 / drawn.time_L, rtol=1e-6)


@pytest.mark.parametrize("interval", [(0.3, 0.8), (0.45, 0.95), (1e-3, 1.0)])
def test_masked_share_follows_the_interval(interval):
  """9.2-h: times stay in the interval, and given its time a token is masked that often."""
  drawn = _draws(BLOCKS, 4000, ALL, interval)
  time, masked = np.asarray(drawn.time_L), np.asarray(drawn.tokens_L) == MASK
  assert interval[0] <= time.min() < interval[0] + 0.01
  assert interval[1] - 0.01 < time.max() <= interval[1]
  assert abs(masked.mean() - sum(interval) / 2) < 0.01
  for low in np.arange(0.05, 0.95, 0.15):
    inside = (time >= low) & (time < low + 0.15)
    if inside.sum() > 2000:
      assert abs(masked[inside].mean() - time[inside].mean()) < 0.03


def test_at_least_one_mask():
  """9.2-f: a sequence without masks is drawn again, and forced in the end."""
  rare = (1e-4, 2e-4)
  without = _draws(BlockNoise(process=PROCESS, levels="document"), 300, ALL, rare)
  assert (np.asarray(without.tokens_L) == MASK).any(axis=1).mean() < 0.05
  valid = jnp.arange(12) % 2 == 0
  forced = np.asarray(_draws(DOCUMENTS, 300, valid, rare).tokens_L) == MASK
  assert (forced.sum(axis=1) >= 1).all() and not forced[:, 1::2].any()
  assert scipy.stats.chisquare(forced[:, ::2].sum(axis=0)).pvalue > 1e-3
  redrawn = _draws(DOCUMENTS, 2000)
  assert (np.asarray(redrawn.tokens_L) == MASK).any(axis=1).all()
  nothing = _draws(DOCUMENTS, 4, jnp.zeros(12, bool))
  np.testing.assert_array_equal(nothing.tokens_L, np.broadcast_to(TOKENS, (4, 12)))


def test_single_tokens_are_all_masked_and_count_one():
  valid = jnp.arange(12) >= 2
  for noise in (BLOCKS, DOCUMENTS):
    drawn = _draws(noise, 3, valid, (0.3, 0.8), True)
    np.testing.assert_array_equal(drawn.tokens_L == MASK, np.broadcast_to(valid, (3, 12)))
    np.testing.assert_array_equal(drawn.weight_L, 1)


def test_unknown_names():
  for options in ({"levels": "token"}, {"weight": "two"}):
    with pytest.raises(ValueError, match=f"objective.{next(iter(options))}"):
      BlockNoise(process=PROCESS, **options)
