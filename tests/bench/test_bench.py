# SPDX-License-Identifier: Apache-2.0
"""The bench: operations against the compiler's count, memory by hand, every program runs."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
import tiny_runs

from dlm_jax.bench import limits, measure, programs
from dlm_jax.cli.main import main
from dlm_jax.models import DiT, DiTConfig


def test_operations_are_those_that_the_compiler_counts():
  cfg = DiTConfig(
    vocab_size=512, dim=64, cond_dim=8, layers=2, heads=2, length=64, dtype="float32", unroll=2
  )
  model, tokens, sigma = DiT(cfg), jnp.zeros((4, 64), jnp.int32), jnp.zeros(4)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens, sigma)["params"]
  program = jax.jit(model.apply).lower({"params": params}, tokens, sigma).compile()
  counted = program.cost_analysis()["flops"]
  # The compiler's count has norms, softmax, GELU and rotary besides.
  assert 1.0 < counted / limits.forward_operations(cfg, 4) < 1.15


def test_memory_is_what_goes_in_and_comes_out():
  x = jnp.ones((1024, 1024))
  program, _ = measure.compiled(lambda x: x + 1, x)
  assert measure.memory(program) == pytest.approx(2 * x.nbytes, rel=0.01)
  donating, _ = measure.compiled(jax.jit(lambda x: x + 1, donate_argnums=0), x)
  assert measure.memory(donating) == pytest.approx(x.nbytes, rel=0.01)


def test_short_calls_are_timed_together():
  calls = []

  def call():
    calls.append(None)
    return jnp.zeros(())

  timing = measure.repeat(call, 3, None, 0.5)
  assert timing.repeats == 3 and timing.compile_seconds == 0.5 and timing.memory is None
  assert len(calls) > 10 and (len(calls) - 2) % 3 == 0
  assert 0 < timing.seconds < 0.01 and timing.spread >= 0


@pytest.fixture
def tiny(monkeypatch):
  """Limits are slow to measure on a CPU and not what is tested here."""
  monkeypatch.setattr(limits, "measure", lambda *_: limits.Limits(matmul=1e11, copy=1e10))


def _bench(capsys, tmp_path, what, *arguments):
  shape = {k: v for k, v in tiny_runs.SHAPE.items() if not k.startswith("data.buckets")}
  fields = [f"--config.{name}={value}" for name, value in shape.items()]
  file = tmp_path / "bench.json"
  options = ["--batch_size=8", "--repeats=2", f"--json={file}", *fields, *arguments]
  assert main(["bench", what, *options]) == 0
  content = json.loads(file.read_text())
  text = capsys.readouterr().out
  for row in content["rows"]:
    assert row["batch"] == 8 and row["timing"]["seconds"] > 0 and row["rate"] > 0
    assert row["timing"]["memory"] > 0 and row["name"] in text
    assert row["ratio"] is None or (math.isfinite(row["ratio"]) and row["ratio"] > 0)
  return content["rows"]


@pytest.mark.parametrize("what", [pytest.param("trunk", marks=pytest.mark.slow), "attention"])
def test_rates_are_compared_with_products(tiny, capsys, tmp_path, what):
  rows = _bench(capsys, tmp_path, what, "--config=quickstart_teacher", "--config.model.cond_dim=4")
  assert {row["limit"] for row in rows} == {"matmul rate"}
  for row in rows:
    assert row["ratio"] == pytest.approx(row["rate"] / 1e11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["novels_teacher", "novels_duo"])
def test_samples_are_compared_with_trunk_forwards(tiny, capsys, tmp_path, name):
  options = [f"--config={name}", "--config.model.cond_dim=4", "--steps=2"]
  (row,) = _bench(capsys, tmp_path, "sample", *options)
  assert row["limit"] == "2 trunk forwards"
  assert row["rate"] == pytest.approx(8 * 16 / row["timing"]["seconds"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("novels_teacher", 1), ("novels_idlm", 2)])
def test_steps_are_compared_with_their_passes(tiny, capsys, tmp_path, name, rows):
  found = _bench(capsys, tmp_path, "train", f"--config={name}", "--config.model.cond_dim=4")
  assert len(found) == rows and found[0]["limit"] == "matmul rate (MFU)"
  if rows == 2:
    assert found[1]["limit"] == "5 forwards + 2 backwards"


def test_the_loader_is_timed(tiny, capsys):
  assert (
    main(["bench", "loader", *tiny_runs.make().flags("teacher"), "--batch_size=8", "--repeats=2"])
    == 0
  )
  assert "| loader  |     8 |" in capsys.readouterr().out


@pytest.mark.slow
def test_limits_are_measured():
  found = limits.measure("float32", repeats=2)
  assert 1e9 < found.matmul < 1e13 and 1e8 < found.copy < 1e12


@pytest.mark.parametrize(
  ("arguments", "word"),
  [
    (["sample", "--config=novels_judge"], "model.name='causal'"),
    (["train", "--batch_size=7"], "loader.batch_size=7 is not divisible"),
    (["trunk", "--batch_size=0"], "--batch_size must be positive"),
    (["trunk", "--repeats=0"], "repeats=0"),
    (["trunk", "--option", "kappa=1"], "--option is of"),
    (["train", "--json=/nowhere/x.json", "--config=novels_teacher"], "cannot be written"),
  ],
)
def test_bad_input(tiny, capsys, monkeypatch, arguments, word):
  if "--json" in arguments[1]:
    monkeypatch.setitem(programs.BENCHES, "train", lambda *_: [])
  assert main(["bench", *arguments]) == 2
  error = capsys.readouterr().err
  assert word in error and error.count("\n") == 1
