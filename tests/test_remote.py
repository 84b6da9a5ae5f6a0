# SPDX-License-Identifier: Apache-2.0
"""Remote paths: copies, replacement as a whole, mirrors; and a whole run through a store."""

import concurrent.futures
import gc
import json
import os
import pathlib
import shutil
import time

import fsspec
import pytest
import tiny_runs
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

import dlm_jax
from dlm_jax import remote
from dlm_jax.cli import main
from dlm_jax.errors import InputError
from dlm_jax.experiment import build, plan


class Store(DirFileSystem):
  """gs://bucket/name is root/bucket/name; as in a store, there is no appending."""

  protocol = ("gs", "gcs")

  def __init__(self, root, **kwargs):
    del kwargs
    super().__init__(path=str(root), fs=LocalFileSystem(auto_mkdir=True), skip_instance_cache=True)
    self.listed, self.opened = [], []

  def _join(self, path):
    if isinstance(path, str):
      path = path.removeprefix("gs://")
    return super()._join(path)

  def open(self, path, mode="rb", **kwargs):
    if "a" in mode or "+" in mode:
      raise ValueError(f"a store cannot append to {path}.")
    self.opened.append(path)
    return super().open(path, mode, **kwargs)

  def listdir(self, path, detail=True, **kwargs):
    self.listed.append(path)
    return super().listdir(path, detail=detail, **kwargs)


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


def test_a_copy_is_made_once_and_follows_the_store(store):
  folder = store / "bucket" / "network"
  (folder / "deep").mkdir(parents=True)
  (folder / "config.json").write_text("1")
  (folder / "deep" / "a").write_text("a")
  copy = remote.fetch("gs://bucket/network")
  assert (copy / "config.json").read_text() == "1" and (copy / "deep" / "a").read_text() == "a"
  (copy / "config.json").write_text("kept")  # were it copied again, this would be gone
  assert (remote.fetch("gs://bucket/network") / "config.json").read_text() == "kept"
  (folder / "config.json").write_text("22")
  (folder / "deep" / "a").unlink()
  copy = remote.fetch("gs://bucket/network")
  assert (copy / "config.json").read_text() == "22" and not (copy / "deep" / "a").exists()
  assert remote.fetch(str(folder)) == folder


@pytest.mark.parametrize("where", ["gs://bucket/network", "here"])
def test_a_folder_is_replaced_whole(store, tmp_path, where):
  path = where if remote.is_remote(where) else str(tmp_path / where)
  with remote.publish(path) as folder:
    (folder / "config.json").write_text("old")
    (folder / "extra").write_text("x")
  with pytest.raises(KeyError), remote.publish(path) as folder:
    (folder / "config.json").write_text("half")
    raise KeyError
  assert (remote.fetch(path) / "config.json").read_text() == "old"
  with remote.publish(path) as folder:
    (folder / "config.json").write_text("newer")
  found = remote.fetch(path)
  assert (found / "config.json").read_text() == "newer" and not (found / "extra").exists()


def test_the_marker_comes_last(store, monkeypatch):
  order = []
  plain = remote._upload_file
  monkeypatch.setattr(
    remote, "_upload_file", lambda file, to: (order.append(file.name), plain(file, to))
  )
  with remote.publish("gs://bucket/network") as folder:
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
      (folder / name).write_text(name)
  assert order[-1] == "config.json"


def test_a_mirror_sends_what_changed(store):
  (store / "bucket" / "metrics.jsonl").write_text("first\n")
  mirror = remote.Mirror("gs://bucket", ("metrics.jsonl", "tensorboard"))
  with (mirror.folder / "metrics.jsonl").open("a") as file:
    file.write("second\n")
  mirror.sync(3600.0)
  assert (store / "bucket" / "metrics.jsonl").read_text() == "first\n"
  mirror.sync()
  assert (store / "bucket" / "metrics.jsonl").read_text() == "first\nsecond\n"


