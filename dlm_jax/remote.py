# SPDX-License-Identifier: Apache-2.0
"""Files that are elsewhere: gs://, s3:// and whatever else `etils.epath` reaches.

Weights are mapped and records are read by libraries that know files of this machine only. So what
is read from a store is copied here first (`fetch`), what is written there is finished here first
(`publish`), and all code in between has local paths. A store has no rename of folders and no
appending: one file of a folder, written last and removed first, says that the rest is complete.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from dlm_jax import disk
from dlm_jax.errors import InputError

try:
  import fcntl
except ImportError:  # Windows has no such locks
  fcntl = None

CACHE = "DLM_JAX_CACHE"  # names the folder of copies; default ~/.cache/dlm_jax
MARKERS = ("config.json", "dataset.json")  # the last files of a network and of a dataset


def is_remote(path: epath.PathLike) -> bool:
  """Return whether a path is of a store rather than of this machine."""
  return "://" in os.fspath(path)


def fetch(path: epath.PathLike) -> pathlib.Path:
  """Return a local file or folder with the content of a path: itself, or a copy of a remote one.

  Files that are here already in the same size and of the same time are not copied again; of several
  processes one copies and the others wait.

  Raises:
    InputError: the store cannot be reached or read.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  copy = copy_of(path)
  with _readable(path), _alone(copy.parent):
    return _fetch(epath.Path(path), copy)


def exists(path: epath.PathLike) -> bool:
  """Return whether there is a file or a folder.

  Raises:
    InputError: the store cannot be reached.
  """
  with _readable(path):
    return epath.Path(path).exists()


@contextlib.contextmanager
def publish(path: epath.PathLike) -> Iterator[pathlib.Path]:
  """Yield an empty local folder; what is in it afterwards takes the place of a folder, whole.

  On this machine that is a rename. In a store, the marker of the old folder goes first and that of
  the new one comes last, so no reader takes files of two networks for one. After an exception the
  old folder stays as it was; after a kill too, and the next call removes what was begun.

  Raises:
    InputError: it cannot be written, or is a file or a link.
  """
  if is_remote(path):
    with tempfile.TemporaryDirectory(prefix="dlm_jax_") as folder:
      with disk.writing(path):
        yield pathlib.Path(folder)
      upload(folder, path)
    return
  directory = pathlib.Path(os.path.abspath(path))
  disk.check_folder(directory)
  with disk.fresh(directory) as fresh:
    with disk.writing(path):
      yield fresh
    disk.replace(fresh, directory)


def upload(folder: str | os.PathLike, path: epath.PathLike) -> None:
  """Put the files of a local folder in the place of a remote one; see `publish`.

  Raises:
    InputError: it cannot be written.
  """
  folder, target = pathlib.Path(folder), epath.Path(path)
  with _writable(path):
    names = sorted(_files(epath.Path(folder)), key=lambda name: (name in MARKERS, name))
    for marker in MARKERS:
      (target / marker).unlink(missing_ok=True)
    old = set(_files(target)) if target.is_dir() else set()
    for name in names:
      _upload_file(folder / name, target / name)
    for name in old - set(names):
      (target / name).unlink()


def glob(pattern: str) -> list[pathlib.Path]:
  """Return local copies of the remote files that a pattern matches.

  Raises:
    InputError: the store cannot be reached.
  """
  with _readable(pattern):
    scheme, rest = pattern.split("://", 1)
    bucket, _, pattern = rest.partition("/")
    found = sorted(p for p in epath.Path(f"{scheme}://{bucket}").glob(pattern) if p.is_file())
  return [fetch(path) for path in found]


