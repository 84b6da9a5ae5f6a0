# SPDX-License-Identifier: Apache-2.0
"""Ties, temperatures near 0, 64-bit numbers and logits that are none."""

import block_toy as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import sample
from dlm_jax.decode import select

SIZE, WINDOW = 4, 12


def _decode(params, rule, **asked):
  """Decode two rows of a script, [W, V]; return tokens and info as numpy arrays."""
  rounds = sample.block_decoder(toy.Script(), rule, WINDOW)
  options = sample.RowOptions.make(2, **asked)
  prompt = jnp.ones((2, 1), jnp.int32)
  run = jax.jit(
    lambda params: sample.decode(rounds, params, prompt, jax.random.key(3), options=options)
  )
  return jax.tree.map(np.asarray, run(params))


def _script(seed=0):
  return 2 * jax.random.normal(jax.random.key(seed), (WINDOW, toy.V))


def _rule(strategy="low_confidence_static", **more):
  steps = {} if strategy == "first_hitting" else {"steps": 2}
  return sample.BlockRule(
    block_length=SIZE, mask_id=toy.MASK, strategy=strategy, **{**steps, **more}
  )


@pytest.mark.first_case
@pytest.mark.parametrize("strategy", select.STRATEGIES)
def test_logits_that_are_no_numbers_end(strategy):
  """Every position is decided, in as many passes as ever, and its log-probability tells."""
  params = _script().at[5:].set(jnp.nan)
  tokens, info = _decode(params, _rule(strategy), temperature=[0.0, 1.0])
  assert info.lengths_B.tolist() == [WINDOW] * 2 and (tokens != toy.MASK).all()
  assert (info.passes_B <= 3 * SIZE).all()
  assert np.isnan(info.log_prob_BL[:, 5:]).all() and not np.isnan(info.log_prob_BL[:, :5]).any()


def test_temperatures_near_0_are_0():
  """They overflow nothing: tokens, steps and log-probabilities are those of 0."""
  greedy = _decode(_script(), _rule(), temperature=0.0)
  for temperature in (1e-38, 1e-30, 9e-7):
    assert sample.RowOptions.make(1, temperature=temperature).law == "greedy"
    cold = _decode(_script(), _rule(), temperature=[temperature, temperature])
    jax.tree.map(np.testing.assert_array_equal, cold, greedy)


@pytest.mark.slow
def test_untempered_confidence_keeps_its_order_at_any_temperature():
  """At 0.01 every tempered confidence is 1, and the order is left to right."""
  greedy, greedy_info = _decode(_script(), _rule(steps=SIZE), temperature=0.0)
  for confidence, same in (("untempered", True), ("unfiltered", False)):
    rule = _rule(steps=SIZE, confidence=confidence)
    tokens, info = _decode(_script(), rule, temperature=0.01)
    np.testing.assert_array_equal(tokens, greedy)
    assert np.array_equal(info.step_BL, greedy_info.step_BL) == same


def _chosen(strategy, masked_K, score_K, count):
  if strategy == "dynamic":
    return select.dynamic(masked_K, score_K, count, 2.0)
  if strategy == "entropy_bounded":
    return select.entropy_bounded(masked_K, score_K, count, 0.0)
  if strategy == "factor":
    return select.factor(masked_K, score_K, count, 0.0)
  return select.best(masked_K, score_K, count)


@pytest.mark.parametrize("strategy", ["best", "dynamic", "entropy_bounded", "factor"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_only_rounding_tells_apart_is_equal(strategy, count):
  """The leftmost are chosen, as many as asked."""
  rng = np.random.default_rng(count)
  for _ in range(20):
    masked_K = rng.random(8) < 0.7
    levels_K = rng.choice([0.2, 0.5, 0.9], 8)
    noisy_K = levels_K * (1 + 1e-6 * rng.uniform(-1, 1, 8))
    found = [
      np.asarray(_chosen(strategy, jnp.asarray(masked_K), jnp.float32(score_K), jnp.int32(count)))
      for score_K in (levels_K, noisy_K)
    ]
    np.testing.assert_array_equal(*found)
    assert found[0].sum() == min(count, masked_K.sum()) and not (found[0] & ~masked_K).any()


def test_an_empty_prompt_with_a_draft_and_without():
  """Its first block is masks without context: all positions are equal, up to rounding."""
  model, params = toy.make(seed=1)
  draft = toy.make(seed=2)[1]
  rule = _rule(steps=SIZE)
  prompt, lengths = jnp.zeros((2, 1), jnp.int32), jnp.zeros(2, jnp.int32)
  options = sample.RowOptions.make(2, temperature=0.0)
  alone = sample.block_decoder(model, rule, WINDOW)
  pair = sample.SpeculativeOptions(target=rule, verify="stacked")
  both = sample.speculative_decoder(model, model, pair, WINDOW)
  found = [
    jax.jit(
      lambda params, rounds=rounds: sample.decode(
        rounds, params, prompt, jax.random.key(0), lengths=lengths, options=options
      )
    )(networks)
    for rounds, networks in ((alone, params), (both, {"target": params, "draft": draft}))
  ]
  (tokens, info), (other, other_info) = found
  np.testing.assert_array_equal(tokens, other)
  np.testing.assert_array_equal(info.step_BL, other_info.step_BL)


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["stacked", "simsd"])
def test_numbers_of_64_bits(verify):
  """What the loops carry keeps its type."""
  with jax.enable_x64(True):
    model, params = toy.make(seed=1)
    options = sample.SpeculativeOptions(target=_rule(), verify=verify)
    rounds = sample.speculative_decoder(model, model, options, WINDOW)
    networks = {"target": params, "draft": params}
    tokens, info = sample.decode(rounds, networks, jnp.ones((2, 3), jnp.int32), jax.random.key(0))
  assert tokens.dtype == jnp.int32 and info.lengths_B.tolist() == [WINDOW] * 2
