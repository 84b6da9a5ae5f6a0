# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct's parts: grouped rewards, times and weights, options, start, frozen blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import tiny

from dlm_jax.errors import InputError
from dlm_jax.models import discriminator
from dlm_jax.objectives import didi_instruct, draw_batch
from dlm_jax.objectives.didi_instruct.options import Options
from dlm_jax.objectives.didi_instruct.rewards import (
  beta_times,
  masked_mean,
  normalise_groups,
  omega,
)
from dlm_jax.objectives.didi_instruct.rollout import rollout, sample
from dlm_jax.objectives.setting import Setting
from dlm_jax.schedules import LogLinear

# --- rewards ------------------------------------------------------------------------------------


def test_group_normalisation_by_hand():
  """Means 2 and 10; deviations with ddof = 1: √(20/3) … and 0."""
  rewards = jnp.array([-1.0, 1.0, 3.0, 5.0, 10.0, 10.0, 10.0, 10.0])
  std = np.sqrt((9 + 1 + 1 + 9) / 3)
  wanted = [-3 / std, -1 / std, 1 / std, 3 / std, 0, 0, 0, 0]
  np.testing.assert_allclose(normalise_groups(rewards, 4), wanted, rtol=1e-6)


def test_pairs_and_the_largest_advantage():
  np.testing.assert_allclose(
    normalise_groups(jnp.array([0.0, 4.0]), 2), [-(0.5**0.5), 0.5**0.5], rtol=1e-6
  )
  top = normalise_groups(jnp.array([0.0, 0.0, 0.0, 9.0]), 4)
  np.testing.assert_allclose(top[-1], 3 / 4**0.5, rtol=1e-6)  # (G − 1)/√G
  many = normalise_groups(jnp.zeros(16).at[0].set(5.0), 16)
  np.testing.assert_allclose(many[0], 3.0)  # clipped: (G − 1)/√G = 3.75


def test_sequences_without_a_mask_are_left_out():
  """Of 1, 3 and one that does not count: mean 2, deviation √2; alone in its group: nothing."""
  rewards = jnp.array([1.0, 0.0, 3.0, 7.0, 0.0, 0.0])
  counted = jnp.array([True, False, True, True, False, False])
  ours = normalise_groups(rewards, 3, counted_B=counted)
  np.testing.assert_allclose(ours, [-(0.5**0.5), 0, 0.5**0.5, 0, 0, 0], rtol=1e-6)


def test_a_group_of_one_is_refused():
  with pytest.raises(ValueError, match=r"group_size=1: .* use 2 or more"):
    Options(group_size=1)


def test_reward_counts_masked_positions_only():
  logits = jnp.array([[1.0, 2.0, 30.0], [5.0, 6.0, 7.0]])
  masked = jnp.array([[True, False, True], [False, False, False]])
  np.testing.assert_allclose(masked_mean(logits, masked, 8.0), [4.5, 0.0])


# --- times and weights --------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 2), (5, 2)])
def test_times_are_beta(a, b):
  u = (jnp.arange(4000) + 0.5) / 4000
  t, density = beta_times(u, a, b)
  assert scipy.stats.kstest(np.asarray(t, np.float64), scipy.stats.beta(a, b).cdf).statistic < 2e-3
  inside = (t > 0.01) & (t < 0.99)
  wanted = scipy.stats.beta(a, b).pdf(np.asarray(t, np.float64))
  np.testing.assert_allclose(density[inside], wanted[inside], rtol=1e-4)


def test_omega():
  t = jnp.array([0.02, 0.1, 0.5, 0.98])
  ours = omega(t, LogLinear(), "elbo", (0.1, 10.0))
  np.testing.assert_allclose(ours, [10, 10, 2, 1 / 0.98], rtol=1e-5)
  np.testing.assert_array_equal(omega(t, LogLinear(), "constant", (0.1, 10.0)), 1)


def _times(**options):
  batch = draw_batch({"tokens": tiny.tokens(batch=64)}, jax.random.key(0))
  return didi_instruct.draw_times(batch, Options(**options), tiny.PROCESS)


@pytest.mark.slow
def test_times_of_a_batch():
  batch = _times()
  np.testing.assert_array_equal(batch["t"], batch["t_mid"])
  ordered = np.sort(batch["t"])
  np.testing.assert_allclose(ordered, np.clip((np.arange(64) + 0.5) / 64, 0.02, 0.98), atol=0.01)
  assert len(np.unique(batch["t"][:4])) == 4, "members of a group have times of their own"
  apart = _times(coupled_time=False)
  assert np.abs(apart["t"] - apart["t_mid"]).mean() > 0.1
  np.testing.assert_allclose(np.sort(apart["t_mid"]), ordered, atol=0.03)
  shared = _times(shared_time=True)["t"].reshape(-1, 4)
  assert np.all(shared == shared[:, :1]) and len(np.unique(shared)) == 16


