# SPDX-License-Identifier: Apache-2.0
"""Questions and answers from a file to samples: answers are learnt, prompts stay what they are."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from dlm_jax import objectives
from dlm_jax.cli.main import main
from dlm_jax.data import loader
from dlm_jax.errors import InputError
from dlm_jax.evaluate import generative
from dlm_jax.evaluate.judge import JudgeWithTokens
from dlm_jax.evaluate.likelihood import Judge
from dlm_jax.experiment import build, evaluators, plan
from dlm_jax.experiment.config import load_config
from dlm_jax.experiment.run import train
from dlm_jax.train.selection import Selection

NAMES = {"teacher": "quickstart_teacher", "judge": "quickstart_judge", "idlm": "quickstart_idlm"}
DECODER = {"model.kv_heads": "1", "model.head_dim": "4", "model.mlp_dim": "12"}


def _fields(folder, kind, **changes):
  fields = {**tiny_runs.SHAPE, **tiny_runs.TRAINING, "data.tokenizer": "bytes"}
  fields |= {"data.source": f"chat:{folder}/*.jsonl", "data.packing": "conversations"}
  fields |= {"data.options.prompt": "question", "data.options.answer": "answer"}
  fields |= {"data.options.validation": f"{folder}/test.jsonl", "data.options.tests": "none"}
  fields |= {"data.directory": f"{folder}/data", "train.steps": "2"}
  if kind in ("teacher", "idlm"):
    fields["model.cond_dim"] = "4"
  if kind == "idlm":
    fields |= {"teacher.path": f"{folder}/teacher", "evaluate.judge": f"{folder}/judge"}
    fields |= {"evaluate.nfes": "2", "evaluate.max_entropy_drop": "100.0", "evaluate.every": "2"}
  return fields | {name.replace("__", "."): value for name, value in changes.items()}


def _config(folder, kind, **changes):
  return load_config(NAMES.get(kind, kind), _fields(folder, kind, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Files of questions and answers, prepared from the command line, and a teacher and a judge."""
  folder = tmp_path_factory.mktemp("chat")
  pairs = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(4)]
  for name, rows in (("train", pairs[:18]), ("test", pairs[18:])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  flags = [f"--config.{key}={value}" for key, value in _fields(folder, "teacher").items()]
  assert main(["prepare", "--config=quickstart_teacher", *flags]) == 0
  train(_config(folder, "teacher", evaluate__every="2"), folder / "teacher")
  tiny_runs.export(_config(folder, "judge"), folder / "judge" / "final")
  return folder


@pytest.mark.slow
def test_a_teacher_is_scored_on_answers(folder, capsys):
  row = tiny_runs.metrics(folder / "teacher")[-1]
  assert 1 < row["validation/perplexity"] < 1000
  arguments = ["evaluate", f"--checkpoint={folder}/teacher", f"--data={folder}/data", "--json"]
  assert main(arguments) == 0
  scores = json.loads(capsys.readouterr().out.splitlines()[-1])
  (group,) = loader.evaluation_groups(folder / "data", "validation")
  assert scores["tokens"] == group["valid"].sum() < group["tokens"].size / 2
  assert main([*arguments, f"--judge={folder}/judge", "--samples=4", "--steps=2"]) == 0
  scores = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert scores["samples"] == 4 and scores["genppl"] > 1
  assert main(["train", "--config=quickstart_teacher", "--dry_run", *_dry(folder)]) == 0


def _dry(folder):
  return [f"--config.{key}={value}" for key, value in _fields(folder, "teacher").items()]


@pytest.mark.slow
def test_a_student_keeps_the_prompts(folder, tmp_path, monkeypatch):
  """Every sample that is judged in training is a validation prompt with an answer of its own."""
  seen, quality = [], JudgeWithTokens.quality

  def judged(self, tokens_BL, batch_size, valid_NL=None):
    seen.append((np.asarray(tokens_BL), valid_NL))
    return quality(self, tokens_BL, batch_size, valid_NL)

  monkeypatch.setattr(JudgeWithTokens, "quality", judged)
  assert train(_config(folder, "idlm"), tmp_path).reason == "finished"
  (group,) = loader.evaluation_groups(folder / "data", "validation")
  rows = np.resize(np.arange(len(group["tokens"])), 8)
  assert len(seen) == 3  # the teacher, it at another temperature, and the student
  for tokens_NL, valid_NL in seen:
    np.testing.assert_array_equal(valid_NL, group["valid"][rows])
    kept = group["tokens"][rows]
    np.testing.assert_array_equal(tokens_NL[~valid_NL], kept[~valid_NL])
    assert (tokens_NL != kept)[valid_NL].any() and tokens_NL.max() <= 256


@pytest.mark.slow
@pytest.mark.parametrize("name", ["novels_ar_draft", "novels_sdar_draft", "judge"])
def test_decoders_and_judges_learn_answers(name, folder, tmp_path):
  """Decoders also from rows that several conversations share."""
  shape = {} if name == "judge" else DECODER | {"data.options.document_separator": "none"}
  changes = {"evaluate__every": "2", "start__path": "", "objective__accumulate": "1"}
  fields = _fields(folder, name, **changes)
  fields |= {"data.options.tests": "none"} | shape
  assert train(load_config(NAMES.get(name, name), fields), tmp_path / "one").reason == "finished"
  shared = fields | {"data.block_length": "4", "data.directory": str(tmp_path / "data")}
  config = load_config(NAMES.get(name, name), shared)
  build.prepare(plan.read_data(config), progress=False)
  if name == "judge":
    with pytest.raises(InputError, match="several conversations share a row, which model"):
      train(config, tmp_path / "shared")
    return
  assert train(config, tmp_path / "shared").reason == "finished"
  assert np.isfinite(tiny_runs.metrics(tmp_path / "shared")[-1]["validation/perplexity"])


class _FakeJudge(JudgeWithTokens):
  """Say that samples have an entropy of 3.5 nats."""

  def quality(self, tokens_BL, batch_size, valid_NL=None):
    fixed = {"genppl": 10.0, "genppl_se": 0.0, "entropy_se": 0.0, "samples": 1, "tokens": 1}
    return generative.Quality(entropy=3.5, **fixed)


def test_the_entropy_drop_is_how_far_a_student_is_below_its_teacher():
  samples = object.__new__(evaluators.Samples)
  objective = objectives.Objective(None, None, output="student")
  config = types.SimpleNamespace(evaluate=types.SimpleNamespace(nfes=(2,), batch_size=1))
  network = types.SimpleNamespace(rolled=lambda: None)
  samples._built = types.SimpleNamespace(objective=objective, plan=config, model=network)
  samples._judge = _FakeJudge(judge=Judge(None, None), eos_id=0)
  samples._selection = Selection(max_entropy_drop=1.0, patience=1)
  samples._samples = lambda denoiser, nfe, temperature: np.zeros((1, 4), np.int32)
  samples._fine = lambda denoiser: True
  samples._templates, samples._export, samples._best = None, lambda *where: None, None
  state = objectives.TrainState(
    step=jnp.zeros((), jnp.int32), trees={"student": {}}, opt={}, ema={}
  )
  for teacher, drop, stop in ((4.0, 0.5, False), (3.0, -0.5, False), (5.0, 1.5, True)):
    samples._reference = {"2": teacher}
    scores, collapsed = samples(1, state)
    assert scores["entropy_drop"] == pytest.approx(drop) and collapsed == stop
  samples._fine = lambda denoiser: False
  with pytest.raises(InputError, match="logits hold NaN or infinity"):
    samples(1, state)
