# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save: read without torch, and never run. The files are written by hand here."""

import io
import json
import os
import pathlib
import pickle
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
from safetensors.numpy import load_file
from torch_files import Code, call, opcodes, write

from dlm_jax import convert
from dlm_jax.convert import mdlm_layout, torch_file
from dlm_jax.errors import InputError

CHECKPOINTS = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints"


class _Hostile:
  """Creates a directory when unpickled by an ordinary unpickler."""

  def __init__(self, target):
    self.target = str(target)

  def __reduce__(self):
    return os.mkdir, (self.target,)


# --- the format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(torch_files.STORAGES))
def test_every_dtype_and_orientation(tmp_path, dtype):
  array = np.arange(12).reshape(3, 4).astype(jnp.dtype(dtype))
  content = {"a": array, "t": array.T, "scalar": array[2, 1], "none": [None, True, 3, ("x",)]}
  back = torch_file.read(write(tmp_path / "x.pt", content))
  for name in ("a", "t", "scalar"):
    assert back[name].dtype == array.dtype and back[name].shape == content[name].shape
    np.testing.assert_array_equal(np.asarray(back[name]), content[name])
  assert back["none"] == [None, True, 3, ("x",)]
  assert np.asarray(back["a"], np.float32).dtype == np.float32


def test_what_frameworks_store_beside_the_weights_is_not_built(tmp_path):
  built = call("omegaconf.dictconfig.DictConfig")
  state = Code(bytes(built) + opcodes({"a": 1}, []) + b"b")  # BUILD: sets a state
  items = Code(bytes(call("collections.defaultdict", 1)) + b"(X\x01\0\0\0kK\x01u")  # SETITEMS
  raw = call("_codecs.encode", "abc", "latin1")
  content = {"hyper_parameters": [state, items, raw], "x": np.ones(2, np.float32)}
  back = torch_file.read(write(tmp_path / "x.ckpt", content))
  assert {type(item).__name__ for item in back["hyper_parameters"]} == {"Placeholder"}
  assert not any(vars(item) for item in back["hyper_parameters"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_file_is_refused_and_not_run(tmp_path, zipped, protocol):
  target, file = tmp_path / "harm", tmp_path / "x.ckpt"
  data = pickle.dumps({"state_dict": _Hostile(target)}, protocol)
  if zipped:
    with zipfile.ZipFile(file, "w") as archive:
      archive.writestr("archive/data.pkl", data)
  else:
    file.write_bytes(data)
  with pytest.raises(InputError, match=r"\.mkdir" if zipped else "bare pickle"):
    torch_file.read(file)
  assert not target.exists()
  pickle.load(io.BytesIO(data))
  assert target.exists()  # the file does harm those who trust it


@pytest.mark.parametrize(
  "name",
  [
    "builtins.eval",
    "__builtin__.eval",
    "builtins.getattr",
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "numpy.load",
    "torch.load",
    "torch.hub.load",
    "torch.storage._load_from_bytes",
    "dlm_jax.convert.save",
    "operator.attrgetter",
  ],
)
def test_unknown_globals_are_named(tmp_path, name):
  with pytest.raises(InputError, match=name.replace("__builtin__", "builtins")):
    torch_file.read(write(tmp_path / "x.pt", {"a": call(name, "1")}))


def _tensor(offset, shape, strides, key="0", kind="FloatStorage"):
  pid = Code(opcodes(("storage", Code(f"ctorch\n{kind}\n".encode()), key, "cpu", 4), []) + b"Q")
  return call("torch._utils._rebuild_tensor_v2", pid, offset, shape, strides, False, {})


@pytest.mark.parametrize(
  "tensor",
  [
    _tensor(1, (4,), (1,)),  # beyond the storage
    _tensor(0, (2, 2), (4, 1)),
    _tensor(-1, (2,), (1,)),
    _tensor(0, (2,), (-1,)),
    _tensor(0, (-2,), (1,)),
    _tensor(0, (2, 2), (1,)),
    _tensor(0, ("2",), (1,)),
    _tensor(0, (2,), (1,), key="7"),
    _tensor(0, (2,), (1,), key="../data.pkl"),
    _tensor(0, (4,), (1,), kind="DoubleStorage"),
  ],
)
def test_tensors_that_reach_outside_their_storage(tmp_path, tensor):
  content = {"real": np.ones(4, np.float32), "false": tensor}
  with pytest.raises(InputError):
    np.asarray(torch_file.read(write(tmp_path / "x.pt", content))["false"])


def test_damaged_archives(tmp_path):
  file = write(tmp_path / "x.pt", {"a": np.arange(4, dtype=np.float32)})
  data = file.read_bytes()
  for cut in (0, 3, 60, len(data) // 2, len(data) - 5):
    file.write_bytes(data[:cut])
    with pytest.raises(InputError, match=r"x\.pt"):
      torch_file.read(file)
  position = data.index(np.arange(4, dtype=np.float32).tobytes())
  file.write_bytes(data[:position] + b"\xff" + data[position + 1 :])  # a flipped bit
  with pytest.raises(InputError, match="damaged"):
    np.asarray(torch_file.read(file)["a"])
  with pytest.raises(InputError, match="compress"):
    torch_file.read(write(file, {"a": "b" * 99}, compression=zipfile.ZIP_DEFLATED))
  with pytest.raises(InputError, match="big-endian"):
    torch_file.read(write(file, {}, extra=[("byteorder", b"big")]))
  with pytest.raises(InputError, match="cannot be read"):
    torch_file.read(tmp_path / "missing.pt")


# --- checkpoints ----------------------------------------------------------------------------------


def _state(family, prefix="backbone."):
  tensors = load_file(CHECKPOINTS / family / "model.safetensors")
  return {prefix + name.removeprefix("backbone."): x for name, x in tensors.items()}


def _average(family, change=lambda x: x + 1):
  """Return shadow parameters: a list in the order of the modules."""
  state = _state(family)
  model = convert.load(CHECKPOINTS / family)[0]
  return [change(state[entry.name]) for entry in mdlm_layout.denoiser_entries(model)]


@pytest.fixture
def directory(tmp_path):
  """Return a function: family -> a directory with its config.json only."""

  def make(family):
    shutil.copyfile(CHECKPOINTS / family / "config.json", tmp_path / "config.json")
    return tmp_path

  return make


def _trees_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("family", ["mdlm", "duo", "didi_instruct"])
def test_lightning_checkpoints(directory, family):
  folder = directory(family)
  model, params, proc = convert.load(CHECKPOINTS / family)
  state = _state(family, "backbone.backbone.")
  state |= {f"fake_model.{name}": x for name, x in _state(family).items()}
  content = {
    "epoch": 3,
    "state_dict": state,
    "optimizer_states": [{"state": {0: {"step": np.ones((), np.float32)}}, "param_groups": []}],
    "hyper_parameters": {"config": call("omegaconf.dictconfig.DictConfig")},
    "ema": {"decay": 1, "num_updates": 7, "shadow_params": _average(family)},
  }
  file = write(folder / "last.ckpt", content)
  for path in (folder, file):
    same, raw, process_back = convert.load(path, weights="raw")
    assert same == model and process_back == proc and type(process_back) is type(proc)
    _trees_equal(raw, params)
    for options in ({}, {"weights": "ema"}):
      _trees_equal(convert.load(path, **options)[1], jax.tree.map(lambda x: x + 1, params))
  assert convert.fingerprint(folder) == convert.fingerprint(file)


def test_checkpoint_without_average(directory):
  write(directory("mdlm") / "last.ckpt", {"state_dict": _state("mdlm")})
  folder = directory("mdlm")
  _trees_equal(convert.load(folder)[1], convert.load(CHECKPOINTS / "mdlm")[1])
  with pytest.raises(InputError, match="keeps no moving average"):
    convert.load(folder, weights="ema")
  with pytest.raises(InputError, match="weights='best'"):
    convert.load(folder, weights="best")


def test_average_in_the_published_order():
  model = convert.load(CHECKPOINTS / "mdlm")[0]
  names = [entry.name.removeprefix("backbone.") for entry in mdlm_layout.denoiser_entries(model)]
  block = [
    "norm1.weight",
    "attn_qkv.weight",
    "attn_out.weight",
    "norm2.weight",
    "mlp.0.weight",
    "mlp.0.bias",
    "mlp.2.weight",
    "mlp.2.bias",
    "adaLN_modulation.weight",
    "adaLN_modulation.bias",
  ]
  assert names == [
    "vocab_embed.embedding",
    *(f"sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    *(f"blocks.{i}.{name}" for i in (0, 1) for name in block),
    "output_layer.norm_final.weight",
    *(
      f"output_layer.{x}.{kind}"
      for x in ("linear", "adaLN_modulation")
      for kind in ("weight", "bias")
    ),
  ]


@pytest.mark.parametrize(
  "content, said",
  [
    (lambda: {"ema": {"shadow_params": _average("mdlm")[:-1]}}, "holds 29 tensors, the network 30"),
    (lambda: {"ema": {"shadow_params": _average("mdlm")[::-1]}}, "shadow_params[0] is (64,)"),
    (lambda: {"ema": {"shadow_params": [*_average("mdlm")[1:], 1]}}, "no list of tensors"),
    (lambda: {"ema": {}}, "no list of tensors"),
    (lambda: {"state_dict": {**_state("mdlm"), "critic.x": np.ones(1, "f4")}}, "tensor critic.x"),
    (lambda: {"state_dict": {**_state("mdlm"), "critic": 3}}, "'critic' is no tensor"),
    (lambda: {"state_dict": {}}, "no tensors by name"),
  ],
)
def test_bad_checkpoints(directory, content, said):
  folder = directory("mdlm")
  write(folder / "last.ckpt", {"state_dict": _state("mdlm"), **content()})
  with pytest.raises(InputError) as caught:
    convert.load(folder)
  assert said in str(caught.value) and str(folder) in str(caught.value)


def test_a_stranger_in_the_raw_weights_is_seen_behind_an_average(directory):
  folder = directory("mdlm")
  state = {**_state("mdlm"), "critic.x": np.ones(1, np.float32)}
  content = {"state_dict": state, "ema": {"shadow_params": _average("mdlm")}}
  write(folder / "last.ckpt", content)
  with pytest.raises(InputError, match="unknown tensor critic"):
    convert.load(folder)


def test_pytorch_model_bin(directory):
  folder = directory("duo")
  write(folder / "pytorch_model.bin", _state("duo"))
  _trees_equal(convert.load(folder)[1], convert.load(CHECKPOINTS / "duo")[1])
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"state_dict": {}}))
  with pytest.raises(InputError, match="bare pickle"):
    convert.load(folder)


def test_which_file_counts(directory):
  folder = directory("mdlm")
  with pytest.raises(
    InputError, match=r"model\.safetensors cannot be read: there is none.*\*\.ckpt"
  ):
    convert.load(folder)
  for name in ("a.ckpt", "b.ckpt"):
    write(folder / name, {"state_dict": _state("mdlm")})
  with pytest.raises(InputError, match=r"a\.ckpt, b\.ckpt"):
    convert.load(folder)
  convert.load(folder / "b.ckpt")
  (folder / "model.msgpack").write_bytes(b"?")
  with pytest.raises(InputError, match=r"\*\.safetensors or"):
    convert.load(folder / "model.msgpack")


def test_a_checkpoint_needs_its_config(directory):
  file = write(directory("mdlm") / "last.ckpt", {"state_dict": _state("mdlm")})
  config = file.parent / "config.json"
  stored = json.loads(config.read_text())
  stored.pop("model_type")
  config.write_text(json.dumps(stored))
  with pytest.raises(InputError, match="names no model_type"):
    convert.load(file)
  config.unlink()
  with pytest.raises(InputError, match=r"no config\.json beside it.*mdlm, DUO"):
    convert.load(file)
