# SPDX-License-Identifier: Apache-2.0
"""A network is saved whole or not at all, and only what would be loaded again."""

import functools
import inspect
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder
import tiny_runs
from safetensors import SafetensorError

from dlm_jax import convert, models, process, schedules
from dlm_jax.cli import main
from dlm_jax.convert import files
from dlm_jax.errors import InputError

_DIT = models.DiT(models.DiTConfig(vocab_size=9, dim=8, layers=1, heads=2, length=5, cond_dim=6))
_CAUSAL = models.Causal(models.CausalConfig(vocab_size=9, dim=8, layers=1, heads=2, length=5))
_PROC = process.Absorbing(vocab_size=9, mask_id=8)
_FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def _save(*given, **options):
  """Call `convert.save` as users do, who have no checks of types around it."""
  inspect.unwrap(convert.save)(*given, **options)


@functools.cache
def _params(model, seed=0):
  shapes = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def _other_shape(params):
  return params | {"embed": jax.tree.map(lambda x: x[:-1], params["embed"])}


def _one_nan(params):
  return params | {"embed": jax.tree.map(lambda x: x.at[2, 3].set(jnp.nan), params["embed"])}


_CASES = {
  "dtype": ({"dtype": "int8"}, r"dtype='int8' is unknown; use one of float32, bfloat16"),
  "process": ({"proc": None}, r"a DiT is saved with its process, one of absorbing, .*uniform"),
  "taken": ({"extra": {"process": None}}, r"extra: 'process' is what is stored of `proc`"),
  "object": ({"extra": {"a": object()}}, r"config.json cannot hold .* \(Object of type object"),
  "nan": ({"extra": {"a": float("nan")}}, r"config.json cannot hold .* not JSON compliant"),
  "block": ({"block_length": "x"}, r"block_length='x' is not a number of tokens; use 1 or more"),
  "none": ({"block_length": 0}, r"block_length=0 is not a number of tokens"),
  "beside": ({"beside": {"critic": None}}, r"beside: 'critic' is unknown.*discriminator"),
  "shape": ({"params": _other_shape}, r"parameter embed.* is \(8, 8\); the network has \(9, 8\)"),
  "empty": ({"params": lambda _: {}}, r"parameter .* of the DiT is missing"),
  "stranger": ({"params": lambda p: p | {"more": p["embed"]}}, r"parameter more.* is unknown"),
  "weights": ({"params": _one_nan}, r"tensor .* holds numbers that are NaN or infinite in float32"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Return a network on disk, and its parameters."""
  path, params = tmp_path_factory.mktemp("saved") / "network", _params(_DIT)
  convert.save(path, _DIT, params, _PROC)
  return path, params


def _content(folder):
  return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*")}


@pytest.mark.parametrize("case", sorted(_CASES))
def test_what_would_not_be_loaded_is_not_written(saved, case):
  """Neither where nothing is nor over a good network."""
  (path, params), (change, said) = saved, _CASES[case]
  given, before = {"params": lambda p: p, "proc": _PROC} | change, _content(path.parent)
  params, proc = given.pop("params")(params), given.pop("proc")
  for where in (path, path.with_name("new")):
    with pytest.raises(InputError, match=said) as caught:
      _save(where, _DIT, params, proc, **given)
    assert "\n" not in str(caught.value)
  assert _content(path.parent) == before


def test_a_process_that_would_be_lost(tmp_path):
  with pytest.raises(InputError, match="a Causal has no process; leave out Absorbing"):
    convert.save(tmp_path / "network", _CAUSAL, _params(_CAUSAL), _PROC)
  model, params = tiny_decoder.make()
  noise = process.Absorbing(vocab_size=tiny_decoder.V, mask_id=39)
  with pytest.raises(InputError, match=r"block_length=True is not a number|block_size"):
    _save(tmp_path / "network", model, params, noise, block_length=True)
  assert not list(tmp_path.iterdir())


def test_of_the_process_of_a_decoder_the_mask_is_kept(tmp_path):
  """Its schedule is of its training; what is written of it reads back as the default one."""
  model, params = tiny_decoder.make()
  noise = {"vocab_size": tiny_decoder.V, "mask_id": 39}
  trained = process.Absorbing(**noise, schedule=schedules.Polynomial(power=3.0, eps=0.01))
  convert.save(tmp_path / "network", model, params, trained, block_length=4)
  assert convert.load(tmp_path / "network")[2] == process.Absorbing(**noise)


def test_a_network_is_replaced_and_nothing_else(tmp_path):
  path, first, second = tmp_path / "network", _params(_DIT), _params(_DIT, 1)
  convert.save(path, _DIT, first, _PROC, shard_bytes=600)
  convert.save(path, _DIT, second, _PROC)
  assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "model.safetensors"]
  jax.tree.map(np.testing.assert_array_equal, convert.load(path)[1], second)
  (path / "config.json").unlink()
  with pytest.raises(InputError, match=r"network holds model.safetensors and no network"):
    convert.save(path, _DIT, first, _PROC)
  assert (path / "model.safetensors").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
  path, params = tmp_path / "network", _params(_DIT)
  convert.save(path, _DIT, params, _PROC)

  def full(tensors, file, metadata):
    with open(file, "w") as stream:
      stream.write("half")
    raise SafetensorError(_FULL)

  with monkeypatch.context() as patch:
    patch.setattr(files, "save_file", full)
    for where in (path, tmp_path / "new"):
      with pytest.raises(InputError, match="No space left on device; free space and run") as caught:
        convert.save(where, _DIT, _params(_DIT, 1), _PROC)
      assert "\n" not in str(caught.value)
    with pytest.raises(SafetensorError):
      files.write(path / "discriminator.safetensors", {})
  assert [entry.name for entry in tmp_path.iterdir()] == ["network"]
  assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "model.safetensors"]
  jax.tree.map(np.testing.assert_array_equal, convert.load(path)[1], params)


_KILLED = """
import sys, time
from dlm_jax.cli import main
from dlm_jax.convert import files
plain = files.save_file
def save_file(tensors, file, metadata):
  plain(tensors, file, metadata=metadata)
  print("written", flush=True)
  time.sleep(120)
files.save_file = save_file
main.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_convert_that_was_killed_is_repeated(tmp_path, capsys):
  """SIGKILL once the weights are written: the same command then works and clears the rest away."""
  out = tmp_path / "out"
  command = ["convert", f"--checkpoint={tiny_runs.make().teacher}", f"--out={out}"]
  child = subprocess.Popen(
    [sys.executable, "-c", _KILLED, *command],
    env=tiny_runs.environment(),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == "written\n"
  os.kill(child.pid, signal.SIGKILL)
  child.communicate()
  assert not out.exists()
  (hidden,) = tmp_path.iterdir()
  assert any(file.name.startswith("model.safetensors") for file in hidden.iterdir())
  assert main.main(command) == 0, capsys.readouterr().err
  assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
  assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in out.iterdir()}


@pytest.mark.parametrize(
  "place, said",
  [
    ("file", "file is a file and not a folder; move it away or choose another path"),
    ("link", "link is a link and not a folder; move it away or choose another path"),
    ("used", "--out=.*used is not empty; choose a new directory"),
    ("x" * 5000, "cannot be written: File name too long"),
    ("file/below", "cannot be written: Not a directory|File exists"),
  ],
)
def test_places_that_are_taken(tmp_path, capsys, monkeypatch, place, said):
  (tmp_path / "file").write_text("mine")
  (tmp_path / "link").symlink_to(tmp_path)
  (tmp_path / "used").mkdir()
  (tmp_path / "used" / "mine").write_text("mine")
  before = sorted(tmp_path.rglob("*"))
  monkeypatch.setattr(convert, "open_network", lambda *a, **k: pytest.fail("read before"))
  assert main.main(["convert", "--checkpoint=nowhere", f"--out={tmp_path / place}"]) == 2
  captured = capsys.readouterr()
  assert re.search(said, captured.err), captured.err
  assert captured.err.count("\n") == 1 and not captured.out
  assert sorted(tmp_path.rglob("*")) == before
