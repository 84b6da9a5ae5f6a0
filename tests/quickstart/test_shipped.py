# SPDX-License-Identifier: Apache-2.0
"""`quickstart --pretrained` with a tiny budget: its files, again, and what it does not take."""

import contextlib
import io
import json

import numpy as np
import pytest

from dlm_jax.cli.main import main
from dlm_jax.quickstart import comparison, distil, shipped


@pytest.fixture(autouse=True, scope="module")
def small_reference():
  """Score few held-out texts: the judge reads all of them for the report's line."""
  held_out = shipped.held_out
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(shipped, "held_out", lambda pipe: held_out(pipe)[:4])
    yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """Run it; return the command line, its workdir and what it printed. Nothing may be trained."""
  workdir = tmp_path_factory.mktemp("pretrained") / "run"
  command = ["quickstart", "--pretrained", f"--workdir={workdir}", "--nfes=1,2", "--samples=4"]
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
    patch.setattr(distil, "train", None)
    assert main(command) == 0
  return command, workdir, printed.getvalue()


def test_everything_is_written_without_training(done):
  _, workdir, printed = done
  rows = json.loads((workdir / "frontier.json").read_text())
  assert [(row["name"], row["nfe"], row["samples"]) for row in rows["rows"]] == [
    ("teacher", 1, 4),
    ("teacher", 2, 4),
    ("teacher, spaced", 2, 4),
    ("student, spaced", 2, 4),
  ]
  assert rows["reference"]["label"] == "4 validation texts"
  assert np.isfinite(rows["reference"]["genppl"]) and rows["reference"]["entropy"] > 3
  assert (workdir / "frontier.png").read_bytes().startswith(b"\x89PNG")
  samples = json.loads((workdir / "samples.json").read_text())
  assert samples["nfe"] == 8 and len(samples["teacher"]) == len(samples["student"]) == 8
  report = (workdir / "report.md").read_text()
  report = " ".join(report.split())  # it is wrapped
  assert "English novels" in report and "by inverse distillation (IDLM) (" in report
  assert "Teacher, student and judge: shipped with the package." in report
  command = f"dlm-jax quickstart --pretrained --workdir={workdir} --nfes=1,2 --samples=4"
  assert f"Command: `{command}`. Seeds: 0 of the table, 1 of the samples below." in report
  assert np.isfinite(rows["reference"]["genppl_se"])
  summary = (workdir / "summary.txt").read_text()
  assert "dlm-jax sample --model=novels-student --steps=8" in summary
  assert summary in printed


@pytest.mark.slow
def test_again_nothing_is_measured_again(done, monkeypatch):
  command, workdir, _ = done
  before = (workdir / "frontier.json").read_text()
  monkeypatch.setattr(comparison.frontier, "draw_samples", None)
  assert main(command) == 0
  assert (workdir / "frontier.json").read_text() == before


@pytest.mark.parametrize(
  "options, message",
  [
    (["--from_scratch"], "does not combine with --from_scratch;"),
    (["--methods=idlm"], "does not combine with --methods;"),
    (["--judge_steps=5", "--config.optim.lr=1"], "with --judge_steps, --config.optim.lr;"),
    (["--samples=0"], "--samples and --shown must be at least 1"),
    (["--nfes=0"], "NFE 0 is not a whole number"),
  ],
)
def test_refused(tmp_path, capsys, options, message):
  workdir = tmp_path / "run"
  assert main(["quickstart", "--pretrained", f"--workdir={workdir}", *options]) == 2
  line = capsys.readouterr().err
  assert message in line and len(line.splitlines()) == 1
  assert not workdir.exists()
