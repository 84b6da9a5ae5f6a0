# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the things it names.

Everything that can be wrong with a configuration is found here, before anything is compiled.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from dlm_jax import mesh, objectives, process, remote, schedules
from dlm_jax.convert import families, places
from dlm_jax.data import builder, sources, tokenizers
from dlm_jax.errors import InputError, hint
from dlm_jax.experiment import belonging
from dlm_jax.train import optim
from dlm_jax.train.loop import LoopConfig


def open_source(config: ConfigDict) -> sources.Source:
  """Open the corpus named by `config.data`."""
  return sources.open_source(config.data.source, **config.data.options.to_dict())


def make_tokenizer(config: ConfigDict, source: sources.Source) -> tokenizers.Tokenizer:
  """Return the tokenizer named by `config.data.tokenizer`; "bpe:SIZE" trains one on the corpus."""
  name = config.data.tokenizer
  if not name.startswith("bpe:"):
    return tokenizers.load(places.shipped(name))
  if not name[4:].isdigit():
    raise InputError(f"data.tokenizer={name!r}: write bpe:SIZE, e.g. bpe:4096.")
  return tokenizers.train_bpe(source.documents("train"), int(name[4:]))


def prepare(config: ConfigDict, progress: bool = True) -> builder.Prepared:
  """Tokenise and pack the corpus of a config into `config.data.directory`."""
  if not config.data.directory:
    raise InputError("data.directory is empty; say where to write: --config.data.directory=DIR.")
  source = open_source(config)
  tokenizer = make_tokenizer(config, source)
  return builder.prepare(
    source,
    tokenizer,
    config.data.length,
    config.data.directory,
    packing=config.data.packing,
    buckets=config.data.buckets,
    block_length=config.data.block_length,
    progress=progress,
  )


def vocabulary(config: ConfigDict) -> int:
  """Return the tokens of a config's data without the mask: as prepared, else as the config says."""
  if config.data.directory and remote.exists(config.data.directory):
    return builder.open_dataset(config.data.directory).info.vocab_size
  if config.model.vocab_size:
    family = families.named(config.model.name)
    more = family.pad_row or family.has_mask_row(config.process.name)
    return config.process.mask_id if config.process.mask_id >= 0 else config.model.vocab_size - more
  if config.data.tokenizer.startswith("bpe:"):
    return int(config.data.tokenizer[4:])
  return tokenizers.load(places.shipped(config.data.tokenizer)).vocab_size


def make_model(config: ConfigDict, vocab_size: int) -> Any:
  """Build the network; `vocab_size` is what the data needs, the mask not included.

  How many rows its vocabulary has beside these, and what sizes left at 0 are, its family says.
  """
  options, family = config.model.to_dict(), families.named(config.model.name)
  masked = family.has_mask_row(config.process.name)
  needed = vocab_size + masked
  asked = options["vocab_size"] or needed
  if not family.fits(asked, vocab_size, masked):
    raise InputError(f"model.vocab_size={asked}, but the data needs {needed}; use {needed} or 0.")
  belonging.check_model(config, family.options)
  known = belonging.of_network(family.options)
  fields = family.complete({key: value for key, value in options.items() if key in known})
  fields |= {"vocab_size": asked, "length": config.data.length}
  try:
    return family.network(family.options(**fields))
  except ValueError as error:
    raise InputError(str(error)) from None


def make_process(
  config: ConfigDict, model: Any, blocked: tuple[int, ...] = ()
) -> process.Process | None:
  """Build the forward process; None for a network without one, or if "none" is asked for.

  An absorbing one never predicts the blocked ids.
  """
  name, family = config.process.name, families.of(model)
  belonging.check_process(config)
  if not family.processes or (name == "none" and name in family.processes):
    return None
  if name not in process.NAMES:
    known = ", ".join(process.NAMES)
    raise InputError(
      f"process.name={name!r} is unknown{hint(name, process.NAMES)}; found: {known}."
    )
  size = model.config.vocab_size
  try:
    power = {"power": config.process.power} if config.process.schedule == "polynomial" else {}
    schedule = schedules.make(config.process.schedule, eps=config.process.eps, **power)
  except ValueError as error:
    raise InputError(f"process.{error}") from None
  if name not in process.MASKED:
    if not getattr(model.config, "time_conditioning", False):
      raise InputError(f"process.name={name!r} needs model.time_conditioning=True.")
    if blocked:
      raise InputError(
        f"process.name={name!r} would draw the special ids of this data; use 'absorbing'."
      )
    return process.NAMES[name](vocab_size=size, schedule=schedule)
  mask_id = config.process.mask_id
  if mask_id >= 0 and not family.spare_rows:
    raise InputError(f"process.mask_id={mask_id}: only of a decoder can it be any but the last id.")
  mask_id = mask_id if mask_id >= 0 else size - 1
  try:
    return process.NAMES[name](
      vocab_size=size, mask_id=mask_id, schedule=schedule, blocked=tuple(blocked)
    )
  except ValueError as error:
    raise InputError(f"process.{error}") from None


