# SPDX-License-Identifier: Apache-2.0
"""Where metrics go: always `metrics.jsonl`, TensorBoard by default, Weights & Biases on request."""

import json
import math
import pathlib
import time

import jax
from etils import epath

from dlm_jax import disk, json_file, remote
from dlm_jax.errors import InputError

SYNC_SECONDS = 30.0  # between copies to a remote workdir


class Writer:
  """Write scalars per step; used as a context manager.

  Only process 0 writes. A resumed run drops the lines behind the step it resumes from, so that the
  file reads like one uninterrupted run.

  Args:
    workdir: existing directory; of a remote one, files are copied there every half minute.
    resume_from: steps that are already complete.
    tensorboard: also write event files to workdir/tensorboard.
    wandb_project: also log there; needs `wandb` to be installed.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    resume_from: int = 0,
    tensorboard: bool = True,
    wandb_project: str = "",
  ):
    self._file = self._board = self._wandb = self._mirror = None
    if jax.process_index() != 0:
      return
    self._mirror = remote.Mirror(workdir, ("metrics.jsonl", "tensorboard"))
    workdir = self._mirror.folder
    self._path = workdir / "metrics.jsonl"
    with disk.writing(self._path):
      if self._path.exists():
        lines = self._path.read_bytes().splitlines() if resume_from else []
        kept = [line for line in lines if _step(line) <= resume_from]
        temporary = self._path.with_suffix(".tmp")  # a crash here loses no line
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        temporary.replace(self._path)
      self._file = self._path.open("a")
    if tensorboard:
      try:
        self._board = _Board(workdir / "tensorboard", resume_from)
      except InputError:
        self._file.close()
        raise
    if wandb_project:
      import wandb

      self._wandb = wandb.init(project=wandb_project, dir=str(workdir), resume="allow")

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind, *_):
    try:
      with disk.writing(self._path if self._file else ""):
        if self._file:
          self._file.close()
        if self._board:
          self._board.close()
        if self._mirror:
          self._mirror.sync()
    except InputError:
      if kind is None:  # what comes first is said
        raise
    finally:
      if self._wandb:
        self._wandb.finish()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Append one line {"step": …, name: value}; a non-finite value is written as null.

    Raises:
      InputError: it cannot be written; earlier lines stay.
    """
    if not self._file:
      return
    values = {k: float(v) for k, v in metrics.items()}
    plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
    with disk.writing(self._path):
      self._file.write(json.dumps({"step": step, **plain}) + "\n")
      self._file.flush()
    if self._board:
      self._board.write(step, values)
    self._mirror.sync(SYNC_SECONDS)
    if self._wandb:
      self._wandb.log(values, step=step)


class _Board:
  """Event files of TensorBoard, written in this thread.

  The writer of the library has a thread of its own: a full disk ends it without a word, and a
  training waits for it for ever.
  """

  def __init__(self, folder: pathlib.Path, resume_from: int):
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2

    self._folder, self._event, self._flushed = folder, event_pb2.Event, time.monotonic()
    self._session = event_pb2.SessionLog
    with disk.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      self._events = event_file_writer.EventsWriter(str(folder / "events"))
      if resume_from:  # what an earlier run wrote of later steps is not shown
        start = self._session(status=self._session.START)
        self._add(step=resume_from + 1, session_log=start)
      self._events.flush()

  def _add(self, **content) -> None:
    self._events.write_event(self._event(wall_time=time.time(), **content))

  def write(self, step: int, values: dict[str, float]) -> None:
    from tensorboardX.summary import scalar

    with disk.writing(self._folder):
      for name, value in values.items():
        self._add(step=step, summary=scalar(name, value))
      if time.monotonic() - self._flushed > SYNC_SECONDS:
        self._events.flush()
        self._flushed = time.monotonic()

  def close(self) -> None:
    with disk.writing(self._folder):
      self._events.close()


def _step(line: bytes) -> int:
  """Return a line's step; a line cut off by a crash counts as never written."""
  try:
    return int(json_file.parse(line)["step"])
  except (ValueError, KeyError, TypeError):
    return 2**62
