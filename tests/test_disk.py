# SPDX-License-Identifier: Apache-2.0
"""Folders appear whole, kills leave nothing, two writers are refused, refusals are one line."""

import contextlib
import errno
import os
import pathlib
import subprocess
import sys
import time

import pytest

from dlm_jax import disk, remote
from dlm_jax.errors import InputError

_WRITER = """
import pathlib, sys, time
from dlm_jax import disk
path = pathlib.Path(sys.argv[1])
with disk.fresh(path) as folder, disk.alone(path):
  (folder / "half").write_text("half")
  print("ready", flush=True)
  time.sleep(120)
"""


def _hidden(folder):
  return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


@pytest.fixture
def writer(tmp_path):
  """Return a process in the middle of writing tmp_path/network."""
  command = [sys.executable, "-c", _WRITER, str(tmp_path / "network")]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "ready\n"
  yield process
  process.kill()
  process.wait()


def _publish(path, text):
  with remote.publish(path) as folder:
    (folder / "config.json").write_text(text)


def _write_alone(path):
  with disk.alone(path):
    pytest.fail("two writers")


def test_a_living_writer_is_left_alone_and_a_dead_one_is_cleared_away(writer, tmp_path):
  path = tmp_path / "network"
  theirs = _hidden(tmp_path)
  _publish(path, "ours")
  assert _hidden(tmp_path) == theirs and (path / "config.json").read_text() == "ours"
  with pytest.raises(InputError, match=rf"process {writer.pid} on .*; wait for it") as caught:
    _write_alone(path)
  assert "\n" not in str(caught.value)
  writer.kill()
  writer.wait()
  assert _hidden(tmp_path) == theirs and not (path / "half").exists()
  with disk.alone(path):
    _publish(path, "again")
  assert _hidden(tmp_path) == [] and (path / "config.json").read_text() == "again"


@pytest.mark.parametrize("fails", [False, True])
def test_folders_around_go_with_one_that_was_not_renamed(tmp_path, fails):
  path = tmp_path / "a" / "b" / "c"
  with contextlib.suppress(KeyError), disk.fresh(path) as folder:
    assert path.parent.is_dir()
    if fails:
      raise KeyError
    disk.replace(folder, path)
  assert [entry.name for entry in tmp_path.rglob("*")] == ([] if fails else ["a", "b", "c"])


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  with disk.fresh(pathlib.Path(".")) as folder, disk.alone(pathlib.Path(".")):
    assert folder.parent == tmp_path and folder.name.startswith(".here.")
    assert (tmp_path / ".here.lock").exists()


def test_only_hidden_folders_of_the_same_name_are_ours(tmp_path):
  mine = [".network", ".network.new", ".networks.00000000-1.new", ".network.zz-1.new", "network-1"]
  for name in mine:
    (tmp_path / name).mkdir()
  _publish(tmp_path / "network", "x")
  assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*mine, "network"])


def test_a_folder_of_another_machine_is_dead_after_a_day(tmp_path):
  theirs = [tmp_path / f".network.{host:08x}-{os.getpid()}.new" for host in (1, 2)]
  for age, folder in zip((disk._QUIET + 60, 60), theirs, strict=True):
    folder.mkdir()
    (folder / "half").write_text("")
    for entry in (folder / "half", folder):
      os.utime(entry, (time.time() - age,) * 2)
  _publish(tmp_path / "network", "x")
  assert [folder.exists() for folder in theirs] == [False, True]


def test_killed_between_two_renames_the_folder_comes_back(tmp_path, monkeypatch):
  path = tmp_path / "network"
  _publish(path, "old")
  path.rename(disk._old(path))  # what a kill at the worst moment leaves; its process is gone
  with pytest.raises(KeyError), remote.publish(path):
    raise KeyError
  assert (path / "config.json").read_text() == "old" and _hidden(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_in_the_place_of_a_folder_stays(tmp_path, kind):
  path, other = tmp_path / "final", tmp_path / "other"
  other.mkdir()
  path.write_text("mine") if kind == "file" else path.symlink_to(other)
  with pytest.raises(InputError, match=f"final is a {kind} and not a folder; move it away"):
    _publish(path, "x")
  assert (path.read_text() == "mine") if kind == "file" else path.is_symlink()
  assert _hidden(tmp_path) == []


@pytest.mark.parametrize("locks", [True, False])
def test_a_stale_lock_is_no_obstacle(tmp_path, monkeypatch, locks):
  """The process that it names is gone; with and without locks of the file system."""
  if not locks:
    monkeypatch.setattr(disk, "_lock", lambda stream: None)
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  (tmp_path / ".run.lock").write_text(f"{gone.pid} {disk.socket.gethostname()}\n")
  with disk.alone(tmp_path / "run"):
    assert (tmp_path / ".run.lock").read_text().split()[0] == str(os.getpid())
  assert _hidden(tmp_path) == []


def test_without_locks_the_process_is_asked_for(writer, tmp_path, monkeypatch):
  monkeypatch.setattr(disk, "_lock", lambda stream: None)
  with pytest.raises(InputError, match=f"written by process {writer.pid}"):
    _write_alone(tmp_path / "network")
  theirs = _hidden(tmp_path)
  _publish(tmp_path / "network", "x")
  assert _hidden(tmp_path) == theirs


_WORDS = "RESOURCE_EXHAUSTED: writing: [OS error 28: ENOSPC No space left on device]\nmore\nlines"


@pytest.mark.parametrize(
  "error, said",
  [
    (OSError(errno.ENOSPC, "x"), "No space left on device; free space and run the same command"),
    (OSError(errno.EDQUOT, "x"), "Disk quota exceeded; free space and run the same command"),
    (OSError(errno.EROFS, "x"), r"Read-only file system\."),
    (OSError(errno.EIO, "x"), r"Input/output error\."),
    (ValueError(_WORDS), "No space left on device; free space and run the same command"),
  ],
)
def test_what_a_disk_refuses_is_one_line(tmp_path, error, said):
  path = tmp_path / "network"
  said = f"network cannot be written: {said}"
  with pytest.raises(InputError, match=said) as caught, remote.publish(path):
    raise error
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_what_is_no_refusal_keeps_its_traceback(tmp_path):
  with pytest.raises(ValueError, match="a defect") as caught, disk.writing(tmp_path):
    raise ValueError("a defect")
  assert not isinstance(caught.value, InputError)
