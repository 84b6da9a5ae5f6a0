# SPDX-License-Identifier: Apache-2.0
"""Where metrics go: always `metrics.jsonl`, TensorBoard by default, Weights & Biases on request."""

import json
import math

import jax
from etils import epath

from dlm_jax import json_file, remote

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
    if self._path.exists():
      lines = self._path.read_bytes().splitlines() if resume_from else []
      kept = [line for line in lines if _step(line) <= resume_from]
      temporary = self._path.with_suffix(".tmp")  # a crash here loses no line
      temporary.write_bytes(b"".join(line + b"\n" for line in kept))
      temporary.replace(self._path)
    self._file = self._path.open("a")
    if tensorboard:
      from tensorboardX import SummaryWriter

      board = workdir / "tensorboard"
      self._board = SummaryWriter(str(board), purge_step=resume_from + 1 if resume_from else None)
    if wandb_project:
      import wandb

      self._wandb = wandb.init(project=wandb_project, dir=str(workdir), resume="allow")

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_):
    if self._file:
      self._file.close()
    if self._board:
      self._board.close()
    if self._mirror:
      self._mirror.sync()
    if self._wandb:
      self._wandb.finish()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Append one line {"step": …, name: value}; a non-finite value is written as null."""
    if not self._file:
      return
    values = {k: float(v) for k, v in metrics.items()}
    plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(json.dumps({"step": step, **plain}) + "\n")
    self._file.flush()
    self._mirror.sync(SYNC_SECONDS)
    if self._board:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(values, step=step)


def _step(line: bytes) -> int:
  """Return a line's step; a line cut off by a crash counts as never written."""
  try:
    return int(json_file.parse(line)["step"])
  except (ValueError, KeyError, TypeError):
    return 2**62
