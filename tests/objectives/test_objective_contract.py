# SPDX-License-Identifier: Apache-2.0
"""What every training method keeps to. The methods are found by listing the folder."""

import functools
import importlib
import importlib.util
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dlm_jax import mesh as meshes
from dlm_jax import objectives
from dlm_jax.models import DiT
from dlm_jax.objectives import output_params

NAMES = sorted(m.name for m in pkgutil.iter_modules(objectives.__path__) if m.name != "state")
every_method = pytest.mark.parametrize("name", NAMES)


def _module(name):
  return importlib.import_module(f"dlm_jax.objectives.{name}")


@functools.cache
def _method(name, tx=None, **options):
  """Return (objective, network, parameters of a teacher)."""
  module = _module(name)
  model, params = tiny.network(tiny.network_class(module.make))
  tx = tx or _optimizer()
  objective = module.make(
    model=model, process=tiny.PROCESS, optimizers=dict.fromkeys(module.TRAINED, tx), **options
  )
  return objective, model, params


@functools.cache
def _optimizer():
  return optax.adam(1e-2, eps=1e-3)  # a large ε: rounding of tiny gradients is not amplified


def _init(name, **options):
  objective, _, params = _method(name, **options)
  return objective.init(jax.random.key(0), params)


def _batches(name, seed=0):
  count = _method(name)[0].batches
  batches = tuple(tiny.batch(10 * seed + i) for i in range(count))
  return batches if count > 1 else batches[0]


@functools.cache
def _step(name, **options):
  return jax.jit(_method(name, **options)[0].step)


@functools.cache
def _three_steps(name, **options):
  """Return the state after three steps in a Python loop, and the last metrics."""
  state = _init(name, **options)
  for seed in range(3):
    state, metrics = _step(name, **options)(state, _batches(name, seed))
  return state, metrics


def _close(left, right, tolerance=1e-5):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), left, right
  )


def _same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_listing_finds_the_methods():
  assert {"ar", "idlm", "mdlm"} <= set(NAMES)


@every_method
def test_documentation_names_a_source(name):
  text = f"{_module(name).__doc__}\n{_module(name).make.__doc__}"
  assert re.search(r"Reference: .*(arXiv \d{4}\.\d{5}|\(\d{4}\))", text)


@every_method
def test_three_steps(name):
  """Finite numbers; trained trees and their averages move, the others do not."""
  objective, _, params = _method(name)
  state, metrics = _three_steps(name)
  trained = set(_module(name).TRAINED)
  assert state.step == 3 and state.step.dtype == jnp.int32
  assert trained == set(state.opt) and trained <= set(state.trees) >= {objective.output}
  for tree in state.trees:
    if tree in trained:
      assert all(np.any(a != b) for a, b in _pairs(state.trees[tree], params)), tree
    else:
      _same(state.trees[tree], params)
  for tree in state.ema:
    assert tree in trained
    assert all(np.any(a != b) for a, b in _pairs(state.ema[tree], params)), tree
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))
  assert {f"{tree}/{what}" for tree in trained for what in ("loss", "grad_norm")} <= set(metrics)
  for key, value in metrics.items():
    assert key.split("/")[0] in trained
    assert value.shape == () and value.dtype == jnp.float32 and jnp.isfinite(value), key
  assert all(metrics[f"{tree}/grad_norm"] > 0 for tree in trained)
  _same(output_params(state, objective), state.ema[objective.output])


def _pairs(left, right):
  return zip(map(np.asarray, jax.tree.leaves(left)), jax.tree.leaves(right), strict=True)


@every_method
def test_without_an_average(name):
  objective, _, params = _method(name, ema_decay=None)
  state = jax.eval_shape(objective.init, jax.random.key(0), params)
  assert state.ema == {}
  after, _ = jax.eval_shape(objective.step, state, _batches(name))
  assert jax.tree.structure(after) == jax.tree.structure(state)


