# SPDX-License-Identifier: Apache-2.0
"""The quick start's report: table, figure and samples in one Markdown file."""

import json
import os
import pathlib
import platform

import jax

from dlm_jax import __version__
from dlm_jax.evaluate import frontier


def write(
  workdir: pathlib.Path, *, rows, reference: frontier.Reference, texts: dict[str, list[str]],
  shown_nfe: int, seconds: dict[str, float], student_step: int, from_scratch: bool, tokenizer,
  max_entropy_drop: float,
) -> None:  # fmt: skip
  """Write report.md, samples.json and summary.txt.

  Args:
    workdir: where frontier.png already is.
    rows: of `frontier.sweep`, models "teacher" and "student".
    reference: what held-out text scores.
    texts: samples by model.
    shown_nfe: their number of network evaluations.
    seconds: wall-clock time per part.
    student_step: student updates of the network kept.
    from_scratch: whether teacher and judge were trained here.
    tokenizer: its separator is shown as an end mark.
    max_entropy_drop: rule by which the student was chosen, nats.
  """
  table = frontier.table(rows)
  verdict = _verdict(rows, shown_nfe)
  took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
  source = "trained here from scratch" if from_scratch else "shipped with the package"
  machine = f"{os.cpu_count()} CPU cores, {jax.default_backend()}, Python "
  machine += f"{platform.python_version()}, jax {jax.__version__}, dlm_jax {__version__}"
  lines = [
    "# A few-step student of a masked diffusion language model",
    "",
    "A masked diffusion model writes a whole text in parallel, but needs many network evaluations",
    "(NFE) to do it well. Here a teacher of Python source text was distilled by IDLM into a",
    f"student: {student_step} student updates on this machine. Teacher and judge: {source}.",
    "",
    f"**{verdict}**",
    "",
    "![Quality against network evaluations](frontier.png)",
    "",
    table,
    "",
    "GenPPL is the perplexity of the samples under an autoregressive judge: lower is better, but a",
    "model can lower it by repeating itself, so read it together with the entropy of the samples.",
    f"The student kept is the best one whose entropy stayed within {max_entropy_drop} nats of the "
    "teacher's.",
    f"Held-out text scores {reference.genppl:.1f} at {reference.entropy:.2f} nats "
    f"({reference.label}).",
    "",
    f"Time: {took}. Machine: {machine}.",
    "",
    f"## Samples at {shown_nfe} network evaluations",
  ]
  for i, pair in enumerate(zip(texts["teacher"], texts["student"], strict=True), start=1):
    lines += ["", f"### {i}", "", *_side_by_side(pair, tokenizer.eos_text)]
  (workdir / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
  (workdir / "samples.json").write_text(json.dumps({"nfe": shown_nfe, **texts}, indent=2) + "\n")
  summary = [table, "", verdict, "", "samples, first of each:", ""]
  for name in ("teacher", "student"):
    summary += [f"── {name}, {shown_nfe} NFE ──", _clean(texts[name][0], tokenizer.eos_text), ""]
  summary += [f"report: {workdir / 'report.md'}   figure: {workdir / 'frontier.png'}"]
  summary += [f"more:   dlm-jax sample --checkpoint={workdir / 'student'} --steps=8 --num=4"]
  (workdir / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")


def _verdict(rows, nfe: int) -> str:
  """Say in one sentence what the table shows at `nfe`, and which teacher it equals."""
  at = {(row["name"], row["nfe"]): row for row in rows}
  if ("teacher", nfe) not in at:
    nfe = min(row["nfe"] for row in rows)
  teacher, student = at["teacher", nfe], at["student", nfe]
  ratio = student["genppl"] / teacher["genppl"]
  drop = teacher["entropy"] - student["entropy"]
  text = (
    f"At {nfe} NFE the student's GenPPL is {student['genppl']:.1f} against the teacher's "
    f"{teacher['genppl']:.1f} ({ratio:.2f}×), with an entropy {abs(drop):.2f} nats "
    f"{'lower' if drop >= 0 else 'higher'} ({student['samples']} samples each)."
  )
  return text + _saved(at)


def _saved(at: dict) -> str:
  """Say where the student needs the fewest evaluations for what the teacher reaches."""
  pairs = [
    (t, s)
    for (name, _), t in at.items()
    for (other, _), s in at.items()
    if (name, other) == ("teacher", "student")
    and t["nfe"] > s["nfe"]
    and t["genppl"] >= s["genppl"]
  ]
  if not pairs:
    return ""
  t, s = max(pairs, key=lambda pair: (pair[0]["nfe"] / pair[1]["nfe"], pair[0]["nfe"]))
  return (
    f" With {s['nfe']} it is at {s['genppl']:.1f} (entropy {s['entropy']:.2f}), the teacher with "
    f"{t['nfe']} at {t['genppl']:.1f} ({t['entropy']:.2f}): {t['nfe'] / s['nfe']:g} times fewer."
  )


def _clean(text: str, separator: str) -> str:
  """Show document separators as a short end mark."""
  return text.removeprefix(separator).removesuffix(separator).replace(separator, "⏹").strip("\n")


def _side_by_side(pair: tuple[str, str], separator: str, width: int = 62) -> list[str]:
  """Return two texts as two columns of one code block; long lines are wrapped, not cut."""
  columns = []
  for text in pair:
    wrapped = []
    for line in _clean(text, separator).expandtabs(4).splitlines() or [""]:
      wrapped += [line[i : i + width] for i in range(0, len(line), width)] or [""]
    columns.append(wrapped)
  height = max(map(len, columns))
  left, right = (column + [""] * (height - len(column)) for column in columns)
  head = f"{'teacher':<{width}} │ student"
  body = [f"{a:<{width}} │ {b}".rstrip() for a, b in zip(left, right, strict=True)]
  return ["````text", head, "─" * width + "─┼─" + "─" * width, *body, "````"]
