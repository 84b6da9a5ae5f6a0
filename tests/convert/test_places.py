# SPDX-License-Identifier: Apache-2.0
"""Where a network lies and what it is called: links, caches."""

import json
import pathlib
import shutil

import pytest

from dlm_jax import convert
from dlm_jax.convert import places

SDAR = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints" / "sdar_bf16"


@pytest.fixture
def network(tmp_path):
  """Return a function: directory -> a checkpoint there that does not say its block length."""

  def make(folder):
    folder = tmp_path / folder
    shutil.copytree(SDAR, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config.pop("block_size")
    (folder / "config.json").write_text(json.dumps(config))
    return folder

  return make


_HASH = "0a1b2c3"
_SNAPSHOT = f"hub/models--JetAstra--SDAR-1.7B-Chat-b8/snapshots/{_HASH}"


def _link(name, target):
  name.parent.mkdir(parents=True, exist_ok=True)
  name.symlink_to(target, target_is_directory=True)
  return name


@pytest.mark.parametrize(
  "layout",
  ["named", "link says", "target says", "middle says", "relative", "snapshot", "link to snapshot"],
)
def test_block_length_of_links_and_caches(network, tmp_path, monkeypatch, layout):
  if layout == "named":
    path = network("SDAR-b8")
  elif layout == "link says":
    path = _link(tmp_path / "SDAR-1.7B-Chat-b8", network(_HASH))
  elif layout == "target says":
    path = _link(tmp_path / "latest", network("SDAR-b8"))
  elif layout == "middle says":
    path = _link(tmp_path / "latest", _link(tmp_path / "SDAR-b8", network(_HASH)))
  elif layout == "relative":
    _link(tmp_path / "SDAR-b8", pathlib.Path(_HASH))
    network(_HASH)
    monkeypatch.chdir(tmp_path / "SDAR-b8")
    monkeypatch.setenv("PWD", str(tmp_path / "SDAR-b8"))
    path = _link(tmp_path / "x" / "y", pathlib.Path("../SDAR-b8"))
  elif layout == "snapshot":
    path = network(_SNAPSHOT)
  else:
    path = _link(tmp_path / "mine", network(_SNAPSHOT))
  assert convert.block_length(path) == convert.block_length(str(path)) == 8


def test_the_given_name_comes_first(network, tmp_path):
  path = _link(tmp_path / "SDAR-b4", network("SDAR-b8"))
  assert convert.block_length(path) == 4
  assert next(places.names(path)) == "SDAR-b4"


@pytest.mark.parametrize("name", ["SDAR", "SDAR-b8-final", "SDAR-b0", "SDAR-b", "b8"])
def test_names_that_say_nothing(network, name):
  assert convert.block_length(network(name)) is None
