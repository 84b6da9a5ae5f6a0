# SPDX-License-Identifier: Apache-2.0
"""One training loop for every objective."""

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from dlm_jax import draw, fields
from dlm_jax import mesh as meshes
from dlm_jax.arrays import Record
from dlm_jax.errors import InputError
from dlm_jax.objectives import Objective, TrainState, draw_batch
from dlm_jax.train.checkpoint import Checkpoints
from dlm_jax.train.progress import Progress
from dlm_jax.train.writers import Writer


@runtime_checkable
class Loader(Protocol):
  """Host batches with a position that can be saved."""

  def __next__(self) -> Record: ...
  def position(self) -> dict: ...
  def seek(self, position: dict) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
  """How long, and how often what.

  Attributes:
    steps: steps of the whole run, resumed parts included.
    log_every: steps between lines of metrics.
    checkpoint_every: steps between checkpoints; one is also written at the end and on SIGTERM.
    evaluate_every: steps between calls of the evaluator; 0 calls it never.
    evaluate_start: it is also called before the first step: what a run starts from is measured.
    seed: of corruption noise, times and dropout.
    max_seconds: wall-clock after which the run ends early, as if `steps` were reached; 0 is never.
    label: shown in the progress line.

  Raises:
    InputError: a number out of range.
  """

  steps: int
  log_every: int = 50
  checkpoint_every: int = 1000
  evaluate_every: int = 0
  evaluate_start: bool = False
  seed: int = 0
  max_seconds: float = 0.0
  label: str = "train"

  def __post_init__(self):
    for name in ("steps", "log_every", "checkpoint_every"):
      fields.Whole(1).check(f"train.{name}", getattr(self, name))
    fields.Whole(0).check("evaluate.every", self.evaluate_every)
    fields.Number("[0, ∞)").check("train.max_seconds", self.max_seconds)
    fields.SEED.check("seed", self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """How a run ended: "finished", "interrupted", "collapsed" or "time"."""

  state: TrainState
  step: int
  reason: str


@runtime_checkable
class Evaluator(Protocol):
  """Called with the state between steps; may keep the best and may ask to stop."""

  def __call__(self, step: int, state: TrainState) -> tuple[dict[str, float], bool]: ...
  @property
  def stop(self) -> bool: ...
  def to_json(self) -> dict: ...
  def from_json(self, state: dict) -> None: ...


def init_key(seed: int) -> jax.Array:
  """Return the key that parameters are drawn from."""
  return jax.random.split(draw.key(seed))[0]


def step_key(seed: int) -> jax.Array:
  """Return the key that the keys of all steps are folded from."""
  return jax.random.split(draw.key(seed))[1]


def jit_step(objective: Objective, mesh: Mesh, shardings: Any, seed: int) -> Callable:
  """Compile (state, records [batches, B, L]) -> (state, metrics) over a mesh, the state donated.

  Keys are folded from the seed and the step, so any step can be replayed and none is stored. It is
  compiled once per length L and set of features; all of these are split over the mesh as tokens
  are.
  """

  def train_step(state, records):
    rng, draws = jax.random.fold_in(step_key(seed), state.step), []
    for i in range(records["tokens"].shape[0]):
      record = {name: feature_UBL[i] for name, feature_UBL in records.items()}
      draws.append(draw_batch(record, jax.random.fold_in(rng, i)))
    return objective.step(state, draws[0] if objective.batches == 1 else tuple(draws))

  return jax.jit(
    meshes.over(mesh, train_step),
    in_shardings=(shardings, meshes.batch_sharding(mesh, leading=1)),
    out_shardings=(shardings, meshes.replicated(mesh)),
    donate_argnums=0,
    keep_unused=True,  # what a step only overwrites is donated too
  )


def start(
  objective: Objective,
  given: Any,
  loader: Loader,
  *,
  seed: int,
  shapes: TrainState,
  shardings: Any,
  checkpoints: Checkpoints,
  evaluator: Evaluator | None = None,
) -> TrainState:
  """Return the state to train from: of the newest checkpoint, or a fresh one.

  With a checkpoint the loader and the evaluator also go on from where they were.

  Args:
    objective: the method.
    given: parameters that a fresh state starts from, or None.
    loader: see `Loader`.
    seed: of the parameters that it is not given.
    shapes: of the state.
    shardings: a sharding per leaf of it.
    checkpoints: where states were saved.
    evaluator: see `Evaluator`.
  """
  if checkpoints.latest is None:
    state = jax.jit(objective.init, out_shardings=shardings)(init_key(seed), given)
    if objective.check is not None:
      objective.check(state)
    return state
  like = jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
    shapes,
    shardings,
  )
  state, extra = checkpoints.restore(like)
  loader.seek(extra["loader"])
  if evaluator is not None:
    evaluator.from_json(extra.get("evaluator", {}))
  return state