@every_method
def test_types_and_shapes_are_kept(name):
  """A step maps a state to one of the same shapes and dtypes: it can be scanned and restored."""
  state = _init(name)
  after, _ = _three_steps(name)
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert describe(after) == describe(state)
  assert {x.dtype for x in jax.tree.leaves(state.trees)} == {jnp.dtype("float32")}


@every_method
def test_jit_changes_nothing(name):
  state, batch = _init(name), _batches(name)
  _close(_method(name)[0].step(state, batch), _step(name)(state, batch))


@every_method
def test_a_scan_is_the_loop(name):
  batches = [_batches(name, seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
  state, metrics = jax.jit(lambda s, b: jax.lax.scan(_method(name)[0].step, s, b))(
    _init(name), stacked
  )
  wanted, last = _three_steps(name)
  _close(state, wanted)
  _close(jax.tree.map(lambda x: x[-1], metrics), last, 1e-4)


@every_method
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_change_nothing(name, accumulate):
  state, metrics = _three_steps(name, accumulate=accumulate)
  wanted, _ = _three_steps(name)
  _close(state.trees, wanted.trees)
  _close(state.ema, wanted.ema)
  assert all(np.isfinite(float(x)) for x in metrics.values())


@functools.cache
def _loop():
  """Load the training loop past the suite's type checker, which rejects its plain Protocols."""
  path = importlib.util.find_spec("dlm_jax.train.loop").origin
  spec = importlib.util.spec_from_file_location("unchecked_loop", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _run_on(name, mesh, options=()):
  """Train three steps as an experiment does: sharded state, donated, keys from the step."""
  objective, model, params = _method(name, **dict(options))
  state = objective.init(jax.random.key(0), params)
  param_shardings = meshes.param_shardings(mesh, tiny.axes(model), params)
  shardings = meshes.state_shardings(mesh, param_shardings, state)
  state = jax.device_put(state, shardings)
  step = _loop().jit_step(objective, mesh, shardings, seed=5)
  place = meshes.batch_sharding(mesh, leading=1)
  for seed in range(3):
    tokens = jnp.stack([tiny.tokens(10 * seed + i) for i in range(objective.batches)])
    old = state
    state, metrics = step(state, jax.device_put(tokens, place))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))  # donated
  used = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state)}
  return jax.device_get(state), jax.device_get(metrics), used


@functools.cache
def _one_device(name):
  return _run_on(name, meshes.make(1, devices=jax.devices()[:1]))


@every_method
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_eight_devices_change_nothing(name, sizes):
  mesh = meshes.make(*sizes)
  state, metrics, used = _run_on(name, mesh)
  wanted, wanted_metrics, _ = _one_device(name)
  _close(state, wanted)
  _close(metrics, wanted_metrics, 1e-4)
  if sizes == (2, 2, 2):
    assert any("fsdp" in spec and "tensor" in spec for spec in used), used


@pytest.mark.slow
@every_method
def test_eight_devices_and_micro_batches(name):
  state, _, _ = _run_on(name, meshes.make(2, 2, 2), (("accumulate", 4),))
  _close(state, _one_device(name)[0])


@every_method
def test_no_key_is_used_twice(name):
  objective, _, _ = _method(name)
  with jax.debug_key_reuse(True):
    jax.jit(objective.step).lower(_init(name), _batches(name))


@every_method
def test_start_without_a_teacher(name):
  """From scratch where the method allows it; otherwise one line says what is missing."""
  objective, model, params = _method(name)
  if name in ("ar", "mdlm"):
    state = jax.eval_shape(lambda rng: objective.init(rng, None), jax.random.key(0))
    assert jax.tree.structure(state.trees[objective.output]) == jax.tree.structure(params)
  else:
    assert isinstance(model, DiT)
    with pytest.raises(ValueError, match="teacher"):
      objective.init(jax.random.key(0), None)
