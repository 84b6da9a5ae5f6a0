# SPDX-License-Identifier: Apache-2.0
"""Files of this machine: folders that appear whole, one writer at a time, refusals in one line.

What is killed leaves hidden folders behind. Their names tell who made them, and the next writer of
the same place removes those whose maker is gone.
"""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator

from dlm_jax.errors import InputError

try:
  import fcntl
except ImportError:  # Windows has no such locks
  fcntl = None

# What a disk refuses in the words of libraries that raise no OSError.
_REFUSALS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Whether a process of another machine is alive cannot be asked: its folder counts as left behind
# when nothing in it was written for so many seconds.
_QUIET = 86400.0


def refusal(error: BaseException) -> str | None:
  """Return the system's words for why a file cannot be used, and what helps; None: not a refusal.

  Libraries that write files themselves raise types of their own, with these words in the text.
  """
  number, said = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
  if not number:
    text = str(error)
    number = next((n for n in _REFUSALS if os.strerror(n) in text), None)
  if not number:
    return said
  helps = "; free space and run the same command again" if number in _FULL else ""
  return f"{os.strerror(number)}{helps}"


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turn what the system refuses while a file or a folder is written into one line.

  Raises:
    InputError: it cannot be written.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    if (why := refusal(error)) is None:
      raise
    raise InputError(f"{path} cannot be written: {why}.") from error


def check_folder(path: pathlib.Path) -> None:
  """Refuse to put a folder where a file or a link is; nothing is moved out of the way.

  Raises:
    InputError: there is one.
  """
  with writing(path):
    if path.is_symlink() or (path.exists() and not path.is_dir()):
      kind = "link" if path.is_symlink() else "file"
      raise InputError(f"{path} is a {kind} and not a folder; move it away or choose another path.")


def check_file(path: str | os.PathLike) -> None:
  """Refuse to read what is there and no file: a folder, a pipe or a device, which may never end.

  Raises:
    OSError: it is one of these.
  """
  path = pathlib.Path(path)
  if path.exists() and not path.is_file():
    raise OSError(0, "a directory" if path.is_dir() else "a pipe or a device, not a file")


@contextlib.contextmanager
def fresh(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yield an empty hidden folder beside a path; at the end it is gone, unless it was renamed.

  Those that writers of the same path left when they were killed go first. Folders around it that
  were made for it go with it.

  Raises:
    InputError: it cannot be made.
  """
  path = pathlib.Path(os.path.abspath(path))  # "." has no name
  with writing(path):
    around = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # a place that cannot be listed may still be written
      _sweep(path)
    folder = path.with_name(f".{path.name}.{_host():08x}-{os.getpid()}.new")
    folder.mkdir()
  lock = os.open(folder, os.O_RDONLY) if fcntl is not None else None
  try:
    _lock(lock)
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # until the first that holds something
      for empty in around:
        empty.rmdir()
    if lock is not None:
      os.close(lock)


@contextlib.contextmanager
def fresh_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yield an empty hidden file beside a path; it takes the path's place, whole, at the end.

  After an exception what was there stays as it was.

  Raises:
    InputError: the path is a folder, or nothing can be written beside it.
  """
  target = pathlib.Path(os.path.realpath(path))
  file = target.with_name(f".{target.name}.{_host():08x}-{os.getpid()}.new")
  with writing(path):
    if not target.name or (target.exists() and not target.is_file()):
      kind = "a folder" if not target.name or target.is_dir() else "no plain file"
      raise InputError(f"{path} is {kind}; name a file, new or old.")
    file.write_bytes(b"")
  try:
    yield file
    with writing(path):
      file.replace(target)
  finally:
    file.unlink(missing_ok=True)


def replace(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Rename a folder to a path; the folder that is there goes when the new one is in its place.

  Raises:
    InputError: it cannot be written, or is a file or a link.
  """
  check_folder(path)
  old = _old(path)
  with writing(path):
    if path.exists():
      path.rename(old)
    folder.rename(path)
  shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[None]:
  """Hold a path as the only writer: a hidden lock file beside it names process and machine.

  The lock goes with its process, however that ends. On file systems without locks the process that
  the file names is asked for instead.

  Raises:
    InputError: another process writes there, or the lock file cannot be written.
  """
  path = pathlib.Path(os.path.abspath(path))
  file = path.with_name(f".{path.name}.lock")
  with writing(file):
    stream = _locked(file, path)
  try:
    yield
  finally:
    file.unlink(missing_ok=True)
    os.close(stream)


def _locked(file, path) -> int:
  """Return the open lock file."""
  while True:
    stream = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      got = _lock(stream)
      holder = os.pread(stream, 400, 0).decode("utf-8", "replace").split()
      if got is False or (got is None and _runs(holder)):
        pid, host = (*holder, "?", "?")[:2]
        raise InputError(
          f"{path} is being written by process {pid} on {host}; wait for it, end it or choose "
          "another place."
        )
      if got and not _still(stream, file):
        os.close(stream)  # its last holder has just removed it
        continue
      os.ftruncate(stream, 0)
      os.pwrite(stream, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except BaseException:
      os.close(stream)
      raise
    return stream


def _still(stream, file) -> bool:
  try:
    return os.path.samestat(os.fstat(stream), os.stat(file))
  except FileNotFoundError:
    return False


def _runs(holder) -> bool:
  """Return whether a lock file names another process of this machine that is alive."""
  pid, host = (*holder, "", "")[:2]
  if host != socket.gethostname() or not pid.isdecimal() or int(pid) == os.getpid():
    return False
  return _alive(int(pid))


def _lock(stream) -> bool | None:
  """Lock an open file or folder; None: not possible here, False: another process holds it."""
  if fcntl is None or stream is None:
    return None
  try:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # a file system without locks
    return None
  return True


def _old(path) -> pathlib.Path:
  return path.with_name(f".{path.name}.{_host():08x}-{os.getpid()}.old")


def _sweep(path) -> None:
  """Remove hidden folders of a path whose makers are gone.

  Killed between two renames, a writer leaves the folder that was there under its hidden name: it
  gets its name back.
  """
  pattern = re.compile(re.escape(f".{path.name}.") + r"([0-9a-f]{8})-(\d+)\.(new|old)")
  found = [(entry, pattern.fullmatch(entry.name)) for entry in path.parent.iterdir()]
  for folder, name in sorted((f, n) for f, n in found if n is not None):
    if not _left_behind(folder, int(name[1], 16), int(name[2])):
      continue
    if name[3] == "old" and not path.exists():
      folder.rename(path)
    else:
      shutil.rmtree(folder, ignore_errors=True)


def _left_behind(folder, host, pid) -> bool:
  """Return whether the maker of a hidden folder is gone; in doubt it is not."""
  if _held(folder):
    return False
  if _last_written(folder) < time.time() - _QUIET:
    return True
  return host == _host() and (pid == os.getpid() or not _alive(pid))


def _held(folder) -> bool:
  if fcntl is None:
    return False
  stream = os.open(folder, os.O_RDONLY)
  try:
    return _lock(stream) is False
  finally:
    os.close(stream)


def _last_written(folder) -> float:
  """Return when something in a folder was last written; now, if it changes while one looks."""
  try:
    return max(entry.stat().st_mtime for entry in (folder, *folder.rglob("*")))
  except OSError:
    return time.time()


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except (OSError, OverflowError):  # another user's
    return True
  return True


def _host() -> int:
  return zlib.crc32(socket.gethostname().encode())
