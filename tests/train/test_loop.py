# SPDX-License-Identifier: Apache-2.0
"""The loop by hand-made objectives: divergence, ends, logging, accumulation of what is saved."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import mesh, objectives
from dlm_jax.errors import InputError
from dlm_jax.train import checkpoint, loop, writers


class Batches:
  """Count up; the batch before step `at` does something."""

  def __init__(self, at=None, action=None):
    self.taken, self._at, self._action = 0, at, action

  def __next__(self):
    if self.taken + 1 == self._at:
      self._action()
    self.taken += 1
    return {"tokens": np.full((8, 2), self.taken, np.int32)}

  def position(self):
    return {"step": self.taken}

  def seek(self, position):
    self.taken = position["step"]


class Scores:
  """An evaluator that asks to stop at a step."""

  def __init__(self, stop_at=None):
    self.seen, self._stop_at, self.stop = [], stop_at, False

  def __call__(self, step, state):
    self.seen.append((step, float(state.trees["model"])))
    self.stop = step == self._stop_at
    return {"score": 10.0 * step}, self.stop

  def to_json(self):
    return {"seen": len(self.seen), "stop": self.stop}

  def from_json(self, state):
    self.seen, self.stop = [None] * state["seen"], state["stop"]


def _objective(bad_at=None, bad=jnp.nan, name="loss"):
  """Add the batch's first token to the one parameter; a metric is not finite at one step."""

  def step(state, batch):
    value = state.trees["model"] + batch["tokens"][0, 0]
    shown = jnp.where(state.step + 1 == bad_at, bad, value) if bad_at else value
    state = state.replace(step=state.step + 1, trees={"model": value})
    return state, {"model/loss": value, f"model/{name}": shown}

  def init(rng, params):
    return objectives.TrainState(
      step=jnp.zeros((), jnp.int32), trees={"model": jnp.zeros(())}, opt={}, ema={}
    )

  return objectives.Objective(init=init, step=step)


def _run(workdir, objective, batches, *, evaluator=None, **config):
  devices = mesh.make(devices=jax.devices()[:1])
  like = jax.eval_shape(objective.init, jax.random.key(0), None)
  shardings = jax.tree.map(lambda _: mesh.replicated(devices), like)
  options = {"steps": 6, "log_every": 1, "checkpoint_every": 2} | config
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    state = loop.start(
      objective,
      None,
      batches,
      seed=0,
      shapes=like,
      shardings=shardings,
      checkpoints=checkpoints,
      evaluator=evaluator,
    )
    with writers.Writer(workdir, resume_from=int(state.step), tensorboard=False) as writer:
      return loop.run(
        objective,
        state,
        batches,
        config=loop.LoopConfig(**options),
        rows=(0, 1),
        shardings=shardings,
        checkpoints=checkpoints,
        writer=writer,
        evaluator=evaluator,
      )


def _rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _saved(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_every_step_sees_its_batch(tmp_path):
  result = _run(tmp_path, _objective(), Batches())
  assert (result.step, result.reason) == (6, "finished")
  assert int(result.state.step) == 6 and float(result.state.trees["model"]) == 21
  rows = _rows(tmp_path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert [row["model/loss"] for row in rows] == [1, 3, 6, 10, 15, 21]
  assert all(set(row) == {"step", "model/loss", "tokens_per_second"} for row in rows)
  assert _saved(tmp_path) == [4, 6]


@pytest.mark.parametrize("log_every, expected", [(2, [2, 4, 5]), (3, [3, 5]), (100, [5])])
def test_log_every(tmp_path, log_every, expected):
  """The last step always has its line."""
  _run(tmp_path, _objective(), Batches(), steps=5, log_every=log_every)
  assert [row["step"] for row in _rows(tmp_path)] == expected


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_divergence_stops_and_names_the_last_good_checkpoint(tmp_path, bad, name):
  """Step 4 is due for a checkpoint, but is bad: what stays is step 2."""
  with pytest.raises(InputError) as error:
    _run(tmp_path, _objective(bad_at=4, bad=bad, name=name), Batches())
  message = str(error.value)
  assert "diverged at step 4" in message and f"model/{name} is not finite" in message
  assert f"checkpoint is {tmp_path / 'checkpoints' / '2'}." in message and "\n" not in message
  assert _saved(tmp_path) == [2]
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]


def test_divergence_between_checkpoints_saves_nothing_after(tmp_path):
  """The bad step 5 is noticed one step later, before step 6 is saved."""
  with pytest.raises(InputError, match=r"diverged at step 5.*/checkpoints/4\."):
    _run(tmp_path, _objective(bad_at=5), Batches())
  assert _saved(tmp_path) == [2, 4]
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3, 4]


def test_divergence_before_any_checkpoint(tmp_path):
  with pytest.raises(InputError, match="diverged at step 1") as error:
    _run(tmp_path, _objective(bad_at=1), Batches())
  assert "last good checkpoint is none" in str(error.value)
  assert _saved(tmp_path) == []


def test_evaluator_is_called_when_due_and_logged(tmp_path):
  scores = Scores()
  result = _run(tmp_path, _objective(), Batches(), evaluator=scores, evaluate_every=3, log_every=50)
  assert result.reason == "finished"
  assert scores.seen == [(3, 6.0), (6, 21.0)]
  assert [(row["step"], row["score"]) for row in _rows(tmp_path)] == [(3, 30), (6, 60)]