def list_objectives() -> list[str]:
  """Return the names of the packaged training methods: what in the folder has a `make`."""
  names = sorted(module.name for module in pkgutil.iter_modules(objectives.__path__))
  modules = {name: importlib.import_module(f"dlm_jax.objectives.{name}") for name in names}
  return [name for name, module in modules.items() if hasattr(module, "make")]


def make_objective(config: ConfigDict, model, proc) -> objectives.Objective:
  """Build the training method: a file of dlm_jax/objectives, or a user's own module."""
  options = config.objective.to_dict()
  name = options.pop("name")
  if "." in name:
    try:
      module = importlib.import_module(name)
    except ImportError as error:
      raise InputError(f"objective.name={name!r} cannot be imported: {error}.") from None
  else:
    known = list_objectives()
    if name not in known:
      raise InputError(
        f"objective.name={name!r} is not a file in dlm_jax/objectives; found: {', '.join(known)}."
        + hint(name, known)
      )
    module = importlib.import_module(f"dlm_jax.objectives.{name}")
  classes = getattr(module, "NETWORK", None) or _annotated(module.make)
  if classes and not isinstance(model, classes):
    names = " or a ".join(c.__name__ for c in classes)
    raise InputError(
      f"objective.name={name!r} trains a {names}, but model.name={config.model.name!r}."
    )
  optimizers = {
    tree: optim.make(rates, config.train.steps)
    for tree, rates in optim.per_tree(config.optim.to_dict(), module.TRAINED).items()
  }
  arguments = {"model": model, "process": proc, "optimizers": optimizers, **options}
  try:
    if hasattr(module, "Options"):
      module.Options.of(options).check_batch(config.loader.batch_size)
    inspect.signature(module.make).bind(**arguments)
  except (TypeError, ValueError) as error:  # of the call: one raised inside `make` keeps its trace
    raise InputError(f"objective {name!r}: {error}") from None
  try:
    return module.make(**arguments)
  except ValueError as error:
    raise InputError(f"objective {name!r}: {error}") from None


def _annotated(make) -> tuple[type, ...]:
  """Return the classes of networks that a `make` without a fact NETWORK beside it asks for."""
  wanted = typing.get_type_hints(make).get("model")
  classes = typing.get_args(wanted) or (wanted,)
  return classes if all(isinstance(c, type) for c in classes) else ()


def loop_config(config: ConfigDict, label: str = "train") -> LoopConfig:
  """Return how long to train and how often to do what."""
  for field in ("steps", "log_every", "checkpoint_every", "keep"):
    if config.train[field] < 1:
      raise InputError(f"train.{field}={config.train[field]} must be at least 1.")
  if config.evaluate.every < 0:
    raise InputError(f"evaluate.every={config.evaluate.every} is negative; 0 evaluates never.")
  return LoopConfig(
    steps=config.train.steps,
    log_every=config.train.log_every,
    checkpoint_every=config.train.checkpoint_every,
    evaluate_every=config.evaluate.every,
    seed=config.seed,
    max_seconds=config.train.max_seconds,
    label=label,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What a config describes, built and checked; no parameters and no data yet.

  Attributes:
    config: the resolved configuration.
    model, process, objective: built from it.
    mesh: devices.
    shapes: of the train state.
    shardings: of the train state.
  """

  config: FrozenConfigDict
  model: Any
  process: Any
  objective: objectives.Objective
  mesh: jax.sharding.Mesh
  shapes: objectives.TrainState
  shardings: Any


def experiment(
  config: ConfigDict, vocab_size: int, devices=None, blocked: tuple[int, ...] = ()
) -> Experiment:
  """Build everything that needs neither parameters nor data.

  Args:
    config: locked.
    vocab_size: tokens of the data, the mask not included.
    devices: all by default.
    blocked: ids of the data that are never predicted: its frames.
  """
  for group, field in (
    ("objective", "accumulate"),
    ("evaluate", "samples"),
    ("evaluate", "batch_size"),
    ("evaluate", "patience"),
  ):
    if config[group][field] < 1:
      raise InputError(f"{group}.{field}={config[group][field]} must be at least 1.")
  device_mesh = mesh.make(**config.mesh.to_dict(), devices=devices)
  mesh.check_batch(device_mesh, config.loader.batch_size, config.objective.accumulate)
  model = make_model(config, vocab_size)
  if config.data.block_length and not families.of(model).several:
    raise InputError(
      f"data.block_length={config.data.block_length}: several conversations share a row, which "
      f"model.name={config.model.name!r} cannot keep apart; use a decoder, or prepare with 0."
    )
  proc = make_process(config, model, blocked)
  objective = make_objective(config, model, proc)
  inputs = model_inputs(model)
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  shapes = jax.eval_shape(objective.init, jax.random.key(0), params)
  placed = mesh.param_shardings(device_mesh, model.axes(*inputs), params)
  return Experiment(
    config=FrozenConfigDict(config),
    model=model,
    process=proc,
    objective=objective,
    mesh=device_mesh,
    shapes=shapes,
    shardings=mesh.state_shardings(device_mesh, placed, shapes, objective.axes),
  )


def model_inputs(model: Any) -> tuple[jax.Array, ...]:
  """Return arguments to initialise a network with."""
  return model.inputs(model.config.length)
