# SPDX-License-Identifier: Apache-2.0
"""The state, the batch with its keys and times, and the one `update`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlm_jax.objectives import Objective, draw_batch, output_params, update
from dlm_jax.objectives.batch import split_each, stratified_times
from dlm_jax.objectives.state import make_state

B, L = 8, 3
TOKENS = jnp.arange(B * L, dtype=jnp.int32).reshape(B, L)
START = {"w": jnp.asarray([1.0, -2.0, 0.5])}


def _batch(seed=0, **features):
  return draw_batch({"tokens": TOKENS, **features}, jax.random.key(seed))


# --- times and keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", "ab")
def test_golden_antithetic_times(golden, variant):
  """With the recorded uniforms in place of ours, `stratified_times` is the published formula."""
  vectors, config = golden(f"dit_mdlm__{variant}")
  uniform, size = vectors["antithetic_uniform"], len(vectors["antithetic_uniform"])
  with pytest.MonkeyPatch.context() as patch:
    feed = iter(uniform)
    patch.setattr(jax, "vmap", lambda f: lambda keys: jnp.stack([f(k) for k in range(size)]))
    patch.setattr(jax.random, "uniform", lambda key: jnp.asarray(next(feed)))
    t = stratified_times(jax.random.split(jax.random.key(0), size), config["sampling_eps"])
  np.testing.assert_allclose(t, vectors["antithetic_t"], rtol=1e-6)


@pytest.mark.parametrize("size", [1, 8, 512])
def test_one_time_per_stratum_in_order(size):
  t = np.asarray(stratified_times(jax.random.split(jax.random.key(1), size), 1e-3))
  u = (t - 1e-3) / (1 - 1e-3)
  np.testing.assert_array_equal(np.floor(u * size * (1 - 1e-6) + 1e-6), np.arange(size))
  assert t.min() >= 1e-3 and t.max() <= 1


def test_times_are_uniform_inside_their_stratum():
  keys = jax.random.split(jax.random.key(2), (4000, 4))
  t = np.asarray(jax.vmap(lambda k: stratified_times(k, 0.0))(keys)) * 4 - np.arange(4)
  np.testing.assert_allclose(t.mean(0), 0.5, atol=5 / np.sqrt(12 * 4000))
  np.testing.assert_allclose(t.var(0), 1 / 12, rtol=0.08)
  assert abs(np.corrcoef(t.T)[np.triu_indices(4, 1)]).max() < 5 / np.sqrt(4000)


def test_batch_keys():
  """Every sequence has its own key, which is not the one that its time came from."""
  batch = _batch()
  assert set(batch) == {"tokens", "rng", "t"} and batch["t"].dtype == jnp.float32
  data = np.asarray(jax.random.key_data(batch["rng"]))
  assert len(np.unique(data, axis=0)) == B
  half = draw_batch({"tokens": TOKENS[:4]}, jax.random.key(0))
  np.testing.assert_array_equal(jax.random.key_data(half["rng"]), data[:4])
  reused = stratified_times(batch["rng"], 1e-3)
  assert np.all(np.asarray(reused) != np.asarray(batch["t"]))
  valid = TOKENS > 5
  np.testing.assert_array_equal(_batch(valid=valid)["valid"], valid)
  assert np.any(np.asarray(_batch(1)["t"]) != np.asarray(batch["t"]))


def test_split_each():
  keys = _batch()["rng"]
  parts = split_each(keys, 3)
  assert len(parts) == 3
  data = np.concatenate([np.asarray(jax.random.key_data(p)) for p in (*parts, keys)])
  assert len(np.unique(data, axis=0)) == 4 * B
  alone = split_each(keys[2:3], 3)
  for whole, one in zip(parts, alone, strict=True):
    np.testing.assert_array_equal(jax.random.key_data(whole[2:3]), jax.random.key_data(one))


# --- one update ---------------------------------------------------------------------------------


def _loss(params, batch):
  """A loss with per-sequence noise, a metric and an extra output."""
  noise = jax.vmap(lambda rng: jax.random.normal(rng, (L,)))(batch["rng"])
  residual = params["w"][None] * batch["tokens"] * 0.1 - noise * batch["t"][:, None]
  return jnp.mean(residual**2), ({"largest": jnp.abs(residual).mean()}, residual)


def _state(tx):
  trees = {"a": START, "b": START, "frozen": START}
  return make_state(trees, {"a": tx, "b": tx}, averaged=("a",))


def test_update_by_hand():
  tx = optax.adam(0.1)
  state, metrics, extra = update(_state(tx), "a", _loss, _batch(), tx, decay=0.5)
  (value, (own, residual)), gradient = jax.value_and_grad(_loss, has_aux=True)(START, _batch())
  step, _ = tx.update(gradient, tx.init(START), START)
  np.testing.assert_allclose(state.trees["a"]["w"], START["w"] + step["w"], rtol=1e-6)
  assert set(metrics) == {"a/loss", "a/grad_norm", "a/largest"}
  np.testing.assert_allclose(metrics["a/loss"], value, rtol=1e-6)
  np.testing.assert_allclose(metrics["a/grad_norm"], jnp.linalg.norm(gradient["w"]), rtol=1e-6)
  np.testing.assert_allclose(metrics["a/largest"], own["largest"], rtol=1e-6)
  np.testing.assert_allclose(extra, residual, rtol=1e-6)
  for name in ("b", "frozen"):
    np.testing.assert_array_equal(state.trees[name]["w"], START["w"])
  jax.tree.map(np.testing.assert_array_equal, state.opt["b"], tx.init(START))
  assert state.step == 0  # the objective counts, not `update`: a step may hold several


@pytest.mark.parametrize(
  "accumulate", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))]
)
def test_micro_batches_average(accumulate):
  tx = optax.sgd(0.3)
  one, metrics, _ = update(_state(tx), "a", _loss, _batch(), tx)
  many, metrics_many, extra = update(_state(tx), "a", _loss, _batch(), tx, accumulate=accumulate)
  np.testing.assert_allclose(many.trees["a"]["w"], one.trees["a"]["w"], rtol=1e-5, atol=1e-7)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), metrics_many, metrics)
  strided = _loss(START, jax.tree.map(lambda x: x[accumulate - 1 :: accumulate], _batch()))[1][1]
  np.testing.assert_allclose(extra, strided, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_average_ramps_up(decay):
  """At update n the rate is min(decay, (1 + n)/(10 + n)), n from 1."""
  tx = optax.sgd(0.3)
  state, average = _state(tx), np.asarray(START["w"], np.float64)
  for n in range(1, 12):
    state, _, _ = update(state, "a", _loss, _batch(n), tx, decay=decay)
    state = state.replace(step=state.step + 1)
    rate = min(decay, (1 + n) / (10 + n))
    average = rate * average + (1 - rate) * np.asarray(state.trees["a"]["w"], np.float64)
    np.testing.assert_allclose(state.ema["a"]["w"], average, rtol=1e-5)
  assert set(state.ema) == {"a"}


def test_every_buffer_is_its_own():
  state = _state(optax.adam(0.1))
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)
  assert START["w"].unsafe_buffer_pointer() not in pointers


def test_output_params():
  state = _state(optax.sgd(0.1))
  state = state.replace(ema={"a": {"w": jnp.zeros(3)}})
  nothing = lambda *_: state  # noqa: E731
  averaged, plain = (output_params(state, Objective(nothing, nothing, n)) for n in ("a", "b"))
  assert not np.any(averaged["w"])
  np.testing.assert_array_equal(plain["w"], START["w"])
