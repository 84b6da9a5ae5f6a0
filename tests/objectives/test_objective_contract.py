# SPDX-License-Identifier: Apache-2.0
"""What every training method keeps to. The methods are found by listing the folder.

`--method=my_package.my_file` checks that one alone, wherever it lies.
"""

import dataclasses
import functools
import importlib
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dlm_jax import mesh as meshes
from dlm_jax.experiment import plan
from dlm_jax.objectives import draw_batch, output_params
from dlm_jax.train import loop

OWN = os.environ.get("DLM_JAX_METHOD")
NAMES = [OWN] if OWN else plan.list_objectives()
SEED, SLOW = 5, pytest.mark.slow
SOURCE = r"Reference: (.*(arXiv \d{4}\.\d{5}|\(\d{4}\))|own work)"
every_method = pytest.mark.parametrize("name", NAMES)


def some(*names):
  """Take these methods by default and leave the others, which show the same, to slow runs."""
  params = [n if n in (*names, OWN) else pytest.param(n, marks=SLOW) for n in NAMES]
  return pytest.mark.parametrize("name", params)


def _module(name):
  return importlib.import_module(name if "." in name else f"dlm_jax.objectives.{name}")


@functools.cache
def _method(name, tx=None, **options):
  """Return (objective, network, parameters of a teacher)."""
  module = _module(name)
  model, params, forward = tiny.setting(module.make)
  tx = tx or _optimizer()
  objective = module.make(
    model=model, process=forward, optimizers=dict.fromkeys(module.TRAINED, tx), **options
  )
  return objective, model, params


@functools.cache
def _optimizer():
  return optax.adam(1e-2, eps=1e-3)  # a large ε: rounding of tiny gradients is not amplified


def _tokens(name, step):
  return jnp.stack([tiny.tokens(10 * step + i) for i in range(_method(name)[0].batches)])


def _batches(name, step=0):
  """Return what the training loop draws at a step."""
  rng = jax.random.fold_in(loop.step_key(SEED), step)
  draws = [
    draw_batch({"tokens": x}, jax.random.fold_in(rng, i)) for i, x in enumerate(_tokens(name, step))
  ]
  return tuple(draws) if len(draws) > 1 else draws[0]


@functools.cache
def _start(name):
  objective, _, params = _method(name)
  return jax.jit(objective.init)(jax.random.key(0), params)  # as an experiment does


@functools.cache
def _shapes(name):
  objective, _, params = _method(name)
  return jax.eval_shape(objective.init, jax.random.key(0), params)


@functools.cache
def _run(name, sizes=(1, 1, 1), **options):
  """Train three steps as an experiment does: sharded state, donated, keys from the step.

  No key may be used twice in a whole batch.

  Returns:
    Host copies of the states after steps 0, 1, 2 and 3, the last metrics, the shardings used.
  """
  objective, model, params = _method(name, **options)
  mesh = meshes.make(*sizes, devices=jax.devices()[: math.prod(sizes)])
  shapes = meshes.param_shardings(mesh, tiny.axes(model), params)
  copy = functools.partial(jax.tree.map, jnp.copy)  # a host copy would pin what is donated
  shardings = meshes.state_shardings(mesh, shapes, _start(name), objective.axes)
  states = [_start(name)]
  state = jax.device_put(copy(states[0]), shardings)
  step = loop.jit_step(objective, mesh, shardings, seed=SEED)
  for n in range(3):
    tokens = jax.device_put(_tokens(name, n), meshes.batch_sharding(mesh, leading=1))
    old = state
    # The checker takes the slices that micro-batches are cut into for second uses.
    with jax.debug_key_reuse("accumulate" not in options):
      state, metrics = step(state, {"tokens": tokens})
    states.append(copy(state))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))  # donated
  used = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state)}
  return jax.device_get(states), jax.device_get(metrics), used


def _close(left, right, tolerance=1e-5):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), left, right
  )


def _same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_listing_finds_the_methods():
  assert {"ar", "dcd", "duo", "idlm", "mdlm", "sdtt", "sedd"} <= set(plan.list_objectives())


@every_method
def test_facts_and_options(name):
  """What others read of a module: classes it trains, passes, options with defaults of their own."""
  module = _module(name)
  assert module.NETWORK and all(isinstance(kind, type) for kind in module.NETWORK)
  assert module.NETWORK[0] is tiny.network_class(module.make)
  forwards, backwards = getattr(module, "PASSES", (1, 1))
  assert forwards >= backwards >= 1
  options = module.Options()
  assert dataclasses.is_dataclass(options) and hash(options) == hash(module.Options.of({}))
  names = {field.name for field in dataclasses.fields(options)}
  zeros = {name: zero for name, zero in (("chunk", 0), ("ema_decay", 0.0)) if name in names}
  off = module.Options.of(zeros)
  assert all(getattr(off, name) is None for name in zeros)
  with pytest.raises(ValueError, match=r"accumulat is no option.*did you mean 'accumulate'"):
    module.Options.of({"accumulat": 2})
  with pytest.raises(ValueError, match=r"objective.ema_decay=1.0 must be in \[0, 1\)"):
    module.Options.of({"ema_decay": 1.0})
  documented = " ".join(kind.__doc__ for kind in module.Options.__mro__[:-1])
  for field in dataclasses.fields(options):
    assert re.search(rf"\b{field.name}\b", documented), field.name


