# SPDX-License-Identifier: Apache-2.0
"""A configuration, read once: what it says, in frozen parts that the rest of the library takes.

The parts are the groups of `configs/base.py`, which explains every field: `plan.data.length` is
--config.data.length. What is wrong with a configuration alone is found here; what depends on the
data or the devices, in `build`.
"""

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from dlm_jax import json_file, objectives, process, schedules
from dlm_jax.configs.base import base
from dlm_jax.convert import families
from dlm_jax.convert.family import Family
from dlm_jax.errors import InputError, check_choice, hint
from dlm_jax.fields import MOST, SEED, Items, Number, Switch, Text, Whole, shown
from dlm_jax.models.dit import SIZES
from dlm_jax.sample import NOISE_REMOVALS, orders
from dlm_jax.train.loop import LoopConfig
from dlm_jax.train.selection import RULES

MEASURES = ("samples", "likelihood")
_COUNT = Whole(1)
_RANGES = {  # fields whose types alone do not say what they may be; others, what they belong to
  "train": {
    "steps": _COUNT,
    "log_every": _COUNT,
    "checkpoint_every": _COUNT,
    "keep": _COUNT,
    "max_seconds": Number("[0, ∞)"),
  },
  "objective": {"accumulate": _COUNT},
  "evaluate": {
    "every": Whole(0),
    "nfes": Items(Whole(-MOST)),
    "noise_removal": Text(NOISE_REMOVALS),
    "order": Text(("", *orders.NAMES)),
    "select": Text(RULES),
    "temperatures": Items(Number("[0, ∞)")),
    "samples": _COUNT,
    "batch_size": _COUNT,
    "patience": _COUNT,
  },
  "loader": {"batch_size": Whole(-MOST)},
}
_FREE = ("objective", "optim")  # groups with fields of their own, which their classes check
BPE_MOST = 2**20  # tokens of a vocabulary that is trained here; public ones have a quarter of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """The corpus and how it is packed: `config.data`."""

  source: str
  options: dict[str, Any]
  tokenizer: str
  directory: str
  length: int
  packing: str
  buckets: tuple[int, ...]
  block_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """What the network is built from: `config.model`.

  Attributes:
    name: as the config has it.
    family: that the name means.
    vocab_size: 0: what the data needs.
    fields: the others that this family reads.
  """

  name: str
  family: Family
  vocab_size: int
  fields: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
  """The forward process: `config.process`.

  Attributes:
    name: as the config has it.
    mask_id: -1: the last row.
    schedule: None where the network has no process, or is trained without.
  """

  name: str
  mask_id: int
  schedule: schedules.Schedule | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """The training method: `config.objective`.

  Attributes:
    name: as the config has it.
    module: with its `make`, a file of dlm_jax/objectives or a user's own.
    options: of `make`.
  """

  name: str
  module: ModuleType
  options: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """What is measured in training: `config.evaluate`; `measure` is never empty."""

  every: int
  measure: tuple[str, ...]
  judge: str
  nfes: tuple[int, ...]
  noise_removal: str
  order: str
  samples: int
  batch_size: int
  select: str
  temperatures: tuple[float, ...]
  max_entropy_drop: float
  patience: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a run is, before there are data and devices.

  Attributes:
    seed: of parameters, data order, noise and times; of 64 bits.
    data, model, process, objective, evaluate: see their classes.
    optim: of all trees, with a group for each that has options of its own.
    batch_size: sequences per update.
    loop: how long to train, and how often what.
    keep: checkpoints.
    teacher: workdir or model directory that a distillation starts from, or "".
    start: the same of what a training continues from.
    mesh: sizes by axis.
    stored: what a checkpoint keeps of the config, JSON-able.
  """

  seed: int
  data: Data
  model: Network
  process: Noise
  objective: Method
  evaluate: Evaluation
  optim: dict[str, Any]
  batch_size: int
  loop: LoopConfig
  keep: int
  teacher: str
  start: str
  mesh: dict[str, int]
  stored: dict[str, Any]


def read(config: ConfigDict, label: str = "") -> Plan:
  """Read a configuration; the label is for the progress line, by default the method's name.

  Raises:
    InputError: a name is unknown, a number impossible, or a field would do nothing.
  """
  data, c = read_data(config), _checked(config)
  model, train = c["model"], dict(c["train"])
  family, keep = families.named(model["name"]), train.pop("keep")
  known = network_fields(family)
  _check_belonging(c, family, known)
  loop = LoopConfig(
    **train,
    evaluate_every=c["evaluate"]["every"],
    evaluate_start=bool(c["teacher"]["path"] or c["start"]["path"]),
    seed=c["seed"],
    label=label or c["objective"]["name"],
  )
  return Plan(
    seed=c["seed"],
    data=data,
    model=Network(
      name=model["name"],
      family=family,
      vocab_size=model["vocab_size"],
      fields={name: model[name] for name in known if name != "vocab_size"},
    ),
    process=_noise(c["process"], family),
    objective=_method(c["objective"]),
    evaluate=Evaluation(**{**c["evaluate"], "measure": _measures(c)}),
    optim=c["optim"],
    batch_size=c["loader"]["batch_size"],
    loop=loop,
    keep=keep,
    teacher=c["teacher"]["path"],
    start=c["start"]["path"],
    mesh=c["mesh"],
    stored=json_file.parse(config.to_json()),
  )


def read_data(config: ConfigDict) -> Data:
  """Read `config.data` alone: to prepare a corpus takes nothing else.

  Raises:
    InputError: a field of another type or out of range.
  """
  data = _typed("data", config.data.to_dict(), base().data)
  SIZES["length"].check("data.length", data["length"])
  Whole(0, SIZES["length"].most).check("data.block_length", data["block_length"])
  Items(SIZES["length"]).check("data.buckets", data["buckets"])
  bpe_size(data["tokenizer"])
  return Data(**data)


def bpe_size(tokenizer: str) -> int | None:
  """Return the size of a vocabulary that is to be trained, "bpe:SIZE"; None: it is another one.

  Raises:
    InputError: the size is none, or too large.
  """
  kind, _, size = tokenizer.partition(":")
  if kind != "bpe":
    return None
  if not (size.isascii() and size.isdecimal()):
    raise InputError(f"data.tokenizer={shown(tokenizer)}: write bpe:SIZE, e.g. bpe:4096.")
  if len(size) > len(str(BPE_MOST)) or int(size) > BPE_MOST:
    raise InputError(f"data.tokenizer={shown(tokenizer)}: a BPE has at most {BPE_MOST} tokens.")
  return int(size)


def _checked(config) -> dict[str, Any]:
  """Return the fields of a configuration, of the types that `base` gives them, and in range."""
  c, known = config.to_dict(), base()
  c["seed"] = SEED.check("seed", c["seed"])
  for group, given in c.items():
    if group not in ("seed", "data"):
      c[group] = _typed(group, given, known[group])
  for group, kinds in _RANGES.items():
    for name, kind in kinds.items():
      kind.check(f"{group}.{name}", c[group][name])
  if c["evaluate"]["select"] == "matched" and not set(c["evaluate"]["temperatures"]) - {1.0}:
    raise InputError(
      f"evaluate.temperatures={c['evaluate']['temperatures']}: give at least one besides 1, to "
      "select at matched entropy, e.g. 0.7,0.8,0.9,1.0,1.1."
    )
  for name, rows, length in (
    ("loader.batch_size", c["loader"]["batch_size"], c["data"]["length"]),
    ("evaluate.batch_size", c["evaluate"]["batch_size"], c["data"]["length"]),
  ):
    if isinstance(length, int) and rows * length > MOST:
      raise InputError(
        f"{name}={rows} × data.length={length} are more than {MOST} tokens; use at most "
        f"{MOST // length}."
      )
  return c


def _typed(group: str, given: dict[str, Any], known: ConfigDict) -> dict[str, Any]:
  """Return a group with every field of the type that it has in `base`."""
  kinds = {bool: Switch(), int: Whole(-MOST), float: Number(), str: Text(), tuple: Items()}
  found = dict(given)
  for name, default in known.items():
    if type(default) in kinds and (group not in _FREE or given[name] is not None):
      found[name] = kinds[type(default)].check(f"{group}.{name}", given[name])
  _check_finite(group, found)
  return found


def _check_finite(name: str, value: Any) -> None:
  """Raise InputError at a number that no file could keep, in fields that are checked later, too."""
  if isinstance(value, dict):
    for key, inner in value.items():
      _check_finite(f"{name}.{key}", inner)
  elif isinstance(value, tuple):
    for i, inner in enumerate(value):
      _check_finite(f"{name}[{i}]", inner)
  elif isinstance(value, float):
    Number().check(name, value)


def _noise(c, family) -> Noise:
  """Return the process with its schedule."""
  name, schedule = c["name"], None
  if family.processes and not (name == "none" and name in family.processes):
    if name not in process.NAMES:
      raise InputError(
        f"process.name={name!r} is unknown{hint(name, process.NAMES)}; found: "
        f"{', '.join(process.NAMES)}."
      )
    power = {"power": c["power"]} if c["schedule"] == "polynomial" else {}
    try:
      schedule = schedules.make(c["schedule"], eps=c["eps"], **power)
    except ValueError as error:
      raise InputError(f"process.{error}") from None
  return Noise(name=name, mask_id=c["mask_id"], schedule=schedule)


def list_objectives() -> list[str]:
  """Return the names of the packaged training methods: what in the folder has a `make`."""
  names = sorted(module.name for module in pkgutil.iter_modules(objectives.__path__))
  modules = {name: importlib.import_module(f"dlm_jax.objectives.{name}") for name in names}
  return [name for name, module in modules.items() if hasattr(module, "make")]


def _method(c) -> Method:
  """Return the training method that is named, with its options."""
  name, options = c["name"], {key: value for key, value in c.items() if key != "name"}
  if "." in name:
    try:
      module = importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
      told = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
      told = " ".join(told.split()).rstrip(".")
      raise InputError(f"objective.name={name!r} cannot be imported: {told}.") from None
    if not callable(getattr(module, "make", None)) or not hasattr(module, "TRAINED"):
      raise InputError(
        f"objective.name={name!r} is no training method: it has no make and TRAINED; see the files "
        "of dlm_jax/objectives."
      )
    return Method(name=name, module=module, options=options)
  known = list_objectives()
  if name not in known:
    raise InputError(
      f"objective.name={name!r} is not a file in dlm_jax/objectives; found: {', '.join(known)}."
      + hint(name, known)
    )
  module = importlib.import_module(f"dlm_jax.objectives.{name}")
  return Method(name=name, module=module, options=options)


def _measures(c) -> tuple[str, ...]:
  """Return what is measured: `evaluate.measure`, else what suits the method."""
  measure = Items(Text()).check("evaluate.measure", c["evaluate"]["measure"])
  asked, teacher = measure, c["teacher"]["path"]
  if not asked:
    return ("samples",) if teacher else ("likelihood",)
  for name in asked:
    check_choice("evaluate.measure", name, MEASURES)
  if len(set(asked)) < len(asked):
    raise InputError(f"evaluate.measure={asked} names one twice; name each once.")
  if "samples" in asked and not teacher:
    raise InputError(
      "evaluate.measure: samples are compared with a teacher's, and teacher.path is empty; use "
      "likelihood."
    )
  return asked


# --- fields that would do nothing -----------------------------------------------------------------


def network_fields(family: Family) -> tuple[str, ...]:
  """Return the fields of `config.model` that a network reads, its name not among them."""
  own = {field.name for field in dataclasses.fields(family.options)}
  if "mlp_dim" in own:
    own.add("mlp_ratio")  # where mlp_dim is 0
  return tuple(field for field in base().model if field in own)


def _process_fields(c, family, every) -> tuple[str, ...]:
  """Return the fields of `config.process`, of all there are, that network and process read."""
  name = c["name"]
  if not family.processes:
    return ("name",) if name == "none" else ()
  if name == "none":  # before a training with a mask, which reads them all
    return tuple(every)
  mask_id = ("mask_id",) if name in process.MASKED or name not in process.NAMES else ()
  power = ("power",) if c["schedule"] == "polynomial" else ()
  return ("name", *mask_id, "schedule", *power, "eps")


def _check_belonging(c, family, known) -> None:
  """Raise InputError if a field is set that the network or the process does not read."""
  model, noise, default = c["model"], c["process"], base()
  network = f"model.name={model['name']!r}"
  owner = f"process.name={noise['name']!r}, process.schedule={noise['schedule']!r}"
  _check_group("model", model, default.model, ("name", *known), network)
  owner = owner if family.processes else network
  read_of_noise = _process_fields(noise, family, default.process)
  _check_group("process", noise, default.process, read_of_noise, owner)


def _check_group(group, fields, unset, belong, owner):
  """Complain about a field that would do nothing, unless it has the value it has unset."""
  for field, default in unset.items():
    if field not in belong and fields[field] != default:
      others = f"; fields that belong to it: {', '.join(belong)}" if belong else ""
      raise InputError(
        f"{group}.{field}={fields[field]!r} does nothing with {owner}; leave it at {default!r}"
        f"{others}."
      )
