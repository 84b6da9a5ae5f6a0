# SPDX-License-Identifier: Apache-2.0
"""Whole runs of decoders: next tokens, then blocks from there; exports, judges, refusals."""

import json

import jax
import numpy as np
import pytest
import tiny_runs

from dlm_jax import convert, models, process
from dlm_jax.cli import main as cli
from dlm_jax.data import builder
from dlm_jax.errors import InputError
from dlm_jax.evaluate.judge import load_judge
from dlm_jax.experiment.config import load_config
from dlm_jax.experiment.run import train

SHAPE = {"model.kv_heads": "1", "model.head_dim": "4", "model.mlp_dim": "12"}


def _config(name, tiny, **changes):
  fields = SHAPE | tiny.overrides("judge") | {"train.steps": "2", "optim.warmup": "1"}
  fields |= {key.replace("__", "."): value for key, value in changes.items()}
  return load_config(name, {"objective.accumulate": "1", **fields})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Return (tiny, workdir of next-token training, workdir of block training)."""
  tiny, folder = tiny_runs.make(), tmp_path_factory.mktemp("runs")
  train(_config("novels_ar_draft", tiny), folder / "ar")
  config = _config("novels_sdar_draft", tiny, start__path=str(folder / "ar"), evaluate__every="2")
  train(config, folder / "blocks")
  return tiny, folder / "ar", folder / "blocks"


@pytest.mark.slow
def test_next_tokens_are_exported_with_a_row_for_the_mask(runs):
  tiny, ar, _ = runs
  model, _, proc = convert.load(ar / "final")
  assert isinstance(model, models.Decoder) and proc is None
  assert model.config.vocab_size == 301
  judge = load_judge(str(ar), builder.open_dataset(tiny.data).tokenizer())
  assert isinstance(judge.judge.model, models.Decoder)


def test_blocks_are_exported_with_their_length(runs):
  _, _, blocks = runs
  model, _, proc = convert.load(blocks / "final")
  assert isinstance(proc, process.Absorbing) and proc.mask_id == 300
  assert convert.block_length(blocks / "final") == 4
  assert isinstance(model, models.Decoder)


def test_training_starts_where_the_other_ended(runs):
  """The first line is the start's own bound; the best network is kept."""
  _, ar, blocks = runs
  lines = tiny_runs.metrics(blocks)
  assert lines[0]["step"] == 0 and "validation/perplexity" in lines[0]
  assert (blocks / "best" / "config.json").exists()
  started, there = (convert.load(x / "final")[1] for x in (blocks, ar))
  moved = [
    float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (started, there)), strict=True)
  ]
  assert 0 < max(moved) < 0.2


@pytest.mark.parametrize("which, what", [(1, "nll"), (2, "nelbo")])
def test_likelihood_from_the_command_line(runs, which, what, capsys):
  arguments = ["--sequences=4", "--batch_size=4", "--json"]
  cli.main(["evaluate", f"--checkpoint={runs[which]}", f"--data={runs[0].data}", *arguments])
  scores = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert np.isfinite(scores[what])


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"start__path": "/nowhere"}, "holds no network"),
    ({"start__path": "AR", "model__layers": "2"}, "model.layers=2"),
    ({"start__path": "TEACHER"}, "means a Decoder"),
    ({"start__path": "AR", "process__name": "none"}, r"process\.name must be absorbing"),
    ({"start__path": "AR", "process__mask_id": "500"}, "mask_id=500"),
    ({"start__path": "AR", "objective__block_length": "0"}, "block_length=0"),
  ],
)
def test_what_cannot_be_started(runs, changes, message, tmp_path):
  tiny, ar, _ = runs
  places = {"AR": str(ar), "TEACHER": str(tiny.teacher)}
  changes = {key: places.get(value, value) for key, value in changes.items()}
  config = _config("novels_sdar_draft", tiny, **changes)
  with pytest.raises(InputError, match=message):
    train(config, tmp_path / "run")


def test_a_distillation_starts_from_its_teacher(runs, tmp_path):
  tiny, ar, _ = runs
  config = tiny.config("idlm", start__path=str(ar))
  with pytest.raises(InputError, match=r"teacher\.path"):
    train(config, tmp_path / "run")


def test_a_judge_has_no_mask(runs):
  tiny, _, blocks = runs
  with pytest.raises(InputError, match="autoregressive"):
    load_judge(str(blocks), builder.open_dataset(tiny.data).tokenizer())