def run(
  objective: Objective,
  state: TrainState,
  loader: Loader,
  *,
  config: LoopConfig,
  rows: tuple[int, int],
  shardings: Any,
  checkpoints: Checkpoints,
  writer: Writer,
  evaluator: Evaluator | None = None,
) -> Result:
  """Train from the state's step to `config.steps`.

  The metrics of step n are read after step n + 1 was dispatched, so logging never stalls the
  device. SIGTERM and Ctrl-C finish the step, write a checkpoint and return. A non-finite loss or
  gradient stops the run before anything is written.

  Args:
    objective: the method.
    state: as initialised or restored, placed by `shardings`. It is donated: do not use it again.
    loader: yields records of [local batch, L] each; already positioned.
    config: how long, and how often what.
    rows: (host, hosts), the slice of every batch that the loader here reads: `mesh.host_rows`.
    shardings: a `NamedSharding` per leaf of the state, all over one mesh.
    checkpoints: where to save.
    writer: where metrics go.
    evaluator: see `Evaluator`.

  Raises:
    InputError: training diverged; names the last good checkpoint.
  """
  mesh = jax.tree.leaves(shardings)[0].mesh
  step_function = jit_step(objective, mesh, shardings, config.seed)
  placed = meshes.batch_sharding(mesh, leading=1)
  step, reason, pending = int(state.step), "finished", None
  if evaluator is not None and evaluator.stop:
    return Result(state=state, step=step, reason="collapsed")  # restored after it had stopped
  if step == 0 and config.evaluate_start and evaluator is not None:
    writer.write(0, evaluator(0, state)[0])  # the reference
  deadline = time.monotonic() + (config.max_seconds or math.inf)
  with stop_signals() as stop, Progress(config.label, step, config.steps) as progress:

    def settle(pending, scores, force=False):
      done, metrics, size = pending
      values = _read(done, metrics, checkpoints) | scores
      progress.update(done, values, size)
      if force or done % config.log_every == 0:
        writer.write(done, {**values, "tokens_per_second": progress.rate})

    while step < config.steps and reason == "finished":
      records = _next_records(loader, objective.batches, placed, rows)
      state, metrics = step_function(state, records)
      step += 1
      if pending is not None:
        settle(pending, {})
      pending = (step, metrics, records["tokens"].size)

      last, stopping, late = _asked_to_stop(step, config, stop, deadline)
      due_evaluation = config.evaluate_every and step % config.evaluate_every == 0
      due_save = step % config.checkpoint_every == 0 or last or stopping or late
      if not (due_save or due_evaluation):
        continue
      # Nothing is evaluated or saved before it is known to be good.
      _read(step, metrics, checkpoints)
      scores, collapsed = {}, False
      if due_evaluation and evaluator is not None:
        with progress.paused("evaluating"):
          scores, collapsed = evaluator(step, state)
      settle(pending, scores, force=last or bool(scores))
      pending = None
      reason = _reason(collapsed, stopping, late and not last)
      if due_save or collapsed:
        _save(checkpoints, step, state, loader, evaluator)
    checkpoints.wait()
  logging.info("%s: %s at step %d.", config.label, reason, step)
  return Result(state=state, step=step, reason=reason)


