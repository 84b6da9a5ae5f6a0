# SPDX-License-Identifier: Apache-2.0
"""The whole job on one machine: data → teacher and judge → students → frontier → report."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from dlm_jax import fields, json_file, remote
from dlm_jax.convert import families, places
from dlm_jax.data import builder, loader
from dlm_jax.errors import InputError
from dlm_jax.experiment import build, plan
from dlm_jax.experiment.config import load_config
from dlm_jax.experiment.run import make_workdir, train
from dlm_jax.quickstart import comparison
from dlm_jax.remote import write_json

# Overrides of these groups also reach teacher and judge.
_SHARED = ("data", "mesh", "model", "process", "seed")
_TOLD = "Here a teacher of Python source text was distilled on this machine {made}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What to do.

  Attributes:
    workdir: everything goes there; finished parts are not repeated.
    from_scratch: train teacher and judge here instead of using the shipped ones.
    methods: keys of `comparison.METHODS`, a student each.
    nfes: numbers of network evaluations of the frontier.
    samples: samples per row of the frontier.
    shown: samples of each model in the report.
    shown_nfe: at this number of evaluations.
    teacher_steps, judge_steps: of training from scratch.
    overrides: fields of the students' configs as text; data, model, process, mesh and seed reach
      teacher and judge too.
  """

  workdir: pathlib.Path
  from_scratch: bool = False
  methods: tuple[str, ...] = ("idlm",)
  nfes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
  samples: int = 64
  shown: int = 8
  shown_nfe: int = 8
  teacher_steps: int = 3000
  judge_steps: int = 1200
  overrides: dict[str, str] = dataclasses.field(default_factory=dict)


def run(options: Options, say: Callable[[str], None] = print) -> bool:
  """Do the whole job, or what is left of it; return False if it was interrupted.

  Raises:
    InputError: a bad option or an unwritable workdir.
  """
  comparison.check_sizes(options.nfes, options.samples, options.shown)
  unknown = [method for method in options.methods if method not in comparison.METHODS]
  if unknown or not options.methods or len(set(options.methods)) < len(options.methods):
    raise InputError(
      f"--methods={','.join(options.methods)}: list some of {','.join(comparison.METHODS)}."
    )
  configs = _configs(options)
  make_workdir(options.workdir)
  clock = comparison.Clock(options.workdir / "seconds.json")

  say("1/4  Data: the source text of the Python standard library on this machine")
  with clock.measure("data"):
    prepared = build.prepare(plan.read_data(configs[options.methods[0]]))
  say(f"     {prepared.message}")

  if options.from_scratch:
    say("2/4  Teacher and judge: training both from scratch")
  else:
    say("2/4  Teacher and judge: the shipped networks")
  for name in ("judge", "teacher") if options.from_scratch else ():
    with clock.measure(name):
      if _train(configs[name], options.workdir / name) == "interrupted":
        return False

  for method in options.methods:
    say(f"3/4  Student: {comparison.METHODS[method]} of the teacher")
    folder = _folder(options, method)
    with clock.measure("distillation" if method == "idlm" else f"{method} distillation"):
      if _train(configs[method], folder) == "interrupted":
        return False
    source = places.network_directory(str(folder))
    with remote.publish(_student(options, method)) as fresh:
      shutil.copytree(source, fresh, dirs_exist_ok=True)

  say("4/4  Frontier: quality of teacher and students against network evaluations")
  config = configs[options.methods[0]]
  comparison.write(
    options.workdir, _compared(options, config), lambda _: _held_out(config, options.samples), clock
  )
  say(f"\n{(options.workdir / 'summary.txt').read_text()}")
  return True


def _folder(options: Options, method: str) -> pathlib.Path:
  return options.workdir / ("distillation" if method == "idlm" else f"distillation_{method}")


def _student(options: Options, method: str) -> pathlib.Path:
  return options.workdir / ("student" if method == "idlm" else f"student_{method}")


