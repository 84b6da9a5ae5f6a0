# SPDX-License-Identifier: Apache-2.0
"""Run a configured experiment: data, state, loop, evaluation, export."""

import contextlib
import importlib.util
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dlm_jax import convert, disk, mesh, remote
from dlm_jax.convert import places, writing
from dlm_jax.data import builder, loader, tokenizers
from dlm_jax.errors import InputError
from dlm_jax.evaluate.judge import check_tokenizer
from dlm_jax.experiment import build, evaluators
from dlm_jax.experiment import plan as plans
from dlm_jax.experiment.build import Experiment
from dlm_jax.objectives import TrainState, output_params
from dlm_jax.train import checkpoint, loop
from dlm_jax.train.checkpoint import Checkpoints
from dlm_jax.train.writers import Writer


def train(
  config: ConfigDict, workdir: str | os.PathLike, *, label: str = "", wandb: str = ""
) -> loop.Result:
  """Train what a config describes; called again on the same workdir it resumes.

  Writes to `workdir`: config.json, metrics.jsonl, tensorboard/, checkpoints/, `final/` (the trained
  network with its tokenizer, in the Hugging Face layout) and, with evaluation, `best/`.

  Args:
    config: is read once, see `plan.Plan`.
    workdir: created if needed.
    label: shown in the progress line; default: the objective's name.
    wandb: project to log to.

  Raises:
    InputError: anything the user can fix; nothing is left half-written.
  """
  workdir = epath.Path(workdir)
  if wandb and importlib.util.find_spec("wandb") is None:
    raise InputError(
      f"--wandb_project={wandb} needs the package wandb; install it or leave it out."
    )
  plan = plans.read(config, label)
  dataset = open_data(plan.data)
  tokenizer = dataset.tokenizer()
  built = build.experiment(plan, tokenizer.vocab_size, blocked=tokenizer.given_ids)
  _check_room(built)
  given = load_start(built, tokenizer)
  if given is None:
    given = load_teacher(built, tokenizer)
  evaluator = evaluators.chosen(built, dataset, lambda *where: export(*where, tokenizer), workdir)
  stream = loader.make(
    dataset,
    "train",
    batch_size=plan.batch_size,
    seed=plan.seed,
    host=built.rows[0],
    hosts=built.rows[1],
    together=built.objective.batches,
  )
  folder = workdir / "checkpoints"
  held = _held(workdir, plan.stored)
  with held, Checkpoints(folder, keep=plan.keep, config=plan.stored) as checkpoints:
    state = loop.start(
      built.objective,
      given,
      stream,
      seed=plan.seed,
      shapes=built.shapes,
      shardings=built.shardings,
      checkpoints=checkpoints,
      evaluator=evaluator,
    )
    with Writer(workdir, resume_from=int(state.step), wandb_project=wandb) as writer:
      result = loop.run(
        built.objective,
        state,
        stream,
        config=plan.loop,
        rows=built.rows,
        shardings=built.shardings,
        checkpoints=checkpoints,
        writer=writer,
        evaluator=evaluator,
      )
  if result.reason != "interrupted":
    export(workdir / "final", built, result.state, result.step, tokenizer)
  return result


def _check_room(built: Experiment) -> None:
  """Refuse a run whose state, or whose smallest batch, is more than the memory there is."""
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(built.shapes))
  mesh.check_room(f"model.dim={built.model.config.dim} and the other sizes of model", size)
  accumulate, length = built.plan.objective.options["accumulate"], built.plan.data.length
  rows = built.plan.batch_size // accumulate
  what = f"loader.batch_size={built.plan.batch_size} sequences of data.length={length}"
  mesh.check_room(what, 4 * rows * length * built.model.config.dim)


def open_data(data: plans.Data) -> builder.Dataset:
  """Open the packed dataset of a plan; tells how to make it if it is not there."""
  directory = data.directory
  if not directory or not remote.exists(directory):
    raise InputError(
      f"data.directory={directory!r} does not exist; write it first with "
      "`dlm-jax prepare` and the same --config."
    )
  dataset = builder.open_dataset(directory)
  if dataset.info.length != data.length:
    raise InputError(
      f"data.length={data.length}, but {directory} holds sequences of "
      f"{dataset.info.length} tokens; use that or prepare another directory."
    )
  info, asked = dataset.info, data.buckets
  if info.packing == "documents":
    asked = tuple(asked) or (data.length,)
  if (info.packing, info.buckets) != (data.packing, asked):
    raise InputError(
      f"data.packing={data.packing!r} with data.buckets={asked}, but {directory} was "
      f"prepared with {info.packing!r} and {info.buckets}; use that or prepare another directory."
    )
  if info.block_length != data.block_length:
    raise InputError(
      f"data.block_length={data.block_length}, but {directory} was prepared with "
      f"{info.block_length}; use that or prepare another directory."
    )
  return dataset


