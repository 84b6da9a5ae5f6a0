# SPDX-License-Identifier: Apache-2.0
"""What the system refuses anywhere below a verb is one line and exit code 2."""

import errno
import os
import shutil

import pytest

from dlm_jax.cli import main, prepare


@pytest.mark.parametrize(
  "error, said",
  [
    (OSError(errno.ENOSPC, "x", "a/b"), "a/b: No space left on device; free space and run the sam"),
    (OSError(errno.EDQUOT, "x"), "Disk quota exceeded; free space and run the same command again."),
    (OSError(errno.EROFS, "x", "a/b"), "a/b: Read-only file system."),
    (OSError(errno.EIO, "x", "a/b"), "a/b: Input/output error."),
    (OSError(errno.ENAMETOOLONG, "x", "a"), "a: File name too long."),
    (
      shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
      "No space left on device; f",
    ),
    (RuntimeError("write() failed: No space left on device"), "No space left on device; free spac"),
  ],
)
def test_one_line(error, said, monkeypatch, capsys):
  def fail(argv):
    raise error

  monkeypatch.setattr(prepare, "main", fail)
  assert main.main(["prepare"]) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith(f"dlm-jax prepare: {said}")
  assert captured.err.count("\n") == 1 and not captured.out


def test_defects_keep_their_traceback(monkeypatch):
  def fail(argv):
    raise RuntimeError("a defect")

  monkeypatch.setattr(prepare, "main", fail)
  with pytest.raises(RuntimeError, match="a defect"):
    main.main(["prepare"])


def test_a_full_disk_behind_the_output(monkeypatch, capsys):
  """What Python would still print at its end goes nowhere."""
  monkeypatch.setattr(prepare, "main", lambda argv: print("texts"))
  with open("/dev/full", "w") as full:
    monkeypatch.setattr("sys.stdout", full)
    assert main.main(["prepare"]) == 2
    assert os.fstat(full.fileno()).st_rdev == os.stat(os.devnull).st_rdev
  said = "dlm-jax prepare: No space left on device; free space and run the same command again.\n"
  assert capsys.readouterr().err == said
