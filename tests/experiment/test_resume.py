# SPDX-License-Identifier: Apache-2.0
"""An interrupted run, continued, is the uninterrupted run bit for bit."""

import functools
import json
import os
import resource
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

from dlm_jax import disk, mesh
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


@functools.cache
def _shapes():
  built = build.experiment(plan.read(tiny_runs.make().config("idlm", **RUN)), 300)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.replicated(built.mesh)),
    built.shapes,
  )


def _restore(workdir, step=8):
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    return checkpoints.restore(_shapes(), step)


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
  values = [file for file in files if file.as_posix().startswith("state/d/")]
  for number, file in enumerate(sorted(set(files) - set(values[2:]))):  # of values two
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


def _flip(file, place, bit=2):
  content = bytearray(file.read_bytes())
  content[int(place * len(content))] ^= 1 << bit
  file.write_bytes(content)


def _values(step):
  """Return the files of values of a checkpoint, the largest first."""
  return sorted((step / "state").rglob("d/*"), key=lambda file: -file.stat().st_size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's readers
def test_single_bits_are_never_read_as_other_values(straight, tmp_path):
  """Wherever one is flipped: refused in one line, or the state is the same."""
  expected, refused = _restore(straight), []
  step = straight / "checkpoints" / "8"
  for number, file in enumerate([*_values(step)[:3], step / "extra" / "metadata"]):
    for place in (0.2, 0.5, 0.8):
      copy = tmp_path / f"{number} {place}"
      shutil.copytree(step, copy / "checkpoints" / "8")
      _flip(copy / "checkpoints" / "8" / file.relative_to(step), place)
      try:
        state, extra = _restore(copy)
      except InputError as error:
        refused.append(str(error))
        continue
      jax.tree.map(np.testing.assert_array_equal, state, expected[0])
      assert extra == expected[1]
  assert refused and not any("\n" in line for line in refused)  # many bits mean nothing


def _edit_position(workdir, step):
  file = workdir / "checkpoints" / str(step) / "extra" / "metadata"
  content = json.loads(file.read_text())
  content["saved"]["loader"]["step"] += 1
  file.write_text(json.dumps(content))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_passed_over(straight, tmp_path, caplog):
  """The one before it leads to the same end; nothing is removed until there is a new one."""
  workdir = shutil.copytree(straight, tmp_path / "damaged")
  _edit_position(workdir, 8)
  state, _ = _restore(workdir, None)
  assert int(state.step) == 6 and (workdir / "checkpoints" / "8").exists()
  result = train(tiny_runs.make().config("idlm", **RUN), workdir)
  assert (result.step, result.reason) == (8, "finished")
  assert "checkpoints/8 cannot be restored: its values are not those that were saved" in caplog.text
  assert "going on from step 6, and the next save removes it" in caplog.text
  _assert_same(straight, workdir)


@pytest.mark.parametrize("why", ["UNAVAILABLE: try again", "RESOURCE_EXHAUSTED: out of memory"])
def test_what_may_work_later_is_not_damage(straight, tmp_path, monkeypatch, why):
  workdir, tried = shutil.copytree(straight, tmp_path / "run"), []

  def fail(manager, step, **options):
    tried.append(step)
    raise ValueError(why)

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", fail)
  with pytest.raises(InputError, match=f"checkpoints/8 cannot be restored: {why}"):
    _restore(workdir, None)
  assert tried == [8] and (workdir / "checkpoints" / "8").exists()


def test_no_checkpoint_is_left(straight, tmp_path):
  workdir = shutil.copytree(straight, tmp_path / "damaged")
  for step in (6, 8):
    _edit_position(workdir, step)
  with pytest.raises(InputError) as caught:
    train(tiny_runs.make().config("idlm", **RUN), workdir)
  line = str(caught.value)
  assert f"{workdir}/checkpoints/8 cannot be restored" in line and "nor can 6" in line
  assert line.endswith(f"remove {workdir}/checkpoints to begin the run anew.")
  assert (workdir / "checkpoints" / "8").exists() and (workdir / "final").exists()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_goes_on_later(tmp_path, monkeypatch):
  """The files of the checkpoint of step 4 may have 20 kB each; Orbax meets that in a thread."""
  config = tiny_runs.make().config("teacher", train__steps="4")
  plain, before = checkpoint.Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

  def save(checkpoints, step, state, extra):
    if step == 4:
      resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
      plain(checkpoints, step, state, extra)
      checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", save)
    with pytest.raises(InputError) as caught:
      train(config, tmp_path)
  line = str(caught.value)
  assert line.endswith("File too large; free space and run the same command again.")
  assert "a checkpoint cannot be written, older ones are whole" in line and "\n" not in line
  assert (tmp_path / "checkpoints" / "2").exists() and not (tmp_path / "checkpoints" / "4").exists()
  assert train(config, tmp_path).reason == "finished"
  assert [row["step"] for row in tiny_runs.metrics(tmp_path)] == [1, 2, 3, 4]


def test_two_runs_in_one_workdir(straight):
  config, listing = tiny_runs.make().config("idlm", **RUN), sorted(straight.rglob("*"))
  said = f"checkpoints is being written by process {os.getpid()} on .*; wait for it, end it or"
  with disk.alone(straight / "checkpoints"), pytest.raises(InputError, match=said):
    train(config, straight)
  assert sorted(straight.rglob("*")) == listing


@pytest.mark.parametrize("name", ["final", "best"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_in_the_place_of_a_network_stays(tmp_path, name, kind):
  place = tmp_path / name
  place.write_text("mine") if kind == "file" else place.symlink_to(tmp_path)
  with pytest.raises(InputError, match=f"{name} is a {kind} and not a folder; move it away"):
    train(tiny_runs.make().config("teacher"), tmp_path)
  assert [entry.name for entry in tmp_path.iterdir()] == [name]
  assert place.is_symlink() or place.read_text() == "mine"


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