def test_importance_weights():
  plain, weighted = (
    _times(time_beta=(2.0, 2.0), importance_weight=w, omega="constant") for w in (False, True)
  )
  density = scipy.stats.beta(2, 2).pdf(np.asarray(plain["t"]))
  inside = (plain["t"] > 0.021) & (plain["t"] < 0.979)
  np.testing.assert_allclose(weighted["weight"][inside], 1 / density[inside], rtol=1e-3)
  assert np.all(plain["weight"] == 1)


# --- the method ---------------------------------------------------------------------------------


@functools.cache
def _make(accumulate=1, **options):
  model, params = tiny.network(layers=3)
  optimizers = dict.fromkeys(didi_instruct.TRAINED, optax.adam(1e-2, eps=1e-3))
  objective = didi_instruct.make(
    model=model,
    process=tiny.PROCESS,
    optimizers=optimizers,
    accumulate=accumulate,
    **{"trained_layers": 1, **options},
  )
  return objective, jax.jit(objective.init)(jax.random.key(0), params), params


@pytest.mark.slow
def test_everything_starts_from_the_teacher_and_the_check_sees_it():
  objective, state, params = _make()
  objective.check(state)
  assert tiny.equal(state.trees["teacher"], params) and tiny.equal(state.trees["student"], params)
  wrong = jax.tree.map(jnp.copy, state.trees["discriminator"])
  wrong["lower"]["norm1"]["scale"] += 1
  for tree, value in (("discriminator", wrong), ("student", jax.tree.map(lambda x: x + 1, params))):
    with pytest.raises(InputError, match="does not start from the teacher"):
      objective.check(state.replace(trees={**state.trees, tree: value}))


@pytest.mark.slow
def test_what_moves():
  objective, state, _ = _make()
  after, metrics = jax.jit(objective.step)(state, tiny.batch())
  assert tiny.equal(after.trees["teacher"], state.trees["teacher"])
  old, new = (s.trees["discriminator"] for s in (state, after))
  assert all(tiny.equal(old[name], new[name]) for name in discriminator.FROZEN)
  for name in discriminator.TRAINED:
    assert all(
      jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), old[name], new[name]))
    )
  spectral = [s.aux["discriminator"]["head"]["expand"]["u"] for s in (state, after)]
  assert not np.array_equal(*spectral)
  moments = jax.tree.leaves(state.opt["discriminator"])
  trained = sum(x.size for name in discriminator.TRAINED for x in jax.tree.leaves(old[name]))
  assert sum(x.size for x in moments if x.ndim) == 2 * trained, "no moments of frozen blocks"
  assert 0 <= metrics["discriminator/real_accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    {
      "score_decomposition": False,
      "coupled_time": False,
      "omega": "constant",
      "group_size": 2,
      "real": "teacher",
      "teacher_steps": 3,
      "t0": 0.0,
      "dropout": True,
    },
    pytest.param(
      {
        "time_beta": (2.0, 2.0),
        "importance_weight": True,
        "shared_time": True,
        "kl_beta": 1.0,
        "jeffreys": 0.5,
        "entropy_beta": 0.02,
        "remask": 0.2,
      },
      marks=pytest.mark.slow,
    ),
    pytest.param({"order": "spaced", "remask": 0.2, "kl_beta": 1.0}, marks=pytest.mark.slow),
  ],
  ids=["one step, teacher samples", "regularised", "spaced"],
)
def test_one_run_of_the_student_gives_what_a_replay_gives(options):
  """Every switch; two micro-batches replay the rollout, one keeps its gradient."""
  ends = []
  for count in (1, 2):
    objective, state, _ = _make(accumulate=count, **options)
    step = jax.jit(objective.step)
    state, metrics = step(state, tiny.batch())
    ends.append((state.trees, state.aux, metrics))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), *ends)


@pytest.mark.slow
def test_warmup_keeps_the_student():
  objective, state, _ = _make(warmup=1)
  step = jax.jit(objective.step)
  first, _ = step(state, tiny.batch(0))
  second, _ = step(first, tiny.batch(1))
  assert tiny.equal(first.trees["student"], state.trees["student"])
  assert tiny.equal(first.opt["student"], state.opt["student"])
  assert not tiny.equal(first.trees["discriminator"], state.trees["discriminator"])
  assert not tiny.equal(second.trees["student"], first.trees["student"])