def test_what_a_run_starts_from_is_measured_once(tmp_path):
  """Before the first step, and not again when it is resumed there or later."""
  when = {"evaluate_every": 3, "evaluate_start": True, "log_every": 50}
  scores = Scores()
  _run(tmp_path, _objective(), Batches(), evaluator=scores, steps=3, **when)
  assert scores.seen == [(0, 0.0), (3, 6.0)]
  again = Scores()
  _run(tmp_path, _objective(), Batches(), evaluator=again, steps=6, **when)
  assert again.seen == [None, None, (6, 21.0)]
  assert [(row["step"], row["score"]) for row in _rows(tmp_path)] == [(0, 0), (3, 30), (6, 60)]


def test_collapse_stops_and_saves(tmp_path):
  scores = Scores(stop_at=3)
  result = _run(tmp_path, _objective(), Batches(), evaluator=scores, evaluate_every=1)
  assert (result.step, result.reason) == (3, "collapsed")
  assert _saved(tmp_path) == [2, 3]
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]
  again = _run(tmp_path, _objective(), Batches(), evaluator=Scores(), evaluate_every=1)
  assert (again.step, again.reason) == (3, "collapsed"), "called again, it stays stopped"


def test_max_seconds_ends_early_and_saves(tmp_path):
  slow = Batches(at=3, action=lambda: time.sleep(1.5))
  result = _run(tmp_path, _objective(), slow, steps=1000, checkpoint_every=1000, max_seconds=1.0)
  assert result.reason == "time" and result.step <= 3
  assert _saved(tmp_path) == [result.step]
  assert float(result.state.trees["model"]) == sum(range(1, result.step + 1))


@pytest.mark.parametrize("inside", [(), ("state",), ("x.txt",)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's readers
def test_a_checkpoint_with_nothing_in_it(tmp_path, caplog, inside):
  """One line in all, and the one beside it is used; without one, one error."""
  state = {"a": jax.device_put(np.arange(3.0, dtype=np.float32), mesh.make().devices.flat[0])}
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, {"x": 1})
  (tmp_path / "5").mkdir()
  for name in inside:
    (tmp_path / "5" / name).mkdir()
  caplog.clear()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, extra = checkpoints.restore(like)
  np.testing.assert_array_equal(restored["a"], state["a"])
  (line,) = [record.getMessage() for record in caplog.records]
  assert extra == {"x": 1} and line.startswith(f"checkpoint {tmp_path / '5'} cannot be restored:")
  assert inside or "the folder is empty; going on from step 3" in line
  shutil.rmtree(tmp_path / "3")
  caplog.clear()
  with checkpoint.Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError) as caught:
    checkpoints.restore(like)
  assert not caplog.records and "\n" not in str(caught.value)
  assert str(caught.value).endswith(f"remove {tmp_path} to begin the run anew.")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_the_step_and_resume(tmp_path, number, capfd):
  before = signal.getsignal(number)
  interrupted = Batches(at=3, action=lambda: signal.raise_signal(number))
  first = _run(tmp_path, _objective(), interrupted, evaluator=Scores(), evaluate_every=2)
  assert (first.step, first.reason) == (3, "interrupted")
  assert (
    capfd.readouterr().err.count("stopping: this step is finished and saved; Ctrl-C again") == 1
  )
  assert _saved(tmp_path) == [2, 3]
  assert signal.getsignal(number) is before, "the handler is given back"
  scores = Scores()
  second = _run(tmp_path, _objective(), Batches(), evaluator=scores, evaluate_every=2)
  assert (second.step, second.reason) == (6, "finished")
  assert float(second.state.trees["model"]) == 21
  assert len(scores.seen) == 3, "one from the checkpoint, two seen"
  assert [row["model/loss"] for row in _rows(tmp_path)] == [1, 3, 6, 10, 15, 21]


def test_ctrl_c_is_answered_while_no_handler_can_run(capfd, monkeypatch):
  """As while a program compiles: the main thread is in C code, which knows nothing of Python."""
  write, handled = os.write, []

  def watched(file, text):
    if file == 2:
      handled.append(stop.requested)
    return write(file, text)

  monkeypatch.setattr(os, "write", watched)
  before = signal.set_wakeup_fd(-1)
  with loop.stop_signals() as stop:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    while not stop.requested:
      hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
  assert handled == [False], "once, and before the handler"
  assert capfd.readouterr().err.count("stopping: ") == 1
  assert signal.set_wakeup_fd(before) == -1, "given back"


def test_second_ctrl_c_interrupts_at_once(tmp_path):
  def twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    _run(tmp_path, _objective(), Batches(at=4, action=twice))
  assert _saved(tmp_path) == [2]


def test_steps_have_different_keys_and_replay():
  """The batch's keys come from the seed and the step alone."""

  def step(state, batch):
    drawn = jax.random.uniform(batch["rng"][0])
    state = state.replace(step=state.step + 1)
    return state, {"key": drawn, "t0": batch["t"][0], "t7": batch["t"][7]}

  objective = _objective()._replace(step=step)
  devices = mesh.make(devices=jax.devices()[:1])
  shardings = jax.tree.map(lambda _: mesh.replicated(devices), objective.init(None, None))
  tokens = jnp.zeros((1, 8, 2), jnp.int32)
  seen = {}
  for seed in (0, 1):
    run = loop.jit_step(objective, devices, shardings, seed)
    for start in (0, 1, 2, 0):
      state = objective.init(None, None).replace(step=jnp.asarray(start, jnp.int32))
      state, metrics = run(jax.device_put(state, mesh.replicated(devices)), {"tokens": tokens})
      seen.setdefault((seed, start), []).append(float(metrics["key"]))
      assert 0 < float(metrics["t0"]) <= 0.126 and float(metrics["t7"]) >= 0.875
  assert all(len(set(values)) == 1 for values in seen.values())
  assert len({values[0] for values in seen.values()}) == 6
