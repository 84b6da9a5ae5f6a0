# SPDX-License-Identifier: Apache-2.0
"""Teacher and students side by side: frontier, reference, samples and report in one folder."""

import contextlib
import dataclasses
import pathlib
import shlex
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from dlm_jax import convert, fields, json_file
from dlm_jax.convert import places
from dlm_jax.errors import InputError, check_counts
from dlm_jax.evaluate import frontier, matched, reference, saving
from dlm_jax.evaluate.frontier import sweep_progress
from dlm_jax.evaluate.judge import load_judge
from dlm_jax.process import has_mask
from dlm_jax.quickstart import report
from dlm_jax.remote import write_json
from dlm_jax.text import denoiser
from dlm_jax.text.denoiser import Pipeline

METHODS = {"idlm": "inverse distillation (IDLM)", "didi": "DiDi-Instruct"}
_GUIDED_NFE = 8  # guided samples cost about four times as much: the last two NFEs up to this
_SEEDS = {"the table": 0, "the samples below": 1}
_BASELINE = "teacher"
_FEW = (2, 16)  # evaluations of spaced orders
_COLDER = 8  # evaluations from which the baseline is measured at a lower temperature, too
_COLD = {"baseline": 0.85, "limit": 0.9, "spaced": 0.9}  # so that their entropies overlap
_TILT = (5.0, 5.0)  # the published 30 … 40 narrows the quick start's student to 2.3 nats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """What is compared, and how.

  Attributes:
    teacher: path of the teacher.
    students: path of every student by the name to plot it under; at least one.
    methods: what each student was distilled by, as a phrase.
    judge: path of the autoregressive judge.
    told: what the report begins with; "{made}" in it becomes the methods and their updates.
    max_entropy_drop: rule by which the students were chosen, nats.
    nfes: numbers of network evaluations.
    exact: whether the teacher's curve ends with its exact limit, an evaluation per token.
    samples: samples per row of the frontier.
    shown: samples of each model in the report.
    shown_nfe: at this number of evaluations.
    command: that does this again.
    seed: of the students' training; None: nothing was trained.
  """

  teacher: str
  students: dict[str, str]
  methods: dict[str, str]
  judge: str
  told: str
  max_entropy_drop: float
  nfes: tuple[int, ...]
  exact: bool
  samples: int
  shown: int
  shown_nfe: int
  command: str
  seed: int | None = None


def command(options: Any, *flags: str) -> str:
  """Return the quick start's command line for options that were given to it, others left out.

  Args:
    options: `distil.Options` or `shipped.Options`.
    *flags: that say which.
  """
  parts = ["dlm-jax", "quickstart", *flags, f"--workdir={options.workdir}"]
  for name in ("from_scratch", "methods", "nfes", "samples", "teacher_steps", "judge_steps"):
    value = getattr(options, name, None)
    if value is True:
      parts.append(f"--{name}")
    elif value != getattr(type(options), name, None):
      several = isinstance(value, tuple)
      parts.append(f"--{name}={','.join(map(str, value)) if several else value}")
  parts += [f"--config.{name}={text}" for name, text in getattr(options, "overrides", {}).items()]
  return shlex.join(parts)


def check_sizes(nfes: tuple[int, ...], samples: int, shown: int) -> None:
  """Raise InputError for an empty list of NFEs or a count below 1."""
  frontier.checked_nfes(nfes)
  if samples < 1 or shown < 1:
    raise InputError("--samples and --shown must be at least 1.")
  check_counts(samples=samples, shown=shown)


def write(
  workdir: pathlib.Path,
  compared: Comparison,
  held_out: Callable[[Pipeline], Int[np.ndarray, "N L"]],
  clock: "Clock",
) -> None:
  """Sweep all models; write frontier.*, samples.json, summary.txt and report.md.

  Args:
    workdir: exists; rows in its frontier.jsonl are not measured again.
    compared: the models.
    held_out: returns real text in the teacher's tokens; its score is the reference.
    clock: measures the sweep.

  Raises:
    InputError: a network is missing, or the judge has another tokenizer.
  """
  paths = {"teacher": compared.teacher, **compared.students}
  pipes = {name: denoiser.load_denoiser(path) for name, path in paths.items()}
  judge = load_judge(compared.judge, pipes["teacher"].tokenizer)
  used = [places.network_directory(path) for path in (*paths.values(), compared.judge)]
  settings = {
    "judge": dataclasses.replace(judge, batch_size=compared.samples),
    "samples": compared.samples,
    "batch_size": compared.samples,
    "seed": _SEEDS["the table"],
    "path": workdir / "frontier.jsonl",
    "context": {"weights": [convert.fingerprint(directory) for directory in used]},
  }
  with clock.measure("frontier"):
    rows = _sweep(pipes, compared, settings)
  real = reference.score(judge, held_out(pipes["teacher"]))
  frontier.write([row for row in rows if _drawn(row)], workdir, reference=real)
  shown = {"steps": compared.shown_nfe, "num": compared.shown, "seed": _SEEDS["the samples below"]}
  texts = {name: pipe(**shown, **_order(pipe, "spaced")) for name, pipe in pipes.items()}
  trained = {} if compared.seed is None else {"training": compared.seed}
  report.write(
    workdir,
    rows=rows,
    baseline=_BASELINE,
    reference=real,
    texts=texts,
    shown_nfe=compared.shown_nfe,
    made=report.Made(
      told=compared.told.format(made=_made(compared)),
      command=compared.command,
      seeds=trained | _SEEDS,
      seconds=clock.seconds,
    ),
    tokenizer=pipes["teacher"].tokenizer,
    max_entropy_drop=compared.max_entropy_drop,
    students=compared.students,
  )


def _order(pipe, order) -> dict[str, str]:
  """Return the option of a reveal order, where there are masks to reveal."""
  return {"order": order} if has_mask(pipe.process) else {}


def _sweep(pipes, compared, settings) -> list[frontier.Row]:
  """Measure the teacher in random order, up to its exact limit, and all models in spaced order.

  Every one at two temperatures, so that they can be compared at one entropy; those with a
  discriminator also with its guidance.
  """
  base, nfes = pipes["teacher"].sampler(**_order(pipes["teacher"], "random")), compared.nfes
  below = [nfe for nfe in nfes if not has_mask(base.process) or nfe < base.length] or [1]
  few = [nfe for nfe in nfes if _FEW[0] <= nfe <= _FEW[1]] or below
  models = {f"{name}, spaced" if _order(p, "") else name: p for name, p in pipes.items()}
  models = {name: p.sampler(**_order(p, "spaced")) for name, p in models.items()}
  models.pop(_BASELINE, None)
  guided = {
    f"{name}, guided": pipe.sampler(sampler="rgas", h=_TILT)
    for name, pipe in pipes.items()
    if pipe.critic is not None
  }
  exact = saving.limit(base) if compared.exact else None
  jobs = [({_BASELINE: base}, below, (1.0,))]
  if colder := [nfe for nfe in below if nfe >= _COLDER]:
    jobs.append(({_BASELINE: base}, colder, (_COLD["baseline"],)))
  if exact is not None:
    jobs.append(({saving.limit_name(_BASELINE): exact}, [base.length], (1.0, _COLD["limit"])))
  jobs.append((models, few, (1.0, _COLD["spaced"])))
  if guided:
    jobs.append((guided, [nfe for nfe in below if nfe <= _GUIDED_NFE][-2:] or below, (1.0,)))
  total = sum(len(samplers) * sum(asked) * len(at) for samplers, asked, at in jobs)
  with sweep_progress(total) as on_row:
    return [
      row
      for samplers, asked, at in jobs
      for temperature in at
      for row in matched.sweep_at(samplers, asked, temperature, on_row=on_row, **settings)
    ]


def _drawn(row) -> bool:
  """Return whether a row is in the figure: at temperature 1, and the exact limit at all."""
  return row["options"]["temperature"] == 1.0 or row["name"] == saving.limit_name(_BASELINE)


def _made(compared: Comparison) -> str:
  """Say by which methods the students were made, and in how many updates."""
  several, phrases = len(compared.students) > 1, []
  for name, path in compared.students.items():
    step = convert.read_config(places.network_directory(path))["dlm_jax"]["step"]
    below = f", below: {name}" if several else ""
    phrases.append(f"by {compared.methods[name]} ({step} student updates{below})")
  return " and ".join(phrases)


class Clock:
  """Seconds spent per part, over interruptions.

  Attributes:
    seconds: by part.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.seconds: dict[str, float] = {}
    if path.exists():
      try:
        content, parts = json_file.read(path), fields.Objects(fields.Number("[0, ∞)"))
        self.seconds = parts.check("it", content)
      except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise InputError(f"{path} holds no seconds ({problem}); remove it.") from None

  @contextlib.contextmanager
  def measure(self, name: str):
    """Add the time of the block, also of one that is interrupted."""
    started = time.monotonic()
    try:
      yield
    finally:
      self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
      write_json(self._path, self.seconds)
