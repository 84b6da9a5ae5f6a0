# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: train state, data-loader state and resolved configuration, written as one.

A checkpoint becomes visible by a rename when it is complete: a run killed in the middle of a write
finds the one before it. Arrays are stored unsharded in meaning: any device count can restore them.
"""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dlm_jax import json_file, remote
from dlm_jax.errors import InputError

_ITEMS = ("state", "extra")
# What makes a run this run. Of two groups, fields that change speed or frequency alone are free.
_IDENTITY = (
  "data",
  "evaluate",
  "loader",
  "model",
  "objective",
  "optim",
  "process",
  "seed",
  "start",
  "teacher",
)
_FREE = {
  "model": {"attention", "remat", "unroll", "embedding_gradient"},
  "evaluate": {"every", "patience", "batch_size"},
}


class Checkpoints:
  """The checkpoints of one run, newest last; used as a context manager.

  Args:
    directory: created when something is saved.
    keep: how many of the newest to keep.
    config: resolved configuration as JSON-able data, stored beside the checkpoints.
  """

  def __init__(self, directory: epath.PathLike, *, keep: int = 2, config: dict | None = None):
    self.directory = epath.Path(directory)
    if not remote.is_remote(directory):
      self.directory = epath.Path(os.path.abspath(directory))
    self._config = config
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=False, enable_async_checkpointing=True
    )
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      if config is not None and jax.process_index() == 0:
        remote.write_json(self.directory / "config.json", config)
    except OSError as error:
      raise InputError(f"cannot write checkpoints to {self.directory}: {error.strerror}.") from None
    try:
      self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=_ITEMS)
    except ImportError as error:
      raise InputError(
        f"cannot write checkpoints to {self.directory}: {_first_line(error)}; gs:// needs the "
        "packages gcsfs and google-cloud-storage."
      ) from None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_):
    self._manager.wait_until_finished()
    self._manager.close()

  def save(self, step: int, state: Any, extra: dict) -> None:
    """Start writing; returns when the arrays have been copied from the device.

    Args:
      step: completed steps.
      state: a pytree of arrays.
      extra: JSON-able: loader state and the like.
    """
    if step in self._manager.all_steps():
      return
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
    self._manager.save(step, args=items, force=True)

  def wait(self) -> None:
    """Return when everything saved so far is on disk."""
    self._manager.wait_until_finished()

  @property
  def latest(self) -> int | None:
    """Return the newest complete step, or None."""
    return self._manager.latest_step()

  def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict]:
    """Read a checkpoint into the shapes, dtypes and shardings of `like`.

    Args:
      like: a pytree of `jax.ShapeDtypeStruct` with shardings.
      step: which; the newest by default.

    Raises:
      InputError: there is none, or it is damaged or does not fit.
    """
    step = self.latest if step is None else step
    if step is None:
      raise InputError(f"{self.directory} holds no checkpoint.")
    items = ocp.args.Composite(state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore())
    try:
      restored = self._manager.restore(step, args=items)
    except Exception as error:  # Orbax raises many types; all mean the same to a user
      raise InputError(
        f"checkpoint {self.directory / str(step)} cannot be restored: {_first_line(error)}"
      ) from error
    return restored["state"], restored["extra"]


def read_config(directory: epath.PathLike) -> dict:
  """Return the resolved configuration stored in a checkpoint directory.

  Raises:
    InputError: the directory is not one of ours.
  """
  path = epath.Path(directory) / "config.json"
  try:
    return json_file.read_object(path)
  except (OSError, ValueError) as error:
    raise InputError(
      f"{directory} is not a checkpoint directory of dlm_jax: no readable config.json "
      f"({_first_line(error)}); choose another --workdir."
    ) from None


def check_same(workdir: epath.PathLike, config: dict) -> None:
  """Refuse to resume a run under a config that would make it another run.

  Raises:
    InputError: the config stored with its checkpoints differs in more than speed and frequency.
  """
  folder = epath.Path(workdir) / "checkpoints"
  if not (folder / "config.json").exists() or not any(f.name.isdigit() for f in folder.iterdir()):
    return  # nothing was saved yet
  before = read_config(folder)
  for group in _IDENTITY:
    old, new = (_fixed(group, c.get(group)) for c in (before, config))
    if old != new:
      raise InputError(
        f"{workdir} holds a run with another config ({group}); resume it with the same one or "
        "choose another --workdir."
      )


def _fixed(group, fields):
  if not isinstance(fields, dict):
    return fields
  return {key: value for key, value in fields.items() if key not in _FREE.get(group, ())}


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
