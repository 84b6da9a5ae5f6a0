# SPDX-License-Identifier: Apache-2.0
"""An interrupted run, continued, is the uninterrupted run bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file

from dlm_jax import mesh
from dlm_jax.errors import InputError
from dlm_jax.experiment import build, plan, run
from dlm_jax.experiment.run import train
from dlm_jax.train import checkpoint

# Dropout, moving averages, evaluations and a cursor in the middle of an epoch: all must survive.
RUN = {"train__steps": "8", "train__checkpoint_every": "2", "evaluate__every": "3"}
RUN |= {"model__dropout": "0.1", "evaluate__max_entropy_drop": "100.0"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """Return the workdir of a run without interruptions."""
  workdir = tmp_path_factory.mktemp("straight")
  result = train(tiny_runs.make().config("idlm", **RUN), workdir)
  assert (result.step, result.reason) == (8, "finished")
  return workdir


def _start_training(workdir) -> subprocess.Popen:
  flags = tiny_runs.make().flags("idlm", **RUN)
  command = [sys.executable, "-m", "dlm_jax", "train", *flags, f"--workdir={workdir}"]
  return subprocess.Popen(
    command,
    env=tiny_runs.environment(),
    start_new_session=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _wait_for(process, seen, seconds=120):
  """Poll until `seen()` or the process has ended."""
  end = time.monotonic() + seconds
  while time.monotonic() < end and process.poll() is None:
    if seen():
      return True
    time.sleep(0.0005)
  return False


def _assert_same(straight, resumed):
  assert tiny_runs.metrics(resumed) == tiny_runs.metrics(straight)
  for name in ("final", "best"):
    ours = load_file(resumed / name / "model.safetensors")
    theirs = load_file(straight / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor in ours:
      np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor)
  ours, theirs = (_restore(workdir) for workdir in (resumed, straight))
  jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
  assert ours[1] == theirs[1], "loader position and evaluator"


def _restore(workdir, step=8):
  tiny = tiny_runs.make()
  built = build.experiment(plan.read(tiny.config("idlm", **RUN)), 300)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.replicated(built.mesh)),
    built.shapes,
  )
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    return checkpoints.restore(like, step)


def test_the_run_has_what_resume_must_keep(straight):
  rows = tiny_runs.metrics(straight)
  assert [row["step"] for row in rows] == list(range(9)), "step 0 is the teacher itself"
  assert len({row["student/loss"] for row in rows[1:]}) == 8
  assert [row["step"] for row in rows if "nfe2/genppl" in row] == [0, 3, 6]
  state, extra = _restore(straight)
  assert set(state.ema) == {"student", "fake"} and set(state.opt) == {"student", "fake"}
  assert extra["loader"]["step"] == 16, "two fresh batches per step"
  assert extra["evaluator"]["reference"]["2"] > 0


@pytest.mark.slow
def test_killed_in_a_checkpoint_write(straight, tmp_path):
  """SIGKILL while the temporary directory of step 4 exists; what was complete is step 2."""
  for attempt in range(6):
    workdir = tmp_path / str(attempt)
    folder = workdir / "checkpoints"
    process = _start_training(workdir)
    writing = _wait_for(process, lambda: list(folder.glob("4.*tmp*")))  # noqa: B023
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert writing or (folder / "4").exists(), output
    if not (folder / "4").exists():
      break
  else:
    pytest.fail("every write was complete before the signal arrived")
  assert list(folder.glob("4.*tmp*")), "the torn checkpoint is there"
  assert process.returncode == -signal.SIGKILL
  assert not (workdir / "final").exists()

  result = train(tiny_runs.make().config("idlm", **RUN), workdir)

  assert (result.step, result.reason) == (8, "finished")
  assert not list(folder.glob("*tmp*")), "the torn checkpoint was cleaned up"
  _assert_same(straight, workdir)


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(straight, tmp_path):
  process = _start_training(tmp_path)
  lines = tmp_path / "metrics.jsonl"
  running = _wait_for(process, lambda: lines.exists() and lines.read_text().count("\n") > 1)
  assert running, process.communicate()[0]
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 0, output
  assert "interrupted at step" in output and "Traceback" not in output
  saved = int(output.split("interrupted at step ")[1].split(";")[0])
  assert (tmp_path / "checkpoints" / str(saved)).is_dir()
  assert saved < 8 and not (tmp_path / "final").exists()

  train(tiny_runs.make().config("idlm", **RUN), tmp_path)

  # The straight run keeps steps 6 and 8, so does this one.
  _assert_same(straight, tmp_path)


@pytest.mark.slow
def test_interrupted_twice(straight, tmp_path, monkeypatch):
  """The signal arrives while a batch is fetched; between checkpoints, between evaluations."""
  config = tiny_runs.make().config("idlm", **RUN)
  make, stops = run.loader.make, iter(((2, signal.SIGINT), (5, signal.SIGTERM), None))
  monkeypatch.setattr(run.loader, "make", lambda *a, **k: _Interrupting(make(*a, **k), next(stops)))
  outcomes = [train(config, tmp_path) for _ in range(3)]
  steps = [(outcome.step, outcome.reason) for outcome in outcomes]
  assert steps == [(2, "interrupted"), (5, "interrupted"), (8, "finished")]
  _assert_same(straight, tmp_path)


class _Interrupting:
  """A loader during whose batch the process gets a signal."""

  def __init__(self, stream, stop):
    self._stream, self._stop = stream, stop

  def __next__(self):
    if self._stop and self._stream.position()["step"] == 2 * (self._stop[0] - 1):
      signal.raise_signal(self._stop[1])
    return next(self._stream)

  def __getattr__(self, name):
    return getattr(self._stream, name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's readers
def test_truncated_files_are_never_read_as_other_values(straight, tmp_path):
  """Whatever file is cut: refused in one line, or not needed and the state is the same."""
  expected, refused = _restore(straight), set()
  step = straight / "checkpoints" / "8"
  files = [p.relative_to(step) for p in step.rglob("*") if p.is_file() and p.stat().st_size > 1]
  for number, file in enumerate(sorted(files)):
    copy = tmp_path / str(number)
    shutil.copytree(step, copy / "checkpoints" / "8")
    cut = copy / "checkpoints" / "8" / file
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    try:
      state, extra = _restore(copy)
    except InputError as error:
      assert "cannot be restored" in str(error) and "\n" not in str(error)
      refused.add(file.as_posix())
      continue
    jax.tree.map(np.testing.assert_array_equal, state, expected[0])
    assert extra == expected[1]
  assert {"extra/metadata", "state/manifest.ocdbt", "state/_METADATA"} <= refused
  assert any(name.startswith("state/d/") for name in refused)


@pytest.mark.slow
def test_resume_refuses_another_run(straight):
  tiny, before = tiny_runs.make(), tiny_runs.metrics(straight)
  for change in ({"optim__lr": "0.5"}, {"model__dropout": "0.2"}, {"objective__ema_decay": "0.5"}):
    with pytest.raises(InputError, match="holds a run with another config"):
      train(tiny.config("idlm", **(RUN | change)), straight)
  assert tiny_runs.metrics(straight) == before
  kept = json.loads((straight / "checkpoints" / "config.json").read_text())
  assert kept["optim"]["lr"] == 1e-2


@pytest.mark.slow
def test_longer_run_continues(straight, tmp_path):
  """More steps on a finished run go on from its end."""
  workdir = shutil.copytree(straight, tmp_path / "longer")
  result = train(tiny_runs.make().config("idlm", **(RUN | {"train__steps": "9"})), workdir)
  assert result.step == 9
  rows = tiny_runs.metrics(workdir)
  assert rows[:9] == tiny_runs.metrics(straight) and rows[9]["step"] == 9