@pytest.mark.slow
def test_prompts_stay():
  """Given tokens are in every state, on both sides of the discriminator, and never scored."""
  model, params = tiny.network()
  valid = np.ones((tiny.B, tiny.L), bool)
  valid[:, 1] = False
  batch = tiny.batch(valid=jnp.asarray(valid))
  batch = didi_instruct.draw_times(batch, Options(), tiny.PROCESS)
  setting, options = Setting(model=model, process=tiny.PROCESS), Options(dropout=True)
  run = functools.partial(rollout, setting=setting, options=options, teacher=params)
  terms, path = jax.jit(run)(params, batch)
  sides = didi_instruct.noised(batch, path.x0, batch["tokens"], tiny.PROCESS)
  drawn = jax.jit(functools.partial(sample, steps=3, setting=setting))(params, batch, batch["rng"])
  for state in (path.z, path.x0, sides["fake"], sides["real"], drawn):
    np.testing.assert_array_equal(state[:, 1], batch["tokens"][:, 1])
  assert np.all(drawn != tiny.MASK) and np.all(np.isfinite(terms.log_prob))


def test_groups_share_prompts():
  valid = jnp.asarray(np.random.default_rng(0).random((tiny.B, tiny.L)) < 0.5)
  batch = didi_instruct.share_prompts(tiny.batch(valid=valid), Options())
  for name in ("tokens", "valid"):
    groups = batch[name].reshape(-1, 4, tiny.L)
    np.testing.assert_array_equal(groups, jnp.broadcast_to(groups[:, :1], groups.shape))
  plain = tiny.batch()
  assert didi_instruct.share_prompts(plain, Options()) is plain


@pytest.mark.slow
def test_chunks_change_nothing():
  """Of the rollout's draws, its terms and their gradient."""
  model, params = tiny.network(dropout=0.0)
  other = jax.tree.map(lambda x: x + 0.1, params)
  batch = didi_instruct.draw_times(tiny.batch(), Options(), tiny.PROCESS)

  def total(params, chunk):
    setting = Setting(model=model, process=tiny.PROCESS, chunk=chunk)
    terms, path = rollout(params, batch, setting=setting, options=Options(), teacher=other)
    return terms.log_prob.sum() + sum(terms.divergences).sum() + terms.entropy.sum(), path

  run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnames="chunk")
  (whole, path), wanted = run(params, chunk=None)
  (value, same), gradient = run(params, chunk=2)
  jax.tree.map(np.testing.assert_array_equal, same, path)
  np.testing.assert_allclose(value, whole, rtol=1e-5)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, gradient, wanted)


@pytest.mark.slow
def test_divergence_and_entropy_of_the_rollout():
  """Of the student from itself 0; of another network, by hand in the first step."""
  model, params = tiny.network(dropout=0.0)
  other = jax.tree.map(lambda x: x + 0.1, params)
  batch = didi_instruct.draw_times(tiny.batch(), Options(), tiny.PROCESS)
  setting = Setting(model=model, process=tiny.PROCESS)
  run = functools.partial(rollout, params, batch, setting=setting)
  run = jax.jit(run, static_argnames="options")
  zero = run(teacher=params, options=Options())[0].divergences
  np.testing.assert_allclose(np.stack(zero), 0, atol=1e-5)
  masks = jnp.full((1, tiny.L), tiny.MASK)
  log_p, log_q = (
    np.asarray(tiny.PROCESS.log_x0(model.apply({"params": p}, masks, jnp.zeros(1))[0], masks[0]))
    for p in (params, other)
  )
  forward = np.sum(np.exp(log_q) * (log_q - log_p), -1).mean()
  reverse = np.sum(np.exp(log_p) * (log_p - log_q), -1).mean()
  for jeffreys, wanted in ((0.0, forward), (1.0, reverse), (0.25, 0.75 * forward + 0.25 * reverse)):
    ours = run(teacher=other, options=Options(jeffreys=jeffreys))[0].divergences[0]
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"omega": "complete"}, "omega='complete' is unknown"),
    ({"real": "both"}, "real='both' is unknown"),
    ({"time_clip": (0.9, 0.1)}, "time_clip"),
    ({"t0": 0.5}, "must be below"),
    ({"label_smoothing": 0.5}, "label_smoothing"),
    ({"teacher_steps": 0}, "at least 1"),
    ({"chunk": 3}, "does not divide"),
    ({"warmup": -1}, "at least 0"),
    ({"kl_beta": -1.0}, "at least 0"),
    ({"jeffreys": 1.5}, r"in \[0, 1\]"),
    ({"omega_clip": (0.1,)}, "two numbers"),
    ({"kl_scales": (0.1,)}, "two numbers"),
    ({"time_beta": (0.0, 1.0)}, "positive"),
    ({"time_clip": (0.02, 1.0)}, "inside"),
    ({"reward_clip": 0.0}, "positive"),
    ({"trained_layers": 4}, r"must be in \[1, 3\]"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    _make(**options)


@pytest.mark.slow
def test_a_teacher_that_is_told_the_time_is_refused():
  model, _ = tiny.network(time_conditioning=True)
  with pytest.raises(ValueError, match="not told the time"):
    didi_instruct.make(
      model=model,
      process=tiny.PROCESS,
      optimizers=dict.fromkeys(didi_instruct.TRAINED, optax.sgd(1.0)),
    )
