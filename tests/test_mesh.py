# SPDX-License-Identifier: Apache-2.0
"""Meshes, batch checks, and checkpoints that move between device counts."""

import collections
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from jax.sharding import PartitionSpec

from dlm_jax import mesh, models, sample
from dlm_jax.errors import InputError
from dlm_jax.experiment import build, plan
from dlm_jax.train import checkpoint, loop

MESHES = {
  "data=8": {"mesh__data": "8"},
  "data=2,fsdp=2,tensor=2": {"mesh__data": "2", "mesh__fsdp": "2", "mesh__tensor": "2"},
  "fsdp=8": {"mesh__data": "1", "mesh__fsdp": "8"},
}


def _built(devices=None, **sizes):
  changes = {"loader__batch_size": "8", "model__dim": "16", "model__dropout": "0.0"}
  # Adam divides by the gradient's own size: with a tiny eps it would show rounding as change.
  changes |= {"optim__warmup": "0", "optim__eps": "1e-2"}
  config = tiny_runs.make().config("teacher", **changes, **sizes)
  return build.experiment(plan.read(config), 300, devices=devices)


def _one():
  return _built(jax.devices()[:1])


def _like(built):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), built.shapes, built.shardings
  )


def _first_state(built):
  """Return the same starting state on any mesh, parameters away from their initial zeros."""
  rng = np.random.default_rng(0)
  shapes = built.shapes.trees["model"]
  params = jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 0.3 + (x.ndim == 1)).astype(np.float32), shapes
  )
  state = jax.jit(built.objective.init)(jax.random.key(0), params)
  return jax.device_put(state, built.shardings)


def _train(built, state, steps):
  """Take steps on tokens that depend on the step only; return the state and the losses."""
  run, losses = loop.jit_step(built.objective, built.mesh, built.shardings, 0), []
  for _ in range(steps):
    rng = np.random.default_rng(int(state.step))
    tokens = jnp.asarray(rng.integers(0, 300, size=(1, 8, 16)), jnp.int32)
    tokens = jax.device_put(tokens, mesh.batch_sharding(built.mesh, leading=1))
    state, metrics = run(state, {"tokens": tokens})
    losses.append(float(metrics["model/loss"]))
  return state, losses


def _assert_equal(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def _assert_close(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-4, atol=2e-4),
    a,
    b,
  )


@pytest.fixture(scope="module")
def reference():
  """Return the state after 1 and after 2 steps on one device, and the losses."""
  built = _one()
  first, losses = _train(built, _first_state(built), 1)
  host = jax.device_get(first)
  second, more = _train(built, first, 1)
  return host, jax.device_get(second), losses + more


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MESHES))
def test_from_eight_devices_to_one_and_back(tmp_path, reference, name):
  """8 devices take a step, save; 1 device restores, saves again; 8 devices restore and step."""
  wide, one = _built(**MESHES[name]), _one()
  state, losses = _train(wide, _first_state(wide), 1)
  after_one = jax.device_get(state)
  _assert_close(after_one.trees, reference[0].trees)
  np.testing.assert_allclose(losses[0], reference[2][0], rtol=1e-4)
  with checkpoint.Checkpoints(tmp_path / "wide") as checkpoints:
    checkpoints.save(1, state, {"loader": {"step": 2}})
    checkpoints.wait()
    narrow, extra = checkpoints.restore(_like(one))
  assert extra == {"loader": {"step": 2}}
  _assert_equal(narrow, after_one)
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(narrow)} == {1}

  with checkpoint.Checkpoints(tmp_path / "one") as checkpoints:
    checkpoints.save(1, narrow, {})
    checkpoints.wait()
    again, _ = checkpoints.restore(_like(wide))
  _assert_equal(again, after_one)
  placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), again, wide.shardings)
  assert all(jax.tree.leaves(placed))

  for built, start in ((one, narrow), (wide, again)):
    final, losses = _train(built, start, 1)
    np.testing.assert_allclose(losses[0], reference[2][1], rtol=1e-3)
    _assert_close(jax.device_get(final).trees, reference[1].trees)