def _configs(options: Options) -> dict:
  """Return the configs of judge, teacher and of the student of every method, with overrides."""
  workdir = options.workdir
  ours = {"data.directory": str(workdir / "data")}
  if options.from_scratch:
    ours |= {
      "data.tokenizer": "bpe:2048",
      "teacher.path": str(workdir / "teacher"),
      "evaluate.judge": str(workdir / "judge"),
    }
  configs = {
    method: load_config(f"quickstart_{method}", ours | _meant(options, method))
    for method in options.methods
  }
  student = configs[options.methods[0]]
  for name, steps in (("judge", options.judge_steps), ("teacher", options.teacher_steps)):
    fields = {
      "data.directory": student.data.directory,
      "data.tokenizer": student.data.tokenizer,
      "train.steps": str(steps),
      "optim.warmup": str(min(200, steps // 10)),
      "evaluate.every": str(max(steps // 5, 1)),
    }
    shared = {k: v for k, v in options.overrides.items() if _reaches(k, name)}
    configs[name] = load_config(f"quickstart_{name}:cpu", fields | shared)
  for name, config in configs.items():
    read = plan.read(config)  # what is wrong with one is said now
    if options.from_scratch or name in options.methods:
      build.experiment(read, build.vocabulary(read))
  return configs


def _reaches(field: str, name: str) -> bool:
  """Return whether an override of a student's field is also one of the teacher or the judge."""
  group, _, rest = field.partition(".")
  if name == "judge" and group == "process":
    return False  # a judge has none
  if name == "judge" and group == "model":
    return rest in _judge_fields()
  return group in _SHARED


@functools.cache
def _judge_fields() -> tuple[str, ...]:
  """Return the fields of `config.model` that the judge has."""
  name = load_config("quickstart_judge:cpu").model.name
  return plan.network_fields(families.named(name))


def _meant(options: Options, method: str) -> dict[str, str]:
  """Return the overrides that a student's config has; a field of another method is not meant."""
  fields = {m: set(load_config(f"quickstart_{m}").objective) for m in options.methods}
  others = set().union(*fields.values()) - fields[method]
  return {k: v for k, v in options.overrides.items() if k.removeprefix("objective.") not in others}


def _train(config, workdir: pathlib.Path) -> str:
  """Train unless it is finished; return how it ended."""
  done, resolved = workdir / "done.json", json_file.parse(config.to_json())
  if done.exists():
    finished = _finished(done)
    if finished["config"] != resolved:
      raise InputError(f"{workdir} was finished with other options; choose another --workdir.")
    return finished["reason"]
  result = train(config, workdir, label=workdir.name)
  if result.reason != "interrupted":
    write_json(done, {"reason": result.reason, "step": result.step, "config": resolved})
  return result.reason


def _finished(file: pathlib.Path) -> dict:
  """Return what `_train` wrote at the end."""
  advice = "move it away, and run again to finish that part once more"
  try:
    content = json_file.read_object(file)
    return fields.read("", content, {"config": fields.Object(), "reason": fields.Text()})
  except (OSError, ValueError) as error:
    problem = getattr(error, "strerror", None) or error
    raise InputError(f"{file} is not what a finished part leaves ({problem}); {advice}.") from None


def _compared(options: Options, config) -> comparison.Comparison:
  """Return what the last part compares."""
  alone = len(options.methods) == 1
  names = {method: "student" if alone else method for method in options.methods}
  source = "trained here from scratch" if options.from_scratch else "shipped with the package"
  return comparison.Comparison(
    teacher=config.teacher.path,
    students={names[method]: str(_student(options, method)) for method in options.methods},
    methods={names[method]: comparison.METHODS[method] for method in options.methods},
    judge=config.evaluate.judge,
    told=f"{_TOLD} Teacher and judge: {source}.",
    max_entropy_drop=config.evaluate.max_entropy_drop,
    nfes=options.nfes,
    exact=True,
    samples=options.samples,
    shown=options.shown,
    shown_nfe=options.shown_nfe,
    command=comparison.command(options),
    seed=config.seed,
  )


def _held_out(config, samples: int) -> np.ndarray:
  """Return the first validation sequences, [N, L]."""
  dataset = builder.open_dataset(config.data.directory)
  count = min(max(samples, 256), dataset.info.splits["validation"].records)
  batches = loader.evaluation_batches(dataset, "validation", count, 1)
  return np.concatenate([record["tokens"] for record in batches])
