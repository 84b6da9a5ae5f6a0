# SPDX-License-Identifier: Apache-2.0
"""Students are chosen at the teacher's temperature of equal entropy, in the order asked for."""

import json
import math
import types

import jax.numpy as jnp
import pytest
import tiny_runs
from compiled import at_most
from ml_collections import ConfigDict

from dlm_jax import sample
from dlm_jax.errors import InputError
from dlm_jax.evaluate.generative import Quality
from dlm_jax.experiment import evaluators, plan, run
from dlm_jax.experiment.config import load_config
from dlm_jax.objectives import Objective, TrainState
from dlm_jax.train.selection import Selection


def _quality(nll, entropy):
  fixed = {"genppl_se": 0.01 * math.exp(nll), "entropy_se": 0.0, "samples": 9, "tokens": 99}
  return Quality(genppl=math.exp(nll), entropy=entropy, **fixed)


class _Watched(evaluators.Samples):
  """An evaluator of networks that are two numbers each: log GenPPL and entropy at temperature 1.

  A temperature moves both by the same amount, by NFE.
  """

  def __init__(self, select="matched", mask_noise=0):
    options = types.SimpleNamespace(temperatures=(0.8, 1.0, 1.1), select=select)
    read, objective = types.SimpleNamespace(evaluate=options), Objective(None, None, "student")
    model = types.SimpleNamespace(config=types.SimpleNamespace(mask_noise=mask_noise))
    self._built = types.SimpleNamespace(objective=objective, plan=read, model=model)
    self._best, self.kept, self.measured = None, [], []
    self._selection = Selection(select=select, max_entropy_drop=0.5)
    self._reference, self._curves = {}, {}

  def _export(self, directory, built, state, step):
    self.kept.append(step)

  def _measure(self, params, temperature=1.0):
    self.measured.append((params["name"], temperature))
    warmth = temperature - 1
    return {
      nfe: _quality(params["nll"] + scale * warmth, params["entropy"] + scale * warmth)
      for nfe, scale in (("2", 1.0), ("4", 2.0))
    }


def _state(nll, entropy):
  trees = {
    "teacher": {"name": "teacher", "nll": 5.0, "entropy": 4.0},
    "student": {"name": "student", "nll": nll, "entropy": entropy},
  }
  return TrainState(step=jnp.int32(0), trees=trees, opt={}, ema={})


def test_the_best_is_the_lowest_at_equal_entropy():
  """The curve is measured once, at the start; narrowing along it is never kept."""
  samples = _Watched()
  scores, _ = samples(0, _state(5.0, 4.0))
  assert samples.measured == [("student", 1.0), ("teacher", 0.8), ("teacher", 1.1)]
  assert samples.kept == [0] and scores["matched"] == scores["entropy_drop"] == 0
  for step, nll, entropy, wanted in (
    (1, 4.85, 3.85, 0.0),  # narrowed: GenPPL 14 % lower, for nothing
    (2, 4.85, 3.95, -0.1),
    (3, 4.60, 3.85, -0.25),
    (4, 4.7, 3.9, -0.2),
    (5, 3.0, 3.7, math.nan),  # below the coldest temperature's
  ):
    scores, _ = samples(step, _state(nll, entropy))
    assert scores["matched"] == pytest.approx(wanted, abs=1e-6, nan_ok=True)
    assert scores["nfe2/genppl"] == pytest.approx(math.exp(nll))
  assert samples.kept == [0, 2, 3] and scores["best_step"] == 3
  assert [name for name, _ in samples.measured].count("teacher") == 2

  again = _Watched()
  again.from_json(json.loads(json.dumps(samples.to_json())))
  scores, _ = again(6, _state(4.5, 3.9))
  assert again.measured == [("student", 1.0)] and again.kept == [6]
  assert scores["matched"] == pytest.approx(-0.4)
  assert scores["nfe4/matched"] == pytest.approx(-0.4)
  assert 0.007 < scores["matched_se"] < 0.012


def test_a_student_with_noisy_masks_does_not_start_as_the_teacher():
  samples = _Watched(mask_noise=4)
  scores, _ = samples(0, _state(5.5, 4.0))
  assert ("teacher", 1.0) in samples.measured
  assert scores["matched"] == pytest.approx(0.5) and samples.kept == [0]


def test_genppl_alone_may_be_asked_for():
  samples = _Watched("genppl")
  for step, nll in enumerate((5.0, 4.85, 4.9)):
    scores, _ = samples(step, _state(nll, nll - 1))
  assert samples.kept == [0, 1] and "matched" not in scores and samples._curves == {}
  assert samples.measured == [("student", 1.0)] * 3


@pytest.mark.parametrize(
  "field, text, message",
  [
    ("order", "near", r"evaluate.order='near' is unknown; use one of"),
    ("select", "best", r"evaluate.select='best' is unknown; use one of matched, genppl"),
    ("temperatures", "1.0", r"evaluate.temperatures=\(1.0,\): give at least one besides 1"),
    ("temperatures", "-1,1", r"evaluate.temperatures\[0\]=-1 must be in \[0, ∞\)"),
  ],
)
def test_refused(field, text, message):
  with pytest.raises(InputError, match=message):
    plan.read(load_config("owt_idlm", {f"evaluate.{field}": text}))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["", "random"])
def test_a_run_under_a_spaced_order(tmp_path, monkeypatch, order):
  """One compiled program serves all temperatures; the best is written with its score.

  Unless asked for another order, samples are in that of the sampler.
  """
  seen, generate = [], at_most(sample.generate)

  def watched(*arguments, **options):
    seen.append(options.get("order", ""))
    return generate(*arguments, **options)

  monkeypatch.setattr(evaluators.sample, "generate", watched)
  changes = {"objective__order": "spaced", "objective__steps": "(2, 4)", "evaluate__every": "3"}
  changes |= {"objective__fake_updates": "2", "optim__fake__lr": "0.02"}
  changes |= {"evaluate__select": "matched", "evaluate__order": order}
  config = tiny_runs.make().config("idlm", **changes, evaluate__max_entropy_drop="100.0")
  assert isinstance(config.optim.fake, ConfigDict)
  assert run.train(config, tmp_path / "run").reason == "finished"
  rows = [row for row in tiny_runs.metrics(tmp_path / "run") if "matched" in row]
  assert [row["step"] for row in rows] == [0, 3, 6] and seen == [order]
  assert rows[0]["matched"] == 0 and rows[0]["best_step"] == 0
  written = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
  assert written["dlm_jax"]["step"] == rows[-1]["best_step"]
