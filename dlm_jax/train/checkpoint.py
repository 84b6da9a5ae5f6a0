# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: train state, data-loader state and resolved configuration, written as one.

A checkpoint becomes visible by a rename when it is complete: a run killed in the middle of a write
finds the one before it. Arrays are stored unsharded in meaning: any device count can restore them.

Orbax keeps no sums of values, so ours lie in every checkpoint, see `checksums`; what is restored
must give them again. On accelerators that costs one reading of the state from their memory; on a
processor 2 seconds per GB, measured on one core of a busy machine.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from dlm_jax import disk, json_file, remote
from dlm_jax import mesh as meshes
from dlm_jax.errors import InputError
from dlm_jax.train import checksums

_ITEMS = ("state", "extra")
# What says nothing of a checkpoint itself: the same may work later, or on a larger machine.
_PASSING = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
_PASSING += ("PERMISSION_DENIED", "UNAUTHENTICATED", "Permission denied", "Input/output error")
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
    self._config, self._damaged, self._failed = config, [], False
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
      with _unheard():
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=_ITEMS)
    except ImportError as error:
      raise InputError(
        f"cannot write checkpoints to {self.directory}: {_first_line(error)}; gs:// needs the "
        "packages gcsfs and google-cloud-storage."
      ) from None

  def __enter__(self) -> "Checkpoints":
    logging.get_absl_logger().addFilter(_is_news)
    self._hook, sys.unraisablehook = sys.unraisablehook, self._tell
    return self

  def __exit__(self, kind, *_):
    problem = None
    for finish in (self._manager.wait_until_finished, self._manager.close):
      try:
        with self._writing():
          finish()
      except Exception as error:  # the manager is closed all the same
        problem = problem or error
    logging.get_absl_logger().removeFilter(_is_news)
    if not self._failed:
      sys.unraisablehook = self._hook
    if problem is not None and kind is None:  # what comes first is said
      raise problem

  def _tell(self, unraisable):
    """Say nothing of what still ends after one file has failed and closed the loop of all."""
    if str(unraisable.exc_value) != "Event loop is closed":
      self._hook(unraisable)

  def save(self, step: int, state: Any, extra: dict) -> None:
    """Start writing; returns when the arrays have been copied from the device.

    Damaged checkpoints that `restore` passed over go first.

    Args:
      step: completed steps.
      state: a pytree of arrays.
      extra: JSON-able: loader state and the like.

    Raises:
      InputError: it cannot be written, or the one before could not; older ones are as they were.
    """
    with self._writing():
      while self._damaged:
        self._manager.delete(self._damaged.pop())
      if step in self._manager.all_steps():
        return
      sums = {"state": checksums.of_tree(state), "extra": checksums.of_json(extra)}
      items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        extra=ocp.args.JsonSave({"saved": extra, "checksums": sums}),
      )
      self._manager.save(step, args=items, force=True)

  def wait(self) -> None:
    """Return when everything saved so far is on disk.

    Raises:
      InputError: it cannot be written.
    """
    with self._writing():
      self._manager.wait_until_finished()

  @property
  def latest(self) -> int | None:
    """Return the newest complete step that is not known to be damaged, or None."""
    return max(set(self._manager.all_steps()) - set(self._damaged), default=None)

  def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict]:
    """Read a checkpoint into the shapes, dtypes and shardings of `like`.

    Args:
      like: a pytree of `jax.ShapeDtypeStruct` with shardings.
      step: which; None: the newest that is whole. Damaged ones are passed over with a line in the
        log, and go when the next one is saved.

    Raises:
      InputError: there is none, or it is damaged or does not fit.
    """
    if step is not None:
      return self._restore(like, step)
    steps, problems = sorted(self._manager.all_steps(), reverse=True), []
    if not steps:
      raise InputError(f"{self.directory} holds no checkpoint.")
    for step in steps:
      found, problem = None, None
      try:
        found = self._restore(like, step)
      except InputError as error:
        if any(word in str(error.__cause__) for word in _PASSING):
          raise
        problem = error
      if not meshes.any_host(found is None):  # all hosts take the same one
        self._damaged = steps[: len(problems)]
        for damaged in problems:
          logging.warning("%s; going on from step %d, and the next save removes it.", damaged, step)
        return found
      problems.append(problem or f"checkpoint {self.directory / str(step)} is damaged elsewhere")
      del found
    others = "".join(f", nor can {older}" for older in steps[1:])
    raise InputError(f"{problems[0]}{others}; remove {self.directory} to begin the run anew.")

  def _restore(self, like, step):
    items = ocp.args.Composite(state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore())
    try:
      if not any((self.directory / str(step)).iterdir()):
        raise ValueError("the folder is empty")
      with _unheard():
        restored = self._manager.restore(step, args=items)
      state, extra = restored["state"], restored["extra"]
      if {"saved", "checksums"} & set(extra):  # one of an earlier version has none
        extra, sums = extra["saved"], extra["checksums"]
        if checksums.of_json(extra) != sums["extra"] or checksums.of_tree(state) != sums["state"]:
          raise ValueError("its values are not those that were saved")
    except Exception as error:  # Orbax raises many types; all mean the same to a user
      self._failed = True
      raise InputError(
        f"checkpoint {self.directory / str(step)} cannot be restored: {_first_line(error)}"
      ) from error
    return state, extra

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turn a full disk into one line, also one that Orbax met in a thread of its own."""
    try:
      yield
    except Exception as error:
      self._failed = True
      if (why := disk.refusal(error)) is None:
        raise
      raise InputError(
        f"{self.directory}: a checkpoint cannot be written, older ones are whole: {why}."
      ) from error


def _is_news(record) -> bool:
  """Drop what Orbax logs of a full disk, a stack for each thread: one line comes of it anyway."""
  error = record.exc_info[1] if record.exc_info else None
  return error is None or disk.refusal(error) is None


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
  """Drop what Orbax logs of a checkpoint without metadata: `restore` tells of it in its line."""
  logger = logging.get_absl_logger()

  def by_others(record):
    return not {"orbax", "metadata"} <= set(record.pathname.split(os.sep))

  logger.addFilter(by_others)
  try:
    yield
  finally:
    logger.removeFilter(by_others)


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
