# SPDX-License-Identifier: Apache-2.0
"""Where a network lies and what it is called: links, caches."""

import json
import pathlib
import shutil

import pytest

import dlm_jax
from dlm_jax import convert
from dlm_jax.convert import places
from dlm_jax.errors import InputError

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


@pytest.mark.parametrize(
  ("path", "said"),
  [
    (
      "org/some-name",
      "there is no such folder, and names of a hub are not read; fetch it, `hf download "
      "org/some-name --local-dir some-name` (extra hub), and give that folder.",
    ),
    ("gpt3", "names of a hub are not read; fetch it, `hf download gpt3 --local-dir gpt3`"),
    ("novels-student", "the shipped network of that name is shipped:novels-student."),
    ("novels-studnet", "give that folder (did you mean 'novels-student'?)"),
    ("runs/studnet", "there is no such folder (did you mean 'student'?); it was looked for in"),
    ("stduents", "there is no such folder (did you mean 'students'?)"),
    ("runs/other", "there is no such folder; check the path (looked from "),
    ("/none/at/all", "there is no such folder; check the path (looked from "),
    ("a b/c", "there is no such folder; check the path"),
    ("runs/student", "expected config.json and model.safetensors in it, in best/ or in final/."),
  ],
)
def test_a_name_of_nothing(tmp_path, monkeypatch, path, said):
  """Of a hub, of a shipped network, or mistyped: what to do is in the line."""
  (tmp_path / "runs" / "student").mkdir(parents=True)
  (tmp_path / "students").mkdir()
  monkeypatch.chdir(tmp_path)
  for read in (places.find_network, dlm_jax.load):
    with pytest.raises(InputError) as caught:
      read(path)
    assert str(caught.value).startswith(f"{path} holds no network: ") and said in str(caught.value)


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
