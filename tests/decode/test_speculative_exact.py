# SPDX-License-Identifier: Apache-2.0
"""Stacked speculative decoding gives the target's own text: every strategy, draft and alignment."""

import dataclasses
import functools
import itertools

import block_toy as script
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speculative_toy as toy

from dlm_jax import sample

ROWS, WINDOW = 27, 22  # three times every prompt length or more
# 9 rules, six of them slow, × 27 rows (prompts, keys, limits) × 5 drafts: 405 texts, 1,215 in all
RULES = {
  "static": {"strategy": "low_confidence_static", "temperature": 0.0},
  "static_drawn": {"strategy": "low_confidence_static", "temperature": 0.7, "steps": 3},
  "dynamic": {"strategy": "low_confidence_dynamic", "threshold": 0.4, "temperature": 0.0},
  "dynamic_drawn": {
    "strategy": "low_confidence_dynamic",
    "threshold": 0.5,
    "temperature": 0.7,
    "top_k": 12,
    "top_p": 0.9,
    "confidence": "filtered",
  },
  "sequential": {"strategy": "sequential", "temperature": 0.0, "steps": 2, "budget": "block"},
  "sequential_drawn": {"strategy": "sequential", "temperature": 1.0},
  "entropy_bounded": {
    "strategy": "entropy_bounded",
    "entropy_bound": 2.0,
    "temperature": 0.0,
    "block_length": 8,
  },
  "factor": {"strategy": "factor", "factor": 1.0, "temperature": 0.7},
  "first_hitting": {"strategy": "first_hitting", "temperature": 1.0},
}
SLOW = set(RULES) - {"static"}


def _rule(name):
  """Return a rule, and what its rows ask for."""
  return script.split({"mask_id": toy.MASK, "stop_ids": (3, 11), **RULES[name]})


def _own(rule, arguments):
  """Return the final state of the target alone, one step after the other."""
  model, params = toy.network()
  alone = sample.block_decoder(model, dataclasses.replace(rule, fold=False), WINDOW)
  return toy.run(alone, params, arguments)


@functools.cache
def _speculative(name):
  model, _ = toy.network()
  options = sample.SpeculativeOptions(target=_rule(name)[0], verify="stacked")
  return sample.speculative_decoder(model, model, options, WINDOW)


def _same_text(state, own):
  """Assert equal tokens, steps, log-probabilities and ends; return nothing."""
  np.testing.assert_array_equal(toy.text(state), toy.text(own))
  ours, theirs = state.progress, own.progress
  np.testing.assert_array_equal(ours.reason_B, theirs.reason_B)
  generated = toy.text(own) >= 0
  np.testing.assert_array_equal(np.where(generated, ours.step_BW - theirs.step_BW, 0), 0)
  apart = np.where(generated, ours.log_prob_BW - theirs.log_prob_BW, 0)
  np.testing.assert_allclose(apart, 0, atol=1e-3)


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RULES],
)
def test_text_is_the_targets_own(name):
  """9.4-b, c, d, e: 135 texts per rule, token for token; passes; the target as its own draft."""
  rule, asked = _rule(name)
  shortest = 0 if rule.strategy in ("sequential", "first_hitting") else 1
  arguments = toy.requests(ROWS, WINDOW, seed=len(name), shortest=shortest, **asked)
  _, params = toy.network()
  own = _own(rule, arguments)
  decoder = _speculative(name)
  passes = []
  for quality, draft in enumerate(toy.drafts()):
    state = toy.run(decoder, {"target": params, "draft": draft}, arguments)
    _same_text(state, own)
    toy.same_cache(state.target_cache, own.cache)
    counts = state.counts
    # 9.4-e: a round settles a step at least, so no row takes more passes than alone, unfolded;
    # what is settled behind a stop id or the limit, or never needed, only makes it less.
    assert (counts["target_passes"] <= own.progress.passes_B).all()
    assert (counts["target_passes"] <= rule.steps * toy.blocks(state, rule.block_length)).all()
    passes.append(int(counts["target_passes"].sum()))
    if quality == 0:  # 9.4-c
      np.testing.assert_array_equal(counts["accepted"], counts["drafted"])
      np.testing.assert_array_equal(counts["target_passes"], toy.blocks(state, rule.block_length))
      np.testing.assert_array_equal(state.target_cache.length_B, own.cache.length_B)
  assert passes[0] < passes[1] <= passes[2] <= max(passes[3:]), passes


@pytest.mark.slow
def test_another_rule_for_the_draft():
  """9.4-b: fewer steps, another order and temperature in the draft: never another text."""
  rule, asked = _rule("static")
  arguments = toy.requests(ROWS, WINDOW, seed=1, **asked)
  model, params = toy.network()
  small, weak = toy.network(1)
  options = sample.SpeculativeOptions(
    target=rule,
    draft=dataclasses.replace(rule, strategy="sequential", steps=2, budget="block"),
    draft_temperature=0.5,
  )
  assert options.exact
  decoder = sample.speculative_decoder(model, small, options, WINDOW)
  state = toy.run(decoder, {"target": params, "draft": weak}, arguments)
  _same_text(state, _own(rule, arguments))


def test_rows_are_independent():
  """9.5-e: the same rows in another order, so at other stages side by side, give the same texts."""
  arguments = toy.requests(ROWS, WINDOW, seed=2, **_rule("static")[1])
  _, params = toy.network()
  decoder = _speculative("static")
  both = {"target": params, "draft": toy.drafts()[1]}
  before = toy.run(decoder, both, arguments)
  order = jnp.asarray(np.random.default_rng(0).permutation(ROWS))
  after = toy.run(decoder, both, jax.tree.map(lambda x: x[order], arguments))
  np.testing.assert_array_equal(toy.text(before)[order], toy.text(after))
  for name, count in before.counts.items():
    np.testing.assert_array_equal(count[order], after.counts[name])


@pytest.mark.slow
def test_prefix_only_grows():
  """9.4-b: rounds may leave holes, but what is emitted is decided, and stays."""
  arguments = toy.requests(ROWS, WINDOW, seed=3, **_rule("static")[1])
  _, params = toy.network()
  both = {"target": params, "draft": toy.drafts()[2]}
  states = list(toy.rounds(_speculative("static"), both, arguments))
  holes = 0
  for before, after in itertools.pairwise(states):
    old, new = toy.text(before), toy.text(after)
    assert ((new == old) | (old < 0)).all() and (new != toy.MASK).all()
    holes += int((before.progress.running_B & (new == old).all(1)).sum())
  assert holes  # rounds of running rows that settled a step behind a hole
  np.testing.assert_array_equal(states[-1].progress.passes_B, states[-1].counts["target_passes"])
  assert int(states[-1].progress.passes_B.max()) == len(states) - 1