def _exchanged(text):
  """Return the types and shapes of what a compiled program's collectives deliver."""
  calls = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter)\(", text)
  return [shape for call in calls for shape in re.findall(r"\w+\[[\d,]*\]", call)]


@pytest.mark.slow
def test_weights_are_gathered_not_activations():
  """Left to itself the compiler sums [B, L, F] activations over the devices that hold weights."""
  built = _built(**MESHES["fsdp=8"])
  tokens = jax.ShapeDtypeStruct(
    (1, 8, 16), jnp.int32, sharding=mesh.batch_sharding(built.mesh, leading=1)
  )
  step = loop.jit_step(built.objective, built.mesh, built.shardings, 0)
  shapes = _exchanged(step.lower(_like(built), {"tokens": tokens}).compile().as_text())
  assert "f32[16,48]" in shapes, "the weights of queries, keys and values"
  assert not [s for s in shapes if re.fullmatch(r"f32\[\d+,16,\d+\]", s)]


def test_samples_are_split_over_the_mesh():
  """Each device evaluates the network on its own rows alone, and they are the same samples."""
  built = _built(**MESHES["data=8"])
  params = _first_state(built).trees["model"]

  def draw(params, rng):
    denoiser = models.Denoiser(built.model, params)
    return sample.generate(denoiser, built.process, rng, batch=8, length=16, steps=4)

  arguments = jax.device_put((params, jax.random.key(5)), mesh.replicated(built.mesh))
  run = jax.jit(mesh.over(built.mesh, draw), out_shardings=mesh.replicated(built.mesh))
  program = run.lower(*arguments).compile()
  assert "f32[16,48]" in program.as_text(), "16 tokens of one sequence, 3 × 16 channels"
  assert "f32[128,48]" not in program.as_text(), "128 tokens of all eight"
  alone = jax.jit(draw)(jax.device_get(params), jax.random.key(5))
  np.testing.assert_array_equal(program(*arguments), alone)


def test_parameters_are_really_sharded():
  built = _built(**MESHES["data=2,fsdp=2,tensor=2"])
  specs = [s.spec for s in jax.tree.leaves(built.shardings.trees["model"])]
  assert any("fsdp" in spec for spec in specs) and any("tensor" in spec for spec in specs)
  followers = jax.tree.leaves(built.shardings.opt["model"])
  assert any("fsdp" in s.spec for s in followers), "the moments follow the parameters"
  assert jax.tree.leaves(built.shardings.ema["model"]) == jax.tree.leaves(
    built.shardings.trees["model"]
  )
  assert built.shardings.step.spec == PartitionSpec()


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "sizes, expected",
  [
    ({}, (8, 1, 1)),
    ({"fsdp": 4}, (2, 4, 1)),
    ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
    ({"data": 1, "tensor": -1}, (1, 1, 8)),
  ],
)
def test_make_fills_what_is_left(sizes, expected):
  made = mesh.make(**sizes)
  assert made.axis_names == ("data", "fsdp", "tensor")
  assert tuple(made.shape.values()) == expected


@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 3},
    {"fsdp": 3},
    {"data": -1, "fsdp": -1},
    {"data": 0},
    {"data": -2, "fsdp": -4},
    {"data": 4, "fsdp": 4},
    {"data": 8, "fsdp": -1, "tensor": 2},
  ],
)
def test_make_refuses_what_does_not_fit(sizes):
  with pytest.raises(InputError, match=r"does not fit 8 device\(s\)"):
    mesh.make(**sizes)


def test_check_batch_names_the_nearest_sizes():
  made = mesh.make(data=2, fsdp=4)
  mesh.check_batch(made, 96)
  with pytest.raises(InputError) as error:
    mesh.check_batch(made, 100)
  assert str(error.value) == (
    "loader.batch_size=100 is not divisible by the 8-way batch sharding (data=2 × fsdp=4); use 96 "
    "or 104."
  )
  with pytest.raises(InputError, match=r"16-way .*accumulate=2.*use 96 or 112"):
    mesh.check_batch(made, 104, accumulate=2)
  for size in (0, -8, 1):
    with pytest.raises(InputError, match="use 8 or 16"):
      mesh.check_batch(made, size)


def test_the_tensor_axis_does_not_split_the_batch():
  mesh.check_batch(mesh.make(data=2, tensor=4), 2)


def test_dimensions_that_do_not_divide_stay_whole():
  made = mesh.make(data=1, fsdp=2, tensor=4)
  axes = {"a": PartitionSpec("vocab", "embed"), "b": PartitionSpec("vocab", "embed")}
  shapes = {"a": jax.ShapeDtypeStruct((301, 8), "float32")}
  shapes["b"] = jax.ShapeDtypeStruct((300, 7), "float32")
  placed = mesh.param_shardings(made, axes, shapes)
  assert placed["a"].spec == PartitionSpec(None, "fsdp")
  assert placed["b"].spec == PartitionSpec("tensor", None)


# --- hosts ----------------------------------------------------------------------------------------

Device = collections.namedtuple("Device", ["id", "process_index"])


@pytest.mark.parametrize(
  "owners, expected",
  [
    ("0011", [(0, 2), (1, 2)]),
    ("1100", [(1, 2), (0, 2)]),
    ("0101", [(0, 1), (0, 1)]),  # interleaved
    ("0001", [(0, 1), (0, 1)]),  # unequal
    ("00112233", [(n, 4) for n in range(4)]),
  ],
)
def test_rows_of_hosts(monkeypatch, owners, expected):
  """Each character is the host of a device that holds the next equal slice of 16 rows."""
  rows = 16 // len(owners)
  held = {Device(i, int(host)): (slice(i * rows, (i + 1) * rows),) for i, host in enumerate(owners)}
  _pretend(monkeypatch, held, len(expected))
  assert [_rows_of(monkeypatch, host) for host in range(len(expected))] == expected


def test_every_host_reads_all_where_the_tensor_axis_spans_them(monkeypatch):
  held = {Device(host, host): (slice(None),) for host in range(2)}
  _pretend(monkeypatch, held, 2)
  assert [_rows_of(monkeypatch, host) for host in range(2)] == [(0, 1), (0, 1)]


def test_one_process_reads_the_whole_batch():
  assert mesh.host_rows(mesh.make(), 16) == (0, 1)


def _pretend(monkeypatch, held, hosts):
  sharding = types.SimpleNamespace(devices_indices_map=lambda shape: held)
  monkeypatch.setattr(mesh, "batch_sharding", lambda made: sharding)
  monkeypatch.setattr(jax, "process_count", lambda: hosts)


def _rows_of(monkeypatch, host):
  monkeypatch.setattr(jax, "process_index", lambda: host)
  return mesh.host_rows(mesh.make(), 16)
