# SPDX-License-Identifier: Apache-2.0
"""The quick start's report: table, figure and samples in one Markdown file."""

import dataclasses
import json
import math
import os
import pathlib
import platform
import textwrap
from importlib import metadata

import jax

from dlm_jax import __version__
from dlm_jax.evaluate import frontier
from dlm_jax.evaluate.generative import plus_minus
from dlm_jax.text import viz


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
  """How a report's numbers came about.

  Attributes:
    told: what was done, in a sentence or two.
    command: that does it again.
    seeds: by what was drawn from them.
    seconds: wall-clock time by part.
  """

  told: str
  command: str
  seeds: dict[str, int]
  seconds: dict[str, float]


def write(
  workdir: pathlib.Path,
  *,
  rows,
  reference: frontier.Reference,
  texts: dict[str, list[str]],
  shown_nfe: int,
  made: Made,
  tokenizer,
  max_entropy_drop: float,
  students: dict[str, str],
) -> None:
  """Write report.md, samples.json and summary.txt.

  Args:
    workdir: where frontier.png already is.
    rows: of `frontier.sweep`: model "teacher", the students, and maybe guided ones.
    reference: what held-out text scores.
    texts: samples by model, "teacher" and the students.
    shown_nfe: their number of network evaluations.
    made: how.
    tokenizer: its separator is shown as an end mark.
    max_entropy_drop: rule by which the student was chosen, nats.
    students: path of each student; the last line says how to sample from the first.
  """
  table = frontier.table(rows)
  verdicts = [_verdict(rows, shown_nfe, name) for name in students]
  lines = [
    "# A few-step student of a masked diffusion language model",
    "",
    "A masked diffusion model writes a whole text in parallel, but needs many network evaluations",
    "(NFE) to do it well.",
    *textwrap.wrap(made.told, 100),
    "",
    *(f"**{verdict}**\n" for verdict in verdicts),
    "![Quality against network evaluations](frontier.png)",
    "",
    table,
    "",
    "GenPPL is the perplexity of the samples under an autoregressive judge: lower is better, but a",
    "model can lower it by repeating itself, so read it together with the entropy of the samples.",
    f"The student kept is the best one whose entropy stayed within {max_entropy_drop} nats of the "
    "teacher's.",
    *_on_guidance(rows),
    f"Held-out text scores {plus_minus(reference.genppl, reference.genppl_se)} at "
    f"{plus_minus(reference.entropy, reference.entropy_se, 2)} nats ({reference.label}).",
    "± is one standard error over samples or texts, of one trained network and one seed.",
    "",
    *_how(made),
    "",
    f"## Samples at {shown_nfe} network evaluations",
  ]
  for i, row in enumerate(zip(*texts.values(), strict=True), start=1):
    named = dict(zip(texts, row, strict=True))
    lines += ["", f"### {i}", "", *_side_by_side(named, tokenizer)]
  (workdir / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
  (workdir / "samples.json").write_text(json.dumps({"nfe": shown_nfe, **texts}, indent=2) + "\n")
  summary = [table, "", *verdicts, "", "samples, first of each:", ""]
  for name, drawn in texts.items():
    summary += [f"── {name}, {shown_nfe} NFE ──", viz.plain(drawn[0], tokenizer).strip("\n"), ""]
  summary += [f"report: {workdir / 'report.md'}   figure: {workdir / 'frontier.png'}"]
  summary += [f"more:   dlm-jax sample {_named(next(iter(students.values())))} --steps=8 --num=4"]
  (workdir / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")


def _how(made: Made) -> list[str]:
  """Say what it takes to do the same again: command, seeds, versions, machine, time."""
  took = ", ".join(f"{name} {value:.0f} s" for name, value in made.seconds.items())
  seeds = ", ".join(f"{seed} of {what}" for what, seed in made.seeds.items())
  libraries = ("jax", "jaxlib", "flax", "optax", "numpy")
  versions = ", ".join(f"{name} {metadata.version(name)}" for name in libraries)
  machine = f"{os.cpu_count()} CPU cores, {jax.device_count()} × {jax.devices()[0].device_kind}"
  return [
    f"Command: `{made.command}`. Seeds: {seeds}.",
    f"Versions: dlm_jax {__version__}, Python {platform.python_version()}, {versions}.",
    f"Machine: {machine}. Time: {took}.",
  ]


def _named(path: str) -> str:
  """Return the flag of `dlm-jax sample` that names a network."""
  shipped = path.startswith("shipped:")
  return f"--model={path.removeprefix('shipped:')}" if shipped else f"--checkpoint={path}"


def _on_guidance(rows) -> list[str]:
  """Say what guided rows are, if there are any."""
  if all(row["options"].get("sampler") != "rgas" for row in rows):
    return []
  return [
    'Guided samples are steered by the student\'s discriminator (sampler rgas); "all nets" counts',
    "every evaluation of either network, NFE those of the student.",
  ]


def _verdict(rows, nfe: int, name: str) -> str:
  """Say in one sentence what the table shows of a student, and which teacher it is better than."""
  at = {(row["name"], row["nfe"]): row for row in rows}
  if ("teacher", nfe) not in at:
    nfe = min(row["nfe"] for row in rows)
  teacher, student = at["teacher", nfe], at[name, nfe]
  ratio = student["genppl"] / teacher["genppl"]
  ratio_se = ratio * _combined(*(row["genppl_se"] / row["genppl"] for row in (student, teacher)))
  drop = teacher["entropy"] - student["entropy"]
  drop_se = _combined(student["entropy_se"], teacher["entropy_se"])
  gap, lower = plus_minus(abs(drop), drop_se, 2), "lower" if drop >= 0 else "higher"
  genppl = [plus_minus(row["genppl"], row["genppl_se"]) for row in (student, teacher)]
  who = "the student" if name == "student" else f"the {name} student"
  text = (
    f"At {nfe} NFE {who}'s GenPPL is {genppl[0]} against the teacher's {genppl[1]} "
    f"({plus_minus(ratio, ratio_se, 2)}×), with an entropy {gap} nats {lower} "
    f"({student['samples']} samples each)."
  )
  if _narrower(student, teacher):
    text += (
      " A lower temperature narrows the teacher, too, and lowers its GenPPL: compare them at one "
      "entropy (`dlm-jax frontier --temperatures`)."
    )
  return text + _saved(at, name)


def _combined(*errors: float) -> float:
  """Return the standard error of a difference; one that is unknown (NaN) stays so."""
  return math.hypot(*errors)


def _narrower(student, teacher) -> bool:
  """Tell whether a student's entropy is below its teacher's, beyond two standard errors."""
  error = _combined(student["entropy_se"], teacher["entropy_se"])
  return not teacher["entropy"] - student["entropy"] <= 2 * error


def _saved(at: dict, student: str) -> str:
  """Say where the student needs the fewest evaluations for better than what the teacher reaches.

  Only of pairs whose GenPPL differs by more than two combined standard errors, at no lower entropy:
  the best of many noisy pairs says nothing, and less entropy is had by a lower temperature.
  """

  def better(s, t):
    error = _combined(s["genppl_se"], t["genppl_se"])
    return t["genppl"] - s["genppl"] > 2 * error and not _narrower(s, t)

  pairs = [
    (t, s)
    for (name, _), t in at.items()
    for (other, _), s in at.items()
    if (name, other) == ("teacher", student) and t["evaluations"] > s["evaluations"]
    if better(s, t)
  ]
  if not pairs:
    return ""
  fewer = lambda t, s: t["evaluations"] / s["evaluations"]  # noqa: E731
  t, s = max(pairs, key=lambda pair: (fewer(*pair), pair[0]["nfe"]))
  return (
    f" With {s['nfe']} it is at {s['genppl']:.1f} (entropy {s['entropy']:.2f}), the teacher with "
    f"{t['nfe']} at {t['genppl']:.1f} ({t['entropy']:.2f}): {fewer(t, s):g} times fewer."
  )


def _side_by_side(texts: dict[str, str], tokenizer) -> list[str]:
  """Return texts as columns of one code block; long lines are wrapped, not cut."""
  width, columns = 124 // len(texts), []
  for text in texts.values():
    wrapped = []
    for line in viz.plain(text, tokenizer).strip("\n").expandtabs(4).splitlines() or [""]:
      wrapped += [line[i : i + width] for i in range(0, len(line), width)] or [""]
    columns.append(wrapped)
  height = max(map(len, columns))
  columns = [column + [""] * (height - len(column)) for column in columns]
  join = lambda cells: " │ ".join(f"{cell:<{width}}" for cell in cells).rstrip()  # noqa: E731
  rule = "─┼─".join("─" * width for _ in texts)
  return ["````text", join(texts), rule, *(join(row) for row in zip(*columns, strict=True)), "````"]