def make_workdir(workdir: epath.PathLike) -> None:
  """Create a workdir and check that files can be written there."""
  workdir = epath.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".write_test_{jax.process_index()}"
    probe.write_text("")
    probe.unlink(missing_ok=True)
  except OSError as error:
    raise InputError(f"workdir {workdir} cannot be written: {error.strerror}.") from None


@contextlib.contextmanager
def _held(workdir: epath.Path, stored: dict[str, Any]) -> Iterator[None]:
  """Hold a workdir as the only run in it, once it can be written and is of the same run."""
  make_workdir(workdir)
  for name in ("best", "final"):
    writing.check_place(workdir / name)
  checkpoint.check_same(workdir, stored)
  if remote.is_remote(workdir) or jax.process_index():
    yield  # a store has no locks
    return
  with disk.alone(pathlib.Path(workdir) / "checkpoints"):
    yield


def load_teacher(built: Experiment, tokenizer: tokenizers.Tokenizer) -> Any:
  """Return the teacher's parameters, or None if the plan names none.

  Raises:
    InputError: its network or its tokenizer is not the one of this run.
  """
  if not built.plan.teacher:
    if "teacher" in built.shapes.trees:
      raise InputError(
        f"objective.name={built.plan.objective.name!r} distils a teacher; name it with "
        "--config.teacher.path=DIR."
      )
    return None
  network = _open(built.plan.teacher, built, tokenizer)
  whose = f"the teacher {network.source}"
  if network.process != built.process:
    raise InputError(f"the process is {built.process}, but {whose} had {network.process}.")
  _check_same_network(built.model, network.model, whose)
  return network.params


def _open(path, built, tokenizer) -> convert.Network:
  """Open a network of the tokens of this run; its parameters are read into the run's shardings."""
  network = convert.open_network(places.network_directory(path), mesh=built.mesh)
  check_tokenizer(network, tokenizer)
  if getattr(network.model.config, "mask_noise", 0):
    raise InputError(
      f"{network.source} is a student whose masks carry noise; it can be sampled from, but neither "
      "taught by nor trained on."
    )
  return network


def load_start(built: Experiment, tokenizer: tokenizers.Tokenizer) -> Any:
  """Return the parameters that a training continues from, or None if the plan names none.

  A decoder may have been trained otherwise: blocks start from a next-token network.

  Raises:
    InputError: its network or its tokenizer is not the one of this run, or the run distils.
  """
  if not built.plan.start:
    return None
  if "teacher" in built.shapes.trees or built.plan.teacher:
    raise InputError(
      f"start.path={built.plan.start!r}: a distillation starts from its teacher; name that with "
      "--config.teacher.path=DIR."
    )
  network = _open(built.plan.start, built, tokenizer)
  _check_same_network(built.model, network.model, str(network.source))
  masks = [getattr(p, "mask_id", None) for p in (built.process, network.process)]
  if "none" in network.family.processes:
    if None not in masks and masks[0] != masks[1]:
      raise InputError(f"process.mask_id={masks[0]}, but {network.source} has {masks[1]}.")
  elif network.process != built.process:
    raise InputError(f"the process is {built.process}, but {network.source} had {network.process}.")
  return network.params


_SHAPE = (
  "vocab_size",
  "dim",
  "layers",
  "heads",
  "cond_dim",
  "mlp_ratio",
  "time_conditioning",
  "kv_heads",
  "head_dim",
  "mlp_dim",
  "rope_theta",
  "yarn",
  "eps",
  "tied",
  "experts",
  "experts_per_token",
  "expert_dim",
)


def _check_same_network(ours, theirs, whose: str):
  """Refuse a network of another class or size."""
  if type(ours) is not type(theirs):
    raise InputError(
      f"model.name means a {type(ours).__name__}; {whose} is a {type(theirs).__name__}."
    )
  for field in _SHAPE:
    mine, other = (getattr(m.config, field, None) for m in (ours, theirs))
    if mine != other and not (field == "mlp_dim" and ours.config.experts):
      raise InputError(f"model.{field}={mine}, but {whose} has {other}.")


def export(
  directory: epath.PathLike,
  built: Experiment,
  state: TrainState,
  step: int,
  tokenizer: tokenizers.Tokenizer,
) -> None:
  """Write the network to sample from, with its tokenizer, in the Hugging Face layout."""
  params, given = output_params(state, built.objective), dict(built.objective.export(state))
  beside = given.pop("beside", {})
  if jax.process_count() > 1:
    params, beside = multihost_utils.process_allgather((params, beside), tiled=True)
  if jax.process_index() == 0:
    facts = {
      "tokenizer_fingerprint": tokenizer.fingerprint,
      "objective": built.plan.objective.name,
      "step": step,
      **({"buckets": list(built.plan.data.buckets)} if built.plan.data.buckets else {}),
    }
    given["extra"] = {**facts, **given.get("extra", {})}
    params, beside = jax.device_get((params, beside))
    given |= {"beside": beside, "tokenizer": tokenizer}
    convert.save(directory, built.model, params, built.process, **given)
