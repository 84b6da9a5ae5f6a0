# SPDX-License-Identifier: Apache-2.0
"""The config names what is measured; several evaluators run as one, the first decides."""

import jax
import jax.numpy as jnp
import pytest
import tiny_runs
from compiled import at_most

from dlm_jax.errors import InputError
from dlm_jax.experiment import evaluators, plan, run, several
from dlm_jax.experiment.config import load_config
from dlm_jax.objectives import TrainState
from dlm_jax.train import loop


class _Fake:
  def __init__(self, stop, **scores):
    self.stop, self.scores, self.state = stop, scores, None

  def to_json(self):
    return {"stop": self.stop}

  def from_json(self, state):
    self.state = state

  def __call__(self, step, state):
    return {**self.scores, "step": step}, self.stop


def test_several_are_one():
  calm, alarmed = _Fake(False, a=1.0), _Fake(True, b=2.0)
  both = several.Several({"calm": calm, "alarmed": alarmed})
  state = TrainState(step=jnp.int32(3), trees={}, opt={}, ema={}, aux={})
  assert both(3, state) == ({"a": 1.0, "b": 2.0, "step": 3}, True)
  assert both.stop and not several.Several({"calm": calm}).stop
  assert both.to_json() == {"calm": {"stop": False}, "alarmed": {"stop": True}}
  both.from_json({"alarmed": {"stop": 1}})
  assert (calm.state, alarmed.state) == ({}, {"stop": 1})


@pytest.mark.parametrize(
  ("name", "text", "wanted"),
  [
    ("quickstart_teacher", "", ("likelihood",)),
    ("quickstart_idlm", "()", ("samples",)),
    ("quickstart_idlm", "('likelihood',)", ("likelihood",)),
    ("quickstart_idlm", "'likelihood','samples'", ("likelihood", "samples")),
  ],
)
def test_names(name, text, wanted):
  assert plan.read(load_config(name, {"evaluate.measure": text})).evaluate.measure == wanted


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("quickstart_idlm", "('sample',)", "did you mean 'samples'"),
    ("quickstart_idlm", "('samples', 'samples')", "names one twice"),
    ("quickstart_teacher", "('samples',)", "teacher.path is empty; use likelihood"),
  ],
)
def test_names_that_cannot_be(name, text, message):
  with pytest.raises(InputError, match=message):
    plan.read(load_config(name, {"evaluate.measure": text}))


@pytest.mark.slow
def test_both_in_one_run(tmp_path, monkeypatch):
  """Both are written at every evaluation, and the likelihood alone says when best/ is kept."""
  kept = []
  export = run.export

  def watched(directory, built, state, step, tokenizer):
    kept.append((directory.name, step))
    export(directory, built, state, step, tokenizer)

  monkeypatch.setattr(run, "export", watched)
  # compiled once per NFE, and there is one
  monkeypatch.setattr(evaluators.sample, "generate", at_most(evaluators.sample.generate))
  changes = {"evaluate__measure": "('likelihood', 'samples')", "evaluate__every": "2"}
  config = tiny_runs.make().config("idlm", **changes, evaluate__max_entropy_drop="100.0")
  run.train(config, tmp_path / "run")
  rows = [row for row in tiny_runs.metrics(tmp_path / "run") if "validation/perplexity" in row]
  assert [row["step"] for row in rows] == [0, 2, 4, 6]
  assert all({"entropy_drop", "nfe2/genppl", "nfe2/entropy"} <= set(row) for row in rows)
  falls, best = [], float("inf")
  for row in rows:
    if row["validation/perplexity"] < best:
      best = row["validation/perplexity"]
      falls.append(row["step"])
  assert [step for name, step in kept if name == "best"] == falls


def test_the_noise_of_a_likelihood_is_no_step_of_training():
  """Its key is apart from that of any step of the run's seed, and from what these derive."""
  ours = jax.random.fold_in(jax.random.key(0), evaluators._NOISE)
  keys = [ours, *jax.random.split(ours), *jax.random.split(jax.random.key(0)), loop.step_key(0)]
  bits = [tuple(jax.random.key_data(key).tolist()) for key in keys[:5]]
  assert len(set(bits)) == 5 and tuple(jax.random.key_data(keys[5]).tolist()) not in bits[:3]