def test_a_mirror_and_copies_of_one_folder_leave_each_other_alone(store):
  (store / "bucket" / "config.json").write_text("{}")
  (store / "bucket" / "metrics.jsonl").write_text("first\n")
  mirror = remote.Mirror("gs://bucket", ("metrics.jsonl",))
  (mirror.folder / "metrics.jsonl").write_text("ours, not sent yet\n")
  copy = remote.fetch("gs://bucket")
  assert (copy / "metrics.jsonl").read_text() == "first\n"
  other = remote.Mirror("gs://bucket", ("metrics.jsonl",))
  assert (other.folder / "metrics.jsonl").read_text() == "first\n"
  assert (mirror.folder / "metrics.jsonl").read_text() == "ours, not sent yet\n"
  assert (copy / "config.json").exists() and len({copy, mirror.folder, other.folder}) == 3
  mirror.sync()
  assert (store / "bucket" / "metrics.jsonl").read_text() == "ours, not sent yet\n"
  folder = mirror.folder
  del mirror
  gc.collect()
  assert not folder.exists() and other.folder.exists()


def test_several_at_once_copy_once(store, monkeypatch):
  """Threads stand for processes: the lock is one of files, and both open their own."""
  for name in ("config.json", "model.safetensors"):
    (store / "bucket" / name).write_text(name)
  system, plain = fsspec.filesystem("gs"), remote._fetch_file

  def slow(source, target):
    time.sleep(0.1)
    plain(source, target)

  monkeypatch.setattr(remote, "_fetch_file", slow)
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    copies = list(pool.map(remote.fetch, ["gs://bucket"] * 3))
  assert len(system.opened) == 2, "each file is read once"
  assert {(copy / "config.json").read_text() for copy in copies} == {"config.json"}


def test_what_cannot_be_reached_is_one_line(store):
  with pytest.raises(InputError, match="gs://bucket/nothing does not exist"):
    remote.fetch("gs://bucket/nothing")
  with pytest.raises(InputError, match="gs://bucket/none holds no network"):
    dlm_jax.load("gs://bucket/none")


def test_a_run_through_a_store(store, capsys):
  """Corpus, dataset, teacher, workdir, samples: all behind gs://; the same as through folders."""
  tiny = tiny_runs.make()
  (store / "bucket" / "corpus.jsonl").write_bytes(tiny.corpus.read_bytes())
  data = {"data__source": "files:gs://bucket/*.jsonl", "data__directory": "gs://bucket/data"}
  config = tiny.config("teacher", **data)
  with config.unlocked():
    config.data.options.tests = None  # an option of the standard library; our corpus is a file
  assert build.prepare(plan.read_data(config), progress=False).created
  assert (store / "bucket" / "data" / "dataset.json").exists()
  assert not build.prepare(plan.read_data(config), progress=False).created
  shutil.rmtree(store / "bucket" / "data")
  found = build.prepare(plan.read_data(config), progress=False)
  assert found.created, "a copy that is left is not the dataset"
  listed = fsspec.filesystem("gs").listed
  for steps in ("2", "6"):  # the second run resumes the first
    flags = tiny.flags("teacher", **data, train__steps=steps, evaluate__every="2")
    listed.clear()
    main.main(["train", *flags, "--workdir=gs://bucket/run"])
    assert listed.count("gs://bucket/data") == 1, "opened once a run"
  run = store / "bucket" / "run"
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 7))
  assert any(name.startswith("events") for name in os.listdir(run / "tensorboard"))
  assert (run / "best" / "config.json").exists() and (run / "final" / "model.safetensors").exists()
  capsys.readouterr()
  sample = ["--steps=2", "--num=2", "--seed=3"]
  listed.clear()
  main.main(["sample", "--checkpoint=gs://bucket/run", *sample])
  assert listed.count("gs://bucket/run/best") == 1
  there = capsys.readouterr().out
  main.main(["sample", f"--checkpoint={run}", *sample])
  assert there == capsys.readouterr().out and there.strip()
  listed.clear()
  here = ["--sequences=8", "--batch_size=4"]
  main.main(["evaluate", f"--checkpoint={run}", "--data=gs://bucket/data", *here])
  assert listed.count("gs://bucket/data") == 1 and "perplexity" in capsys.readouterr().out
  main.main(["convert", "--checkpoint=gs://bucket/run", "--out=gs://bucket/converted"])
  assert (store / "bucket" / "converted" / "tokenizer.json").exists()
