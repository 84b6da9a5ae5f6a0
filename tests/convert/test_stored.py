# SPDX-License-Identifier: Apache-2.0
"""What files add to a network: names of wrappers, shards of .bin, scales of eight-bit floats."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import load_file, save_file
from torch_files import write

from dlm_jax import convert
from dlm_jax.convert import files, stored
from dlm_jax.errors import InputError

CHECKPOINTS = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints"
# What wrappers make of a name: at its front, behind it, nested.
WRAPPED = {
  "compiled": lambda name: f"_orig_mod.{name}",
  "parallel": lambda name: f"module.{name}",
  "both": lambda name: f"module._orig_mod.{name}",
  "inside": lambda name: name.replace(".", "._orig_mod.", 1),
  "everywhere": lambda name: "_fsdp_wrapped_module." + name.replace(".", ".module."),
}


def _tensors(name):
  return load_file(CHECKPOINTS / name / "model.safetensors")


def _write(folder, name, tensors, kind):
  """Write a checkpoint with a config of the golden one and weights of that kind."""
  folder.mkdir(exist_ok=True)
  shutil.copyfile(CHECKPOINTS / name / "config.json", folder / "config.json")
  if kind == "safetensors":
    save_file(tensors, folder / "model.safetensors")
  elif kind == "bin":
    write(folder / "pytorch_model.bin", tensors)
  else:
    write(folder / "last.ckpt", {"state_dict": tensors, "epoch": 1})
  return folder


def _same_trees(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin", "ckpt"])
@pytest.mark.parametrize("wrap", sorted(WRAPPED))
def test_names_of_wrappers_are_taken_off(tmp_path, kind, wrap):
  tensors = _tensors("mdlm")
  wrapped = {WRAPPED[wrap](name): value for name, value in tensors.items()}
  assert set(wrapped) != set(tensors)
  found, _ = files.read(_write(tmp_path / "x", "mdlm", wrapped, kind))
  assert set(found) == set(tensors) and len(found) == len(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(np.asarray(found[name]), value)


@pytest.mark.parametrize(
  "name, kind, wrap",
  [("mdlm", "ckpt", "inside"), ("mdlm", "safetensors", "both"), ("sdar_bf16", "bin", "both")],
)
def test_wrapped_networks_load(tmp_path, name, kind, wrap):
  wrapped = {WRAPPED[wrap](stored): value for stored, value in _tensors(name).items()}
  _, params, _ = convert.load(_write(tmp_path / "x", name, wrapped, kind))
  _same_trees(params, convert.load(CHECKPOINTS / name)[1])


def test_two_names_of_one_tensor(tmp_path):
  tensors = _tensors("mdlm")
  name = "backbone.output_layer.linear.bias"
  folder = _write(tmp_path / "x", "mdlm", {**tensors, f"module.{name}": tensors[name]}, "bin")
  with pytest.raises(InputError, match=f"tensor module.{name} is there twice, also as {name}"):
    files.read(folder)


@pytest.mark.parametrize("name", ["mdlm", "sdar_bf16", "gpt2_tiny"])
def test_what_is_there_is_not_called_missing(tmp_path, name):
  golden = CHECKPOINTS.parent if name == "gpt2_tiny" else CHECKPOINTS
  tensors = load_file(golden / name / "model.safetensors")
  folder = tmp_path / "x"
  folder.mkdir()
  shutil.copyfile(golden / name / "config.json", folder / "config.json")
  save_file({f"net.{n}": value for n, value in tensors.items()}, folder / "model.safetensors")
  with pytest.raises(InputError, match=r"is there as net\.\S+, and 'net\..*is no prefix") as caught:
    convert.load(folder)
  assert "missing" not in str(caught.value)


# --- shards of .bin -------------------------------------------------------------------------------


def _bin_shards(folder, name, damage=lambda where: None):
  folder.mkdir()
  shutil.copyfile(CHECKPOINTS / name / "config.json", folder / "config.json")
  tensors, where = _tensors(name), {}
  for number in (1, 2):
    file = f"pytorch_model-{number:05d}-of-00002.bin"
    part = {n: tensors[n] for i, n in enumerate(sorted(tensors)) if i % 2 == number - 1}
    write(folder / file, part)
    where |= dict.fromkeys(part, file)
  damage(where)
  index = {"metadata": {}, "weight_map": where}
  (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  return folder


@pytest.mark.parametrize("name", ["mdlm", "sdar_bf16"])
def test_shards_of_bin(tmp_path, name):
  folder = _bin_shards(tmp_path / "x", name)
  _same_trees(convert.load(folder)[1], convert.load(CHECKPOINTS / name)[1])
  assert len(files.find(folder)) == 2 and convert.fingerprint(folder)


def test_bad_shards_of_bin(tmp_path):
  def elsewhere(where):
    where["x"] = "../y.bin"

  def other(where):
    where["x"] = "model-00001-of-00001.safetensors"

  for number, (damage, said) in enumerate(((elsewhere, "beside it"), (other, r"shards are \*\.b"))):
    with pytest.raises(InputError, match=said):
      files.read(_bin_shards(tmp_path / str(number), "mdlm", damage))
  folder = _bin_shards(tmp_path / "x", "mdlm")
  shutil.copyfile(*(folder / f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)))
  with pytest.raises(InputError, match=r"is in pytorch_model-00001-of-00002\.bin as well"):
    files.read(folder)
  (folder / "pytorch_model-00002-of-00002.bin").unlink()
  with pytest.raises(InputError, match=r"00002\.bin cannot be read"):
    files.read(folder)


# --- eight-bit floats -----------------------------------------------------------------------------

_ROWS, _COLUMNS = 300, 130


def _rounded(scale, dtype="float8_e4m3fn", seed=0):
  """Return numbers of eight bits, and what they mean with a scale per number."""
  values = np.random.default_rng(seed).normal(size=(_ROWS, _COLUMNS)) * 8
  small = jnp.asarray(values, jnp.dtype(dtype))
  return small, np.asarray(small.astype(jnp.float32)) * scale


def _by_hand(scale_2d, rows, columns):
  """Return the factor of every number, one by one."""
  return np.array(
    [[scale_2d[i // rows, j // columns] for j in range(_COLUMNS)] for i in range(_ROWS)]
  )


_RNG = np.random.default_rng(1)
_BLOCKS = _RNG.uniform(0.5, 2, (3, 2)).astype(np.float32)
_SMALL_BLOCKS = _RNG.uniform(0.5, 2, (5, 3)).astype(np.float32)
_PER_ROW = _RNG.uniform(0.5, 2, (_ROWS, 1)).astype(np.float32)
_EIGHT = {
  "blocks of 128": ("_scale_inv", _BLOCKS, _by_hand(_BLOCKS, 128, 128), {}),
  "blocks of the config": (
    "_scale_inv",
    _SMALL_BLOCKS,
    _by_hand(_SMALL_BLOCKS, 64, 50),
    {"quantization_config": {"weight_block_size": [64, 50]}},
  ),
  "blocks longer than the tensor": (
    "_scale_inv",
    _BLOCKS[:1],
    _by_hand(_BLOCKS[:1], 10**12, 128),
    {"quantization_config": {"weight_block_size": [10**12, 128]}},
  ),
  "rows": ("_scale", _PER_ROW, np.broadcast_to(_PER_ROW, (_ROWS, _COLUMNS)), {}),
  "rows, flat": ("_scale", _PER_ROW[:, 0], np.broadcast_to(_PER_ROW, (_ROWS, _COLUMNS)), {}),
  "one": ("_scale", np.float32(0.25), 0.25, {}),
  "one in a row": ("_scale_inv", np.full(1, 0.25, np.float32), 0.25, {}),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("case", sorted(_EIGHT))
def test_scales_of_eight_bit_floats(tmp_path, kind, dtype, case):
  suffix, scale, factor, config = _EIGHT[case]
  small, wanted = _rounded(factor, dtype)
  if kind == "bin" and dtype == "float8_e5m2":
    pytest.skip("one dtype shows that the reader is the same")
  tensors = {"a.weight": small, f"a.weight{suffix}": jnp.asarray(scale), "b": jnp.ones(3)}
  tensors["a.input_scale"] = jnp.ones(())
  if kind == "bin":
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
  found, _ = files.read(_write(tmp_path / "x", "mdlm", tensors, kind), config)
  assert set(found) == {"a.weight", "b"}
  assert found["a.weight"].shape == (_ROWS, _COLUMNS) and found["a.weight"].dtype == np.float32
  np.testing.assert_allclose(np.asarray(found["a.weight"]), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_eight_bit_floats_without_a_scale(tmp_path, kind):
  small, _ = _rounded(1.0, "float8_e4m3fn")
  tensors = {"a.weight": np.asarray(small) if kind == "bin" else small}
  folder = _write(tmp_path / "x", "mdlm", tensors, kind)
  with pytest.raises(InputError, match=r"tensor a\.weight is float8_e4m3fn and has no scale"):
    files.read(folder)
  if kind == "safetensors":
    for shape in ((7, 2), (3,), (_ROWS, 3)):
      save_file({**tensors, "a.weight_scale": jnp.ones(shape)}, folder / "model.safetensors")
      with pytest.raises(InputError, match=r"tensor a\.weight_scale is .* no number, rows"):
        files.read(folder)


@pytest.mark.parametrize("name", ["mdlm", "sdar_bf16"])
def test_a_network_of_eight_bits(tmp_path, name):
  """Matrices rounded by hand, one scale per row; the other tensors as they were."""
  tensors, wanted = {}, {}
  for stored_name, value in _tensors(name).items():
    value = wanted[stored_name] = value.astype(jnp.float32)
    if value.ndim == 2:
      scale = jnp.max(jnp.abs(value), axis=1, keepdims=True) / 256
      small = (value / scale).astype(jnp.float8_e4m3fn)
      wanted[stored_name] = small.astype(jnp.float32) * scale
      tensors |= {stored_name: small, f"{stored_name}_scale": scale}
    else:
      tensors[stored_name] = value
  model, params, _ = convert.load(_write(tmp_path / "x", name, tensors, "safetensors"))
  _same_trees(params, convert.from_tensors(model, wanted))


# --- headers --------------------------------------------------------------------------------------


def test_a_name_twice_in_a_header(tmp_path):
  """The library takes the last one; which one is meant, nobody knows."""
  of = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
  file = tmp_path / "model.safetensors"
  for again in ("x", "\\u0078"):
    data = f'{{"x": {of}, "{again}": {of}}}'.encode()
    file.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    assert list(safe_open(file, "numpy").keys()) == ["x"]
    with pytest.raises(InputError, match="has the field 'x' twice"):
      files.read(file)


def test_wrappers_are_no_names_of_networks():
  """Or tensors of ours would lose them."""
  for name in ("mdlm", "sdar_bf16"):
    parts = {part for tensor in _tensors(name) for part in tensor.split(".")}
    assert not parts & stored.WRAPPERS
