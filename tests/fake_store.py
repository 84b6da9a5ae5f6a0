# SPDX-License-Identifier: Apache-2.0
"""A store behind gs:// that is a folder of this machine: for everything that reads remote paths."""

import pathlib

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils


class Store(DirFileSystem):
  """gs://bucket/name is root/bucket/name; as in a store, there is no appending."""

  protocol = ("gs", "gcs")

  def __init__(self, root, **kwargs):
    del kwargs
    super().__init__(path=str(root), fs=LocalFileSystem(auto_mkdir=True), skip_instance_cache=True)

  def _join(self, path):
    if isinstance(path, str):
      path = path.removeprefix("gs://")
    return super()._join(path)

  def open(self, path, mode="rb", **kwargs):
    if "a" in mode or "+" in mode:
      raise ValueError(f"a store cannot append to {path}.")
    return super().open(path, mode, **kwargs)


@pytest.fixture
def store(tmp_path, monkeypatch) -> pathlib.Path:
  """Return the folder that is behind gs:// during a test; copies lie in one of their own."""
  root = tmp_path / "store"
  (root / "bucket").mkdir(parents=True)
  system = Store(root)
  monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: system)
  backend.fsspec_backend._get_filesystem.cache_clear()
  plain = tensorstore_utils._normalize_path
  monkeypatch.setattr(
    tensorstore_utils, "_normalize_path", lambda path: plain(path).replace("gs://", f"{root}/")
  )
  monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
  monkeypatch.setenv("DLM_JAX_CACHE", str(tmp_path / "copies"))
  yield root
  backend.fsspec_backend._get_filesystem.cache_clear()
