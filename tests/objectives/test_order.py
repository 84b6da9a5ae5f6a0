# SPDX-License-Identifier: Apache-2.0
"""The option `order` of SDTT and DiDi-Instruct: what is masked, and what steps reveal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dlm_jax.objectives import dcd, didi_instruct, orders, sdtt
from dlm_jax.objectives.didi_instruct.rollout import rollout
from dlm_jax.objectives.setting import Setting

M = tiny.MASK


def _left(order, t):
  """Return how many masks the order leaves at times: a share of the valid positions, rounded."""
  share = 1 - np.asarray(tiny.PROCESS.schedule.alpha(jnp.asarray(t, jnp.float32)), np.float64)
  return np.floor(np.asarray(order.count) * share + np.asarray(order.rounding))


def test_steps_of_the_teacher_go_on_in_the_order_of_the_masks():
  """SDTT: ranks below n (1 − α(t)) are masked; a step reveals those above n (1 − α(t − δ))."""
  drawn, valid = tiny.prompted_batch()
  batch = sdtt.corrupt(drawn, process=tiny.PROCESS, order="spaced")
  order, t = batch["order"], np.asarray(batch["t"])
  rank = np.asarray(order.rank)
  np.testing.assert_array_equal(order.count, valid.sum(1))
  masked = valid & (rank < _left(order, t)[:, None])
  np.testing.assert_array_equal(batch["xt"] == M, masked)
  np.testing.assert_array_equal(batch["xt"][~masked], batch["tokens"][~masked])

  model, params = tiny.network(dropout=0.0)
  delta, setting = 0.25, Setting(model=model, process=tiny.PROCESS)
  times = sdtt.teacher_times(batch["t"], delta, num=3)
  run = jax.jit(functools.partial(sdtt.rollout, setting=setting))
  steps = run(params, batch["xt"], times, delta, batch["rng"], order=order)
  later = [rank < _left(order, np.maximum(t - i * delta, 1e-5))[:, None] for i in (1, 2)]
  wanted = sum(np.where(masked, still, 0) for still in later)
  np.testing.assert_array_equal(np.asarray(steps.chosen)[masked], wanted[masked])
  assert set(wanted[masked]) == {0, 1, 2}
  random = run(params, batch["xt"], times, delta, batch["rng"])
  assert np.any(np.asarray(random.chosen)[masked] != wanted[masked])


@pytest.mark.slow
def test_micro_batches_of_a_spaced_order_change_nothing():
  ends = []
  for accumulate in (1, 4):
    objective, state = tiny.distillation(sdtt, order="spaced", accumulate=accumulate)
    state, metrics = jax.jit(objective.step)(state, tiny.batch(1))
    assert all(np.isfinite(x) for x in metrics.values())
    ends.append(state.trees)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *ends)


def test_students_write_and_are_rewarded_in_the_order():
  """DiDi-Instruct: states and noise hold as many masks as the time says, of the valid positions."""
  model, params = tiny.network(dropout=0.0)
  options = didi_instruct.Options(order="spaced", t0=0.0)
  drawn, valid = tiny.prompted_batch()
  batch = didi_instruct.draw_times(drawn, options, tiny.PROCESS)
  setting = Setting(model=model, process=tiny.PROCESS)
  run = jax.jit(functools.partial(rollout, setting=setting, options=options, teacher=None))
  terms, path = run(params, batch)
  replay, same = run(params, batch, path=path)
  assert tiny.equal(path, same)
  np.testing.assert_allclose(replay.log_prob, terms.log_prob, rtol=1e-5)
  noised = didi_instruct.noised(batch, path.x0, batch["tokens"], tiny.PROCESS, "spaced")
  count = valid.sum(1)
  for state, t in ((path.z, "t_mid"), (noised["fake"], "t"), (noised["real"], "t")):
    state = np.asarray(state)
    np.testing.assert_array_equal(state[~valid], batch["tokens"][~valid])
    expected = count * (1 - np.asarray(tiny.PROCESS.schedule.alpha(batch[t])))
    assert np.all(np.abs((state == M).sum(1) - expected) < 1)
  assert not np.any(path.x0 == M)
  both = (np.asarray(noised["fake"]) == M) != (np.asarray(noised["real"]) == M)
  assert np.any(both)  # either side draws an order of its own


@pytest.mark.parametrize("module", [sdtt, didi_instruct])
def test_unknown_orders_are_refused(module):
  with pytest.raises(ValueError, match=r"objective.order='margin' is unknown; use one of random"):
    module.Options(order="margin")
  assert module.Options().order == "random" and orders.ORDERS == ("random", "spaced")


def test_uniform_states_have_no_order():
  with pytest.raises(ValueError, match=r"objective.order is no option of this method"):
    dcd.Options.of({"order": "spaced"})


def test_a_short_order_is_left_to_rounding():
  """One position is masked with the probability 1 − α(t)."""
  size, t = 20_000, 0.3
  rng_B, valid_BL = jax.random.split(jax.random.key(0), size), jnp.ones((size, 1), bool)
  args = "spaced", tiny.PROCESS, rng_B, jnp.zeros((size, 1), jnp.int32), valid_BL
  share = np.mean(orders.masked(*args, jnp.full(size, t)) == M)
  assert abs(share - t * (1 - 1e-3)) < 5 * np.sqrt(t * (1 - t) / size)