def _read(step: int, metrics: Any, checkpoints: Checkpoints) -> dict[str, float]:
  """Read the metrics of a dispatched step on the host.

  Raises:
    InputError: one is not finite.
  """
  values = {name: float(value) for name, value in metrics.items()}
  bad = [name for name, value in values.items() if not math.isfinite(value)]
  if bad:
    checkpoints.wait()
    good = checkpoints.latest
    where = f"{checkpoints.directory / str(good)}" if good is not None else "none"
    raise InputError(
      f"training diverged at step {step}: {bad[0]} is not finite; the last good checkpoint is "
      f"{where}. Lower optim.lr or raise optim.warmup."
    )
  return values


def _asked_to_stop(step, config, stop, deadline) -> tuple[bool, bool, bool]:
  """Return whether this is the last step, a signal came, time is up; the same on all hosts."""
  last = step == config.steps
  if jax.process_count() > 1 and step % config.log_every:
    return last, False, False
  late = time.monotonic() > deadline
  return last, meshes.any_host(stop.requested), meshes.any_host(late)


def _reason(collapsed: bool, stopping: bool, late: bool) -> str:
  if stopping:
    return "interrupted"
  return "collapsed" if collapsed else "time" if late else "finished"


def _save(checkpoints, step, state, loader, evaluator) -> None:
  extra = {"loader": loader.position()}
  if evaluator is not None:
    extra["evaluator"] = evaluator.to_json()
  checkpoints.save(step, state, extra)


def _next_records(
  loader: Loader, count: int, placed: NamedSharding, rows: tuple[int, int]
) -> Record:
  """Return records of [count, B, L], each host contributing its rows of the global batch."""
  records = [next(loader) for _ in range(count)]
  return {
    name: _place(np.stack([record[name] for record in records]), placed, rows)
    for name in records[0]
  }


def _place(local_UBL: np.ndarray, placed: NamedSharding, rows: tuple[int, int]) -> jax.Array:
  """Split a feature over the mesh, whatever hosts its rows are on."""
  if jax.process_count() == 1:
    return jax.device_put(jnp.asarray(local_UBL), placed)
  (updates, size, length), (host, hosts) = local_UBL.shape, rows

  def piece(index):
    batch = range(*index[1].indices(size * hosts))
    return local_UBL[index[0], batch.start - host * size : batch.stop - host * size, index[2]]

  shape = (updates, size * hosts, length)
  return jax.make_array_from_callback(shape, placed, piece)


_STOPPING = (
  b"\nstopping: this step is finished and saved; Ctrl-C again stops at once, and loses what came "
  b"since the last checkpoint.\n"
)


class _Stop:
  """Whether a signal came; it is answered once."""

  def __init__(self):
    self.requested, self._unanswered = False, threading.Lock()

  def answer(self) -> None:
    if self._unanswered.acquire(blocking=False):
      os.write(2, _STOPPING)  # a handler must not print: it may have interrupted a print


@contextlib.contextmanager
def stop_signals():
  """Turn SIGTERM and the first Ctrl-C into a flag, with a word; a second Ctrl-C interrupts."""
  stop, previous = _Stop(), {}

  def request(number, frame):
    if stop.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    stop.requested = True
    stop.answer()

  with contextlib.ExitStack() as stack:
    try:
      for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, request)
      stack.enter_context(_answered(stop))
    except ValueError:
      pass  # not the main thread: the host program owns the signals
    try:
      yield stop
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _answered(stop):
  """Answer a signal from a thread: while a program compiles, Python's handlers wait."""
  reading, writing = os.pipe()
  os.set_blocking(writing, False)

  def answer():
    while got := os.read(reading, 1):
      if got[0] in (signal.SIGTERM, signal.SIGINT):
        stop.answer()

  thread = threading.Thread(target=answer, daemon=True)
  before = signal.set_wakeup_fd(writing)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(writing)
    thread.join()
    os.close(reading)
