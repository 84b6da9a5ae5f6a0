# SPDX-License-Identifier: Apache-2.0
"""The sentences that the quick start's report concludes with."""

import math
import pathlib
import platform
import types

import jax
import numpy as np
import pytest

from dlm_jax import __version__, process
from dlm_jax.evaluate import frontier, saving
from dlm_jax.quickstart import comparison, distil, report, shipped


def _rows(name, nfes, genppl, temperatures=(0.9, 1.0), **options):
  """GenPPL of a number of evaluations, times e^(4 entropy) at a temperature."""
  return [
    {
      "name": name,
      "nfe": nfe,
      "evaluations": nfe,
      "genppl": genppl(nfe) * math.exp(4 * (t - 1)),
      "genppl_se": 0.01 * genppl(nfe),
      "entropy": 4.2 + (t - 1),
      "entropy_se": 0.0,
      "correlation": 0.0,
      "distinct_4": 0.99,
      "samples": 64,
      "seconds": 1.0,
      "options": {"temperature": t, **options},
    }
    for nfe in nfes
    for t in temperatures
  ]


TEACHER = _rows("teacher", (4, 8, 16, 32), lambda n: 100 * (1 + 8 / n))
TEACHER += _rows("teacher, exact limit", (128,), lambda n: 100 * (1 + 8 / n))


def _verdict(*rows, nfe=8):
  return report.verdict(saving.nearest([*TEACHER, *rows], "teacher"), nfe, "teacher")


def test_the_verdict_is_of_the_evaluations_that_were_named_before():
  """Not of those that would save the most: 4 here."""
  rows = _rows("student, spaced", (4, 8, 16), lambda n: 100 * (1 + 8 / ({4: 4}.get(n, 2) * n)))
  (text,) = _verdict(*rows)
  assert text.startswith('With 8 evaluations "student, spaced" has GenPPL ')
  assert "for which the teacher needs 16: 2.0 times fewer evaluations (1.8 … 2.3)." in text
  assert _verdict(*rows, nfe=12) == [text]
  assert _verdict(*rows, nfe=1)[0].startswith("With 4 evaluations"), "the fewest measured"


def test_every_model_has_a_verdict():
  a, b = (_rows(name, (8,), lambda n: 150.0) for name in "ab")
  assert [text.split('"')[1] for text in _verdict(*a, *b)] == ["a", "b"]


@pytest.mark.parametrize(
  ("genppl", "error", "claimed"), [(150, 0.01, True), (150, 0.15, False), (198, 0.01, False)]
)
def test_fewer_is_said_beyond_two_combined_errors(genppl, error, claimed):
  rows = _rows("student", (8,), lambda n: genppl)
  rows = [row | {"genppl_se": error * row["genppl"]} for row in rows]
  (text,) = _verdict(*rows)
  assert ("times fewer evaluations" in text) == claimed
  assert ("no saving is shown" in text) == (not claimed)


def test_a_narrower_student_saves_nothing_by_that():
  """At its entropy the teacher has the same GenPPL, by a lower temperature."""
  colder = _rows("student", (8,), lambda n: 200.0, temperatures=(0.92,))
  assert colder[0]["genppl"] < 150 and "no saving is shown" in _verdict(*colder)[0]
  below = _rows("student", (8,), lambda n: 200.0, temperatures=(0.7,))
  assert _verdict(*below) == ["No entropy is one that both reach, so no saving is shown."]


def test_the_limit_bounds_what_is_said():
  (text,) = _verdict(*_rows("student", (8,), lambda n: 60.0))
  assert "needs 128, the last of its curve: 16.0 times fewer" in text


def test_a_student_like_its_teacher_saves_nothing():
  """Drawn from the teacher's own law with errors of 7 %, it is said to save in 5 % at most."""
  rng, said, runs = np.random.default_rng(0), 0, 400
  law = {8: 307.0, 16: 173.0, 32: 120.0, 64: 106.0, 128: 104.0}.get
  true = _rows("teacher", (8, 16, 32, 64, 128), law) + _rows("student", (16,), law, (1.0,))
  for _ in range(runs):
    rows = [row | {"genppl": row["genppl"] * np.exp(0.07 * rng.normal())} for row in true]
    rows = [row | {"genppl_se": 0.07 * row["genppl"]} for row in rows]
    (text,) = report.verdict(saving.nearest(rows, "teacher"), 16, "teacher")
    said += "times fewer evaluations" in text
  assert said <= 0.05 * runs


def _report(tmp_path, **real) -> str:
  rows = TEACHER + _rows("student", (8,), lambda n: 150.0, order="spaced")
  report.write(
    tmp_path,
    rows=rows,
    baseline="teacher",
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
  assert text.count("| teacher ") == 4 and text.count("| student ") == 2, "at temperature 1; saved"
  assert "**With 8 evaluations" in text and "times fewer" in text
  assert (tmp_path / "summary.txt").read_text().endswith(" --steps=8 --num=4\n")
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


def _measured(monkeypatch, nfes, *, exact=True, proc=None, critic=None):
  """Return what the quick start's sweep asks for: (name, NFEs, options)."""
  asked = []

  def sweep(samplers, nfes, *, on_row, **settings):
    warm = {"temperature": 1.0}  # unless another is given
    asked.extend((name, nfes, warm | dict(s.options)) for name, s in samplers.items())
    return []

  def pipe():
    shared = {"denoiser": None, "process": proc, "length": 128}
    make = lambda **options: frontier.Sampler(options=options, **shared)  # noqa: E731
    return types.SimpleNamespace(process=proc, critic=critic, sampler=make)

  monkeypatch.setattr(frontier, "sweep", sweep)
  compared = types.SimpleNamespace(nfes=nfes, exact=exact)
  comparison._sweep({"teacher": pipe(), "student": pipe()}, compared, {})
  return asked


def test_what_the_quick_start_measures(monkeypatch):
  """The teacher up to its exact limit, never in more steps than a text has tokens."""
  masks = process.Absorbing(vocab_size=5, mask_id=4)
  teacher = {"order": "random", "temperature": 1.0}
  limit = {"sampler": "first_hitting", "temperature": 1.0}
  spaced = {"order": "spaced", "temperature": 1.0}
  assert _measured(monkeypatch, (1, 4, 16, 64, 128, 256), proc=masks) == [
    ("teacher", [1, 4, 16, 64], teacher),
    ("teacher", [16, 64], teacher | {"temperature": 0.85}),
    ("teacher, exact limit", [128], limit),
    ("teacher, exact limit", [128], limit | {"temperature": 0.9}),
    ("teacher, spaced", [4, 16], spaced),
    ("student, spaced", [4, 16], spaced),
    ("teacher, spaced", [4, 16], spaced | {"temperature": 0.9}),
    ("student, spaced", [4, 16], spaced | {"temperature": 0.9}),
  ]
  names = [name for name, *_ in _measured(monkeypatch, (4, 16), exact=False, proc=masks)]
  assert "teacher, exact limit" not in names and "teacher, spaced" in names
  guided = _measured(monkeypatch, (4, 8, 16), proc=masks, critic=object())[-1]
  assert guided[:2] == ("student, guided", [4, 8]) and guided[2]["sampler"] == "rgas"


def test_uniform_states_have_no_order_and_no_limit(monkeypatch):
  asked = _measured(monkeypatch, (4, 256), proc=process.Uniform(vocab_size=5))
  assert {name for name, *_ in asked} == {"teacher", "student"}
  assert asked[0][1] == [4, 256] and not any("order" in options for *_, options in asked)