class Mirror:
  """Files that are written here and copied to a remote folder; of a local folder, that folder.

  For what grows, such as metrics: a store cannot append. `folder` is where to write; of a remote
  one it belongs to this mirror alone, is none of the copies of `fetch`, and goes with the mirror.

  Args:
    path: the folder.
    names: files and folders that are taken over from there at first, if they exist.

  Raises:
    InputError: the store cannot be reached.
  """

  def __init__(self, path: epath.PathLike, names: tuple[str, ...] = ()):
    self._target, self._sent, self._synced = None, {}, time.monotonic()
    if not is_remote(path):
      self.folder = pathlib.Path(path)
      return
    self._target = epath.Path(path)
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="dlm_jax_"))
    weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
    with _readable(path):
      for name in names:
        if (self._target / name).exists():
          _fetch(self._target / name, self.folder / name)

  def sync(self, least_seconds: float = 0.0) -> None:
    """Copy what has changed, unless that was done within so many seconds.

    Raises:
      InputError: it cannot be written.
    """
    if self._target is None or time.monotonic() - self._synced < least_seconds:
      return
    with _writable(self._target):
      for name in sorted(_files(epath.Path(self.folder))):
        stat = (self.folder / name).stat()
        version = (stat.st_size, stat.st_mtime_ns)
        if not pathlib.PurePath(name).name.startswith(".") and self._sent.get(name) != version:
          _upload_file(self.folder / name, self._target / name)
          self._sent[name] = version
    self._synced = time.monotonic()


def write_json(path: epath.PathLike, data: Any) -> None:
  """Write a file of JSON so that an interrupt leaves the old one or the new one.

  Raises:
    InputError: it cannot be written.
  """
  text = json.dumps(data, indent=2) + "\n"
  if is_remote(path):
    epath.Path(path).write_text(text)  # appears when it is complete
    return
  file = pathlib.Path(path)
  temporary = file.with_name(f".{file.name}.tmp")
  with disk.writing(file):
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def copy_of(path) -> pathlib.Path:
  """Return where the local copy of a remote path lies, once it is made."""
  name = os.fspath(path).rstrip("/")
  root = pathlib.Path(os.environ.get(CACHE) or "~/.cache/dlm_jax").expanduser()
  digest = hashlib.sha256(name.encode()).hexdigest()[:16]
  return root / digest / name.rsplit("/", 1)[-1]


@contextlib.contextmanager
def _alone(folder: pathlib.Path):
  """Let one process of this machine after the other into a folder of copies."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".lock").open("w") as lock:
    if fcntl is not None:
      with contextlib.suppress(OSError):  # a file system without locks: whole files all the same
        fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _fetch(source: epath.Path, target: pathlib.Path) -> pathlib.Path:
  if not source.is_dir():
    if not source.exists():
      raise InputError(f"{source} does not exist.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _fetch_file(source, target)
    return target
  wanted = list(_files(source))
  target.mkdir(parents=True, exist_ok=True)
  for name in wanted:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    _fetch_file(source / name, target / name)
  for name in set(_files(epath.Path(target))) - set(wanted):
    if not pathlib.PurePath(name).name.startswith("."):
      (target / name).unlink(missing_ok=True)
  return target


def _fetch_file(source: epath.Path, target: pathlib.Path) -> None:
  """Copy a file unless the copy is of the same version."""
  stat, note = source.stat(), target.with_name(f".{target.name}.version")
  version = json.dumps([stat.length, stat.mtime])
  if target.exists() and note.exists() and note.read_text() == version:
    return
  logging.info("copying %s (%d bytes) to %s", source, stat.length, target)
  note.unlink(missing_ok=True)
  # another process may be copying the same file: each finishes its own, the last one stays
  with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as stream:
    try:
      with source.open("rb") as content:
        shutil.copyfileobj(content, stream, 2**22)
      os.replace(stream.name, target)
    except BaseException:
      os.unlink(stream.name)
      raise
  note.write_text(version)


def _files(folder: epath.Path) -> Iterator[str]:
  """Yield the paths of all files below a folder, relative to it."""
  for entry in folder.iterdir():
    if entry.is_dir():
      yield from (f"{entry.name}/{name}" for name in _files(entry))
    else:
      yield entry.name


def _upload_file(source: pathlib.Path, target: epath.Path) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  with source.open("rb") as content, target.open("wb") as stream:
    shutil.copyfileobj(content, stream, 2**22)


@contextlib.contextmanager
def _readable(path):
  """Turn what stores raise into one line; they raise many types."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    raise InputError(f"{path} cannot be read: {_first_line(error)}{_advice(path)}") from error


@contextlib.contextmanager
def _writable(path):
  try:
    yield
  except Exception as error:
    raise InputError(f"{path} cannot be written: {_first_line(error)}{_advice(path)}") from error


def _advice(path) -> str:
  needed = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}.get(os.fspath(path).split("://")[0])
  return f" (a store of this kind needs the package {needed})" if needed else ""


def _first_line(error: Exception) -> str:
  text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
  return text.splitlines()[0][:300]
