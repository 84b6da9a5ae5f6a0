# SPDX-License-Identifier: Apache-2.0
"""The sentences that the quick start's report concludes with."""

import pathlib
import platform
import types

import jax
import numpy as np
import pytest

from dlm_jax import __version__
from dlm_jax.evaluate import frontier
from dlm_jax.quickstart import comparison, distil, report, shipped


def _rows(**genppl):
  """Return rows of a frontier from {model: {NFE: GenPPL}}; a model's entropy is 5 − GenPPL/100."""
  return [
    {
      "name": name,
      "nfe": nfe,
      "evaluations": nfe,
      "genppl": value,
      "genppl_se": 0.01,
      "entropy": 5 - value / 100,
      "entropy_se": 0.001,
      "distinct_4": 0.99,
      "samples": 64,
    }
    for name, by_nfe in genppl.items()
    for nfe, value in by_nfe.items()
  ]


def _saved(**genppl):
  return report._saved({(row["name"], row["nfe"]): row for row in _rows(**genppl)}, "student")


def test_the_largest_saving_is_named():
  """16 → 8, 16 → 4, 32 → 8 and 32 → 4 are all true; so is 8 → 4, a smaller one."""
  text = _saved(teacher={8: 60.0, 16: 50.0, 32: 41.0}, student={4: 40.0, 8: 30.0, 16: 20.0})
  assert text == (
    " With 4 it is at 40.0 (entropy 4.60), the teacher with 32 at 41.0 (4.59): 8 times fewer."
  )


def test_equal_savings_name_the_longer_run():
  text = _saved(teacher={8: 50.0, 16: 40.0}, student={4: 45.0, 8: 35.0})
  assert text.endswith("the teacher with 16 at 40.0 (4.60): 2 times fewer.")


@pytest.mark.parametrize(
  "student",
  [{4: 61.0, 8: 60.5, 16: 60.1}, {16: 10.0, 32: 5.0}, {}],
  ids=["worse", "not fewer", "absent"],
)
def test_nothing_saved_says_nothing(student):
  assert _saved(teacher={8: 60.0, 16: 55.0}, student=student) == ""


def test_other_models_are_not_compared():
  """Neither another student's rows nor the teacher's own count for this one."""
  text = _saved(teacher={8: 60.0, 16: 50.0}, other={1: 1.0}, student={8: 55.0})
  assert text == ""


def test_verdict():
  """At the NFE shown, or the fewest if the teacher was not measured there."""
  rows = _rows(teacher={4: 80.0, 8: 61.0}, student={4: 60.0, 8: 66.0})
  text = report._verdict(rows, 4, "student")
  assert text.startswith(
    "At 4 NFE the student's GenPPL is 60.0 ± 0.0 against the teacher's 80.0 ± 0.0 (0.75 ± 0.00×), "
    "with an entropy 0.20 ± 0.00 nats higher (64 samples each)."
  )
  assert text.endswith(
    " With 4 it is at 60.0 (entropy 4.40), the teacher with 8 at 61.0 (4.39): 2 times fewer."
  )
  assert report._verdict(rows, 16, "student") == text
  lower = report._verdict(rows, 8, "student")
  assert "66.0 ± 0.0 against the teacher's 61.0 ± 0.0 (1.08 ± 0.00×), with an entropy" in lower
  assert "entropy 0.05 ± 0.00 nats lower" in lower
  assert "A lower temperature narrows the teacher, too" in lower and "narrows" not in text


def test_a_saving_is_beyond_its_error_and_at_no_lower_entropy():
  def saved(**changes):
    rows = _rows(teacher={8: 60.0}, student={4: 50.0})
    rows[1] |= changes
    return report._saved({(row["name"], row["nfe"]): row for row in rows}, "student")

  assert saved().endswith("2 times fewer.")
  assert saved(genppl_se=4.9).endswith("2 times fewer.")
  assert saved(genppl_se=5.1) == "" and saved(genppl_se=float("nan")) == ""
  assert saved(entropy=4.39) == "" and saved(entropy=4.39, entropy_se=0.006) != ""


def test_a_student_like_its_teacher_saves_nothing():
  """Drawn from the teacher's own law with errors of 7 %, it is said to save in 5 % at most."""
  truth, rng, said = {8: 307.0, 16: 173.0, 32: 120.0, 64: 106.0, 128: 104.0}, None, 0
  rng = np.random.default_rng(0)
  for _ in range(2000):
    drawn = {n: {k: v * np.exp(0.07 * rng.normal()) for k, v in truth.items()} for n in "ts"}
    rows = _rows(teacher=drawn["t"], student=drawn["s"])
    for row in rows:
      row |= {"genppl_se": 0.07 * row["genppl"], "entropy": 4.2}
    said += report._saved({(row["name"], row["nfe"]): row for row in rows}, "student") != ""
  assert said <= 0.05 * 2000


def _report(tmp_path, **real) -> str:
  rows = [
    row | {"seconds": 1.0, "options": {}} for row in _rows(teacher={8: 60.0}, student={8: 50.0})
  ]
  report.write(
    tmp_path,
    rows=rows,
    reference=frontier.Reference(label="16 texts", **real),
    texts={"teacher": ["a"], "student": ["b"]},
    shown_nfe=8,
    made=report.Made(
      told="Told.",
      command="dlm-jax quickstart --workdir=run",
      seeds={"training": 5, "the table": 0},
      seconds={"frontier": 2.0},
    ),
    tokenizer=types.SimpleNamespace(eos_text="<end>"),
    max_entropy_drop=0.2,
    students={"student": "run/student"},
  )
  return (tmp_path / "report.md").read_text()


def test_a_report_says_how_it_was_made(tmp_path):
  text = _report(tmp_path, genppl=14.52, genppl_se=0.44, entropy=4.081, entropy_se=0.012)
  assert "Held-out text scores 14.5 ± 0.4 at 4.08 ± 0.01 nats (16 texts)." in text
  assert (
    "Command: `dlm-jax quickstart --workdir=run`. Seeds: 5 of training, 0 of the table." in text
  )
  assert (
    f"dlm_jax {__version__}, Python {platform.python_version()}, jax {jax.__version__}," in text
  )
  assert "Time: frontier 2 s." in text and "± is one standard error" in text
  nan = float("nan")
  text = _report(tmp_path, genppl=14.52, genppl_se=nan, entropy=4.081, entropy_se=nan)
  assert "Held-out text scores 14.5 at 4.08 nats (16 texts)." in text


def test_the_command_of_a_report():
  folder = pathlib.Path("my runs")
  plain = distil.Options(workdir=folder)
  assert comparison.command(plain) == "dlm-jax quickstart '--workdir=my runs'"
  full = distil.Options(
    workdir=pathlib.Path("run"),
    from_scratch=True,
    methods=("idlm", "didi"),
    nfes=(1, 2),
    samples=8,
    teacher_steps=5,
    overrides={"seed": "7", "data.source": "files:a b"},
  )
  assert comparison.command(full) == (
    "dlm-jax quickstart --workdir=run --from_scratch --methods=idlm,didi --nfes=1,2 --samples=8 "
    "--teacher_steps=5 --config.seed=7 '--config.data.source=files:a b'"
  )
  few = shipped.Options(workdir=folder, samples=4)
  assert comparison.command(few, "--pretrained").endswith("runs' --samples=4")
