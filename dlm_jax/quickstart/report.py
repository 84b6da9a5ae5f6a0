# SPDX-License-Identifier: Apache-2.0
"""The quick start's report: table, figure and samples in one Markdown file."""

import dataclasses
import json
import os
import pathlib
import platform
import textwrap
from importlib import metadata

import jax

from dlm_jax import __version__
from dlm_jax.evaluate import frontier, saving
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
  baseline: str,
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
    rows: of `matched.sweep`: teacher and students, and maybe guided ones; at temperature 1 and at
      others, which are left out of the table.
    baseline: name of the model whose evaluations are to be saved.
    reference: what held-out text scores.
    texts: samples by model, "teacher" and the students.
    shown_nfe: their number of network evaluations.
    made: how.
    tokenizer: its separator is shown as an end mark.
    max_entropy_drop: rule by which the student was chosen, nats.
    students: path of each student; the last line says how to sample from the first.
  """
  table = frontier.table([row for row in rows if row["options"].get("temperature", 1.0) == 1.0])
  saved = saving.nearest(rows, baseline)
  verdicts = verdict(saved, shown_nfe, baseline)
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
    *_at_one_entropy(saved, baseline),
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
  summary = [table, "", *([saving.tabled(saved), ""] if saved else []), *verdicts]
  summary += ["", "samples, first of each:", ""]
  for name, drawn in texts.items():
    summary += [f"── {name}, {shown_nfe} NFE ──", viz.plain(drawn[0], tokenizer).strip("\n"), ""]
  summary += [f"report: {workdir / 'report.md'}   figure: {workdir / 'frontier.png'}"]
  summary += [f"more:   dlm-jax sample {_named(next(iter(students.values())))} --steps=8 --num=4"]
  (workdir / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")


def _at_one_entropy(saved, baseline) -> list[str]:
  """Return the table of savings with what it takes to read it."""
  return [
    f"Evaluations saved beside the {baseline} at one entropy, in brackets two combined errors:",
    "",
    saving.tabled(saved) if saved else "none: the models have no entropy in common.",
    "",
    f"The {baseline} reveals positions in random order, its exact limit one at a time; what is",
    "called spaced reveals positions together that are far apart. Each is compared at its samples'",
    f"entropy, where the {baseline} is interpolated between temperatures: a lower one lowers",
    "GenPPL, too.",
    "At temperature 1:",
    "",
  ]


def verdict(saved: list[saving.Saving], nfe: int, baseline: str) -> list[str]:
  """Say of every model what it saves with so many evaluations, or with the next fewer measured.

  The number is given before anything is measured: the largest saving of many is large by chance.

  Args:
    saved: of `saving.nearest`.
    nfe: evaluations.
    baseline: what is to be saved.
  """
  told = []
  for own in saving.by_name(saved).values():
    fewer = [one for one in own if one.evaluations <= nfe] or own[:1]
    told.append(saving.told(fewer[-1], f"the {baseline}"))
  return told or ["No entropy is one that both reach, so no saving is shown."]


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
