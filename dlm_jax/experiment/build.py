# SPDX-License-Identifier: Apache-2.0
"""From a plan to the things it names.

What can be wrong with a configuration is found in `plan` and here, before anything is compiled.
"""

import dataclasses
import inspect
import typing
from typing import Any

import jax

from dlm_jax import mesh, objectives, process, remote
from dlm_jax.convert import places
from dlm_jax.data import builder, sources, tokenizers
from dlm_jax.errors import InputError
from dlm_jax.experiment.plan import Data, Plan, bpe_size
from dlm_jax.train import optim


def make_tokenizer(data: Data, source: sources.Source) -> tokenizers.Tokenizer:
  """Return the tokenizer that the data names; "bpe:SIZE" trains one on the corpus."""
  name = data.tokenizer
  if (size := bpe_size(name)) is None:
    return tokenizers.load(places.shipped(name))
  return tokenizers.train_bpe(source.documents("train"), size)


def prepare(data: Data, progress: bool = True) -> builder.Prepared:
  """Tokenise and pack a corpus into its directory."""
  if not data.directory:
    raise InputError("data.directory is empty; say where to write: --config.data.directory=DIR.")
  source = sources.open_source(data.source, **data.options)
  return builder.prepare(
    source,
    make_tokenizer(data, source),
    data.length,
    data.directory,
    packing=data.packing,
    buckets=data.buckets,
    block_length=data.block_length,
    progress=progress,
  )


def vocabulary(plan: Plan) -> int:
  """Return the tokens of the data without the mask: as prepared, else as the plan says."""
  data, family, mask_id = plan.data, plan.model.family, plan.process.mask_id
  if data.directory and remote.exists(data.directory):
    return builder.open_dataset(data.directory).info.vocab_size
  if plan.model.vocab_size:
    more = family.pad_row or family.has_mask_row(plan.process.name)
    return mask_id if mask_id >= 0 else plan.model.vocab_size - more
  if (size := bpe_size(data.tokenizer)) is not None:
    return size
  return tokenizers.load(places.shipped(data.tokenizer)).vocab_size


def make_model(plan: Plan, vocab_size: int) -> Any:
  """Build the network; `vocab_size` is what the data needs, the mask not included.

  How many rows its vocabulary has beside these, and what sizes left at 0 are, its family says.
  """
  family = plan.model.family
  masked = family.has_mask_row(plan.process.name)
  needed = vocab_size + masked
  asked = plan.model.vocab_size or needed
  if not family.fits(asked, vocab_size, masked):
    raise InputError(f"model.vocab_size={asked}, but the data needs {needed}; use {needed} or 0.")
  fields = family.complete(plan.model.fields)
  try:
    return family.network(family.options(vocab_size=asked, length=plan.data.length, **fields))
  except ValueError as error:
    raise InputError(str(error)) from None


def make_process(plan: Plan, model: Any, blocked: tuple[int, ...] = ()) -> process.Process | None:
  """Build the forward process; None for a network without one, or if "none" is asked for.

  An absorbing one never predicts the blocked ids.
  """
  noise, family = plan.process, plan.model.family
  name, mask_id, schedule = noise.name, noise.mask_id, noise.schedule
  if schedule is None:
    return None
  size = model.config.vocab_size
  if name not in process.MASKED:
    if not getattr(model.config, "time_conditioning", False):
      raise InputError(f"process.name={name!r} needs model.time_conditioning=True.")
    if blocked:
      raise InputError(
        f"process.name={name!r} would draw the special ids of this data; use 'absorbing'."
      )
    return process.NAMES[name](vocab_size=size, schedule=schedule)
  if mask_id >= 0 and not family.spare_rows:
    raise InputError(f"process.mask_id={mask_id}: only of a decoder can it be any but the last id.")
  mask_id = mask_id if mask_id >= 0 else size - 1
  try:
    return process.NAMES[name](
      vocab_size=size, mask_id=mask_id, schedule=schedule, blocked=tuple(blocked)
    )
  except ValueError as error:
    raise InputError(f"process.{error}") from None


def make_objective(plan: Plan, model, proc) -> objectives.Objective:
  """Build the training method for a network and a process."""
  name, options, module = plan.objective.name, plan.objective.options, plan.objective.module
  classes = getattr(module, "NETWORK", None) or _annotated(module.make)
  if classes and not isinstance(model, classes):
    names = " or a ".join(c.__name__ for c in classes)
    raise InputError(
      f"objective.name={name!r} trains a {names}, but model.name={plan.model.name!r}."
    )
  if getattr(model.config, "mask_noise", 0) and not getattr(module, "MASK_NOISE", False):
    raise InputError(
      f"objective.name={name!r} trains no noise of masks: model.mask_noise must be 0; use 'idlm'."
    )
  optimizers = optim.for_trees(plan.optim, module.TRAINED, plan.loop.steps)
  arguments = {"model": model, "process": proc, "optimizers": optimizers, **options}
  try:
    if hasattr(module, "Options"):
      module.Options.of(options).check_batch(plan.batch_size)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What a plan describes, built and checked; no parameters and no data yet.

  Attributes:
    plan: what was read from the configuration.
    model, process, objective: built from it.
    mesh: devices.
    rows: (host, hosts), the equal slice of every batch that this process reads.
    shapes: of the train state.
    shardings: of the train state.
  """

  plan: Plan
  model: Any
  process: Any
  objective: objectives.Objective
  mesh: jax.sharding.Mesh
  rows: tuple[int, int]
  shapes: objectives.TrainState
  shardings: Any


def experiment(
  plan: Plan, vocab_size: int, devices=None, blocked: tuple[int, ...] = ()
) -> Experiment:
  """Build everything that needs neither parameters nor data.

  Args:
    plan: of the run.
    vocab_size: tokens of the data, the mask not included.
    devices: all by default.
    blocked: ids of the data that are never predicted: its frames.
  """
  model = make_model(plan, vocab_size)
  if plan.data.block_length and not plan.model.family.several:
    raise InputError(
      f"data.block_length={plan.data.block_length}: several conversations share a row, which "
      f"model.name={plan.model.name!r} cannot keep apart; use a decoder, or prepare with 0."
    )
  proc = make_process(plan, model, blocked)
  objective = make_objective(plan, model, proc)
  inputs = model_inputs(model)
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  shapes = jax.eval_shape(objective.init, jax.random.key(0), params)
  device_mesh = mesh.make(**plan.mesh, devices=devices)
  mesh.check_batch(device_mesh, plan.batch_size, plan.objective.options["accumulate"])
  placed = mesh.param_shardings(device_mesh, model.axes(*inputs), params)
  return Experiment(
    plan=plan,
    model=model,
    process=proc,
    objective=objective,
    mesh=device_mesh,
    rows=mesh.host_rows(device_mesh, plan.batch_size),
    shapes=shapes,
    shardings=mesh.state_shardings(device_mesh, placed, shapes, objective.axes),
  )


def model_inputs(model: Any) -> tuple[jax.Array, ...]:
  """Return arguments to initialise a network with."""
  return model.inputs(model.config.length)
