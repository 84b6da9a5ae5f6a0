# SPDX-License-Identifier: Apache-2.0
"""The quick start from scratch at toy size: end to end, again, and interrupted."""

import csv
import json
import pathlib
import shutil
import signal
import sysconfig
import time

import pytest
import tiny_runs

from dlm_jax.cli.main import main
from dlm_jax.convert import places
from dlm_jax.experiment import run
from dlm_jax.quickstart import distil

_MODULES = ("argparse.py", "textwrap.py", "json", "bisect.py", "heapq.py", "csv.py", "calendar.py")
_TOY = {
  "data.options.validation_fraction": "0.3",
  "data.length": "32",
  "data.tokenizer": "bpe:300",
  "model.dim": "8",
  "model.layers": "1",
  "model.heads": "2",
  "model.cond_dim": "4",
  "loader.batch_size": "8",
  "train.steps": "3",
  "train.checkpoint_every": "1",
  "evaluate.every": "2",
  "evaluate.nfes": "2",
  "evaluate.samples": "8",
  "evaluate.batch_size": "8",
  "evaluate.max_entropy_drop": "9.0",
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
  """Return a function from a workdir to the command line; the corpus is a few real modules."""
  root, library = tmp_path_factory.mktemp("library"), pathlib.Path(sysconfig.get_path("stdlib"))
  for name in _MODULES:
    if (library / name).is_dir():
      shutil.copytree(library / name, root / name)
    else:
      shutil.copy(library / name, root / name)
  fields = [f"--config.{k}={v}" for k, v in {**_TOY, "data.options.root": root}.items()]
  sizes = ["--teacher_steps=6", "--judge_steps=6", "--nfes=1,2", "--samples=8"]
  return lambda workdir: ["quickstart", "--from_scratch", f"--workdir={workdir}", *sizes, *fields]


@pytest.fixture(scope="module")
def done(tmp_path_factory, arguments):
  """Return the workdir of a run that was interrupted in its distillation and called again."""
  workdir = tmp_path_factory.mktemp("quickstart")
  with pytest.MonkeyPatch.context() as patch:
    make = run.loader.make

    def interrupting(*args, **options):
      stream = make(*args, **options)
      student = options["batch_size"] == 8  # teacher and judge have batches of 64
      return _Interrupting(stream) if student else stream

    patch.setattr(run.loader, "make", interrupting)
    assert main(arguments(workdir)) == 130
  assert not (workdir / "student").exists() and not (workdir / "frontier.json").exists()
  saved = (workdir / "distillation" / "checkpoints").iterdir()
  assert "2" in {path.name for path in saved}
  trained = (workdir / "teacher" / "final" / "model.safetensors").stat().st_mtime_ns
  assert main(arguments(workdir)) == 0
  assert (workdir / "teacher" / "final" / "model.safetensors").stat().st_mtime_ns == trained
  return workdir


class _Interrupting:
  """A loader during whose third batch, the second step's first, the user presses Ctrl-C."""

  def __init__(self, stream):
    self._stream = stream

  def __next__(self):
    if self._stream.position()["step"] == 2:
      signal.raise_signal(signal.SIGINT)
    return next(self._stream)

  def __getattr__(self, name):
    return getattr(self._stream, name)


@pytest.mark.slow
def test_interrupted_it_says_how_to_resume_and_does(done):
  rows = tiny_runs.metrics(done / "distillation")
  assert [row["step"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.slow
def test_everything_is_there(done):
  rows = json.loads((done / "frontier.json").read_text())
  assert [(row["name"], row["nfe"], row["samples"]) for row in rows["rows"]] == [
    ("teacher", 1, 8),
    ("teacher", 2, 8),
    ("teacher, exact limit", 32, 8),
    ("teacher, exact limit", 32, 8),
    ("teacher, spaced", 2, 8),
    ("student, spaced", 2, 8),
  ]
  limits = [row["options"] for row in rows["rows"][2:4]]
  assert [options["temperature"] for options in limits] == [1.0, 0.9]
  assert all(options["sampler"] == "first_hitting" for options in limits)
  measured = (done / "frontier.jsonl").read_text().splitlines()
  assert len(measured) == 8, "the spaced ones at a lower temperature too"
  assert rows["reference"]["genppl"] > 1 and rows["reference"]["entropy"] > 0
  with (done / "frontier.csv").open() as file:
    assert len(list(csv.DictReader(file))) == 6
  assert (done / "frontier.png").read_bytes().startswith(b"\x89PNG")
  samples = json.loads((done / "samples.json").read_text())
  assert len(samples["teacher"]) == len(samples["student"]) == 8
  report = (done / "report.md").read_text()
  assert "![" in report and "frontier.png" in report and "trained here from scratch" in report
  table = report.partition("At temperature 1:")[2]
  assert table.count("| teacher") == 4 and table.count("| student") == 1
  assert "Evaluations saved beside the teacher at one entropy" in report
  assert all(f"### {i}\n" in report for i in range(1, 9))
  assert "Seeds: 0 of training, 0 of the table, 1 of the samples below." in report
  assert f"`dlm-jax quickstart --workdir={done}" in report and "--from_scratch" in report
  for name in ("teacher", "judge", "student"):
    assert places.network_directory(str(done / name)).is_dir()


@pytest.mark.slow
def test_the_overrides_reach_all_three(done):
  for name in ("teacher", "judge", "distillation"):
    config = json.loads((done / name / "checkpoints" / "config.json").read_text())
    assert (config["model"]["dim"], config["data"]["length"]) == (8, 32), name
  assert json.loads((done / "teacher" / "done.json").read_text())["step"] == 6


@pytest.mark.slow
def test_again_nothing_is_done_again(done, arguments, capsys, monkeypatch):
  def train(*args, **options):
    raise AssertionError("trained again")

  monkeypatch.setattr(distil, "train", train)
  before = {
    p: p.stat().st_mtime_ns for p in done.rglob("model.safetensors") if "student" not in str(p)
  }
  rows = (done / "frontier.json").read_text()
  started = time.monotonic()
  assert main(arguments(done)) == 0
  assert time.monotonic() - started < 30
  assert "already prepared" in capsys.readouterr().out
  assert (done / "frontier.json").read_text() == rows, "seconds included: nothing was drawn again"
  assert all(path.stat().st_mtime_ns == then for path, then in before.items())


@pytest.mark.slow
def test_a_second_method_is_added(done, arguments):
  """After the others, since it writes into their workdir: nothing of the first is trained again."""
  first = (done / "distillation" / "done.json").read_text()
  assert main([*arguments(done), "--methods=idlm,didi", "--config.objective.trained_layers=1"]) == 0
  assert (done / "distillation" / "done.json").read_text() == first
  assert (done / "student_didi" / "discriminator.safetensors").exists()
  rows = json.loads((done / "frontier.json").read_text())["rows"]
  at = [("teacher", 1), ("teacher", 2), *[("teacher, exact limit", 32)] * 2]
  at += [(f"{name}, spaced", 2) for name in ("teacher", "idlm", "didi")]
  at += [("didi, guided", 1), ("didi, guided", 2)]
  assert [(row["name"], row["nfe"]) for row in rows] == at
  assert rows[-1]["evaluations"] > rows[-1]["nfe"]
  report = (done / "report.md").read_text()
  assert "DiDi-Instruct (" in report and "| didi, spaced " in report
  assert set(json.loads((done / "samples.json").read_text())) == {"nfe", "teacher", "idlm", "didi"}


def test_unknown_methods(arguments, tmp_path, capsys):
  for text in ("idml", "", "idlm,idlm"):
    assert main([*arguments(tmp_path), f"--methods={text}"]) == 2
    assert "list some of idlm,didi" in capsys.readouterr().err