def test_groups_fill_the_batch():
  options = _module("didi_instruct").Options(group_size=8)
  options.check_batch(16)
  with pytest.raises(ValueError, match=r"12 is not divisible .*group_size=8; use 8 or 16"):
    options.check_batch(12)


@every_method
def test_documentation_names_a_source(name):
  text = f"{_module(name).__doc__}\n{_module(name).make.__doc__}"
  assert re.search(SOURCE, text)


@some("block_diffusion", "dcd", "mdlm")
def test_three_steps(name):
  """Finite numbers; trained trees and their averages move, the others do not."""
  objective, _, params = _method(name)
  (start, *_, state), metrics, _ = _run(name)
  params = jax.device_get(params)
  trained = set(_module(name).TRAINED)
  networks = {t for t in trained if _like(start.trees[t], params)}  # copies of the model
  assert state.step == 3 and state.step.dtype == np.int32
  assert trained == set(state.opt) and trained <= set(state.trees) >= {objective.output}
  for tree in state.trees:
    if tree in networks:
      assert _moved(state.trees[tree], params), tree
    elif tree in trained:  # another network, of which parts may be frozen
      assert not tiny.equal(state.trees[tree], start.trees[tree]), tree
    else:
      _same(state.trees[tree], params)
  assert set(state.ema) == networks
  for tree in state.ema:
    assert _moved(state.ema[tree], params) and _moved(state.ema[tree], state.trees[tree]), tree
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
  assert {f"{tree}/{what}" for tree in trained for what in ("loss", "grad_norm")} <= set(metrics)
  for key, value in metrics.items():
    assert key.split("/")[0] in trained
    assert value.shape == () and value.dtype == np.float32 and np.isfinite(value), key
  assert all(metrics[f"{tree}/grad_norm"] > 0 for tree in trained)
  _same(output_params(state, objective), state.ema[objective.output])


def _like(tree, params):
  return jax.tree.structure(tree) == jax.tree.structure(params)


def _moved(left, right):
  """Say whether every leaf differs somewhere."""
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return all(np.any(a != b) for a, b in pairs)


@some("idlm", "mdlm")
def test_without_an_average(name):
  objective, _, params = _method(name, ema_decay=None)
  state = jax.eval_shape(objective.init, jax.random.key(0), params)
  assert state.ema == {}
  after, _ = jax.eval_shape(objective.step, state, _batches(name))
  assert jax.tree.structure(after) == jax.tree.structure(state)


@every_method
def test_types_and_shapes_are_kept(name):
  """A step maps a state to one of the same shapes and dtypes: it can be scanned and restored."""
  before = _shapes(name)
  after, _ = jax.eval_shape(_method(name)[0].step, before, _batches(name))
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert describe(after) == describe(before)
  assert {x.dtype for x in jax.tree.leaves(before.trees)} == {np.dtype("float32")}


@some(*set(NAMES) - {"didi_instruct"})
def test_every_buffer_is_its_own(name):
  """Or the state could not be donated; and the teacher that was given stays usable."""
  objective, _, params = _method(name)
  leaves = jax.tree.leaves((objective.init(jax.random.key(0), params), params))
  pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
  assert len(set(pointers)) == len(pointers)


@pytest.mark.slow
@every_method
def test_jit_changes_nothing(name):
  state, _ = _method(name)[0].step(_start(name), _batches(name))
  _close(jax.device_get(state), _run(name)[0][1])


@pytest.mark.parametrize("name", [OWN] if OWN else ["mdlm", pytest.param("idlm", marks=SLOW)])
def test_a_scan_is_the_loop(name):
  """That others can be scanned is shown by the types that they keep, and by the loop itself."""
  batches = [_batches(name, step) for step in range(3)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
  run = jax.jit(lambda state, batch: jax.lax.scan(_method(name)[0].step, state, batch))
  state, metrics = jax.device_get(run(_start(name), stacked))
  states, last, _ = _run(name)
  _close(state, states[-1])
  _close(jax.tree.map(lambda x: x[-1], metrics), last, 1e-4)


@some("block_diffusion")
def test_micro_batches_change_nothing(name):
  states, metrics, _ = _run(name, accumulate=8)
  wanted = _run(name)[0][-1]
  _close(states[-1].trees, wanted.trees)
  _close(states[-1].ema, wanted.ema)
  assert all(np.isfinite(x) for x in metrics.values())


@some("mdlm")
def test_eight_devices_change_nothing(name):
  states, metrics, used = _run(name, (2, 2, 2))
  wanted, wanted_metrics, _ = _run(name)
  _close(states[-1], wanted[-1])
  _close(metrics, wanted_metrics, 1e-4)
  assert any("fsdp" in spec and "tensor" in spec for spec in used), used


@pytest.mark.slow
@every_method
def test_eight_devices_and_micro_batches(name):
  """Of data alone, the other way to use eight."""
  states, _, _ = _run(name, (8, 1, 1), accumulate=2)
  _close(states[-1], _run(name)[0][-1])


@every_method
def test_start_without_a_teacher(name):
  """From scratch where the method allows it; otherwise one line says what is missing."""
  objective, _, params = _method(name)
  try:
    state = jax.eval_shape(lambda rng: objective.init(rng, None), jax.random.key(0))
  except ValueError as error:
    assert "teacher" in str(error) and len(_shapes(name).trees) > 1
  else:
    assert jax.tree.structure(state.trees[objective.output]) == jax.tree.structure(params)
