# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of PEFT: sums by hand, where a base is found, and what is refused."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file
from torch_files import write as write_torch

from dlm_jax import convert
from dlm_jax.convert import adapters, files, places
from dlm_jax.errors import InputError

CHECKPOINTS = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints"
_RNG = np.random.default_rng(0)
_Q, _DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
_CONFIG = {
  "peft_type": "LORA",
  "r": 4,
  "lora_alpha": 6,
  "target_modules": ["q_proj", "down_proj"],
  "bias": "none",
  "use_dora": False,
  "init_lora_weights": True,
}


def _base(name="sdar_bf16"):
  return {n: np.asarray(x, np.float32) for n, x in _stored(name).items()}


def _stored(name="sdar_bf16"):
  return load_file(CHECKPOINTS / name / "model.safetensors")


def _factors(module, shape, rank=4):
  """Return (tensors of an adapter, B A)."""
  a = _RNG.normal(size=(rank, shape[1])).astype(np.float32)
  b = _RNG.normal(size=(shape[0], rank)).astype(np.float32)
  names = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
  return dict(zip(names, map(jnp.asarray, (a, b)), strict=True)), b.astype(np.float64) @ a


def _adapter(folder, tensors, config=None, kind="safetensors"):
  folder.mkdir(parents=True, exist_ok=True)
  if kind == "safetensors":
    save_file(tensors, folder / "adapter_model.safetensors")
  else:
    write_torch(folder / "adapter_model.bin", {n: np.asarray(x) for n, x in tensors.items()})
  content = {**_CONFIG, "base_model_name_or_path": "org/base", **(config or {})}
  (folder / "adapter_config.json").write_text(json.dumps(content))
  return folder


@pytest.fixture
def base(tmp_path):
  return shutil.copytree(
    CHECKPOINTS / "sdar_bf16", tmp_path / "base", copy_function=shutil.copyfile
  )


def _loaded(model, tensors):
  """Return what a network of these tensors is."""
  return convert.from_tensors(model, {n: np.asarray(x, np.float32) for n, x in tensors.items()})


def _close_trees(left, right):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("rslora", [False, True])
def test_products_are_added(tmp_path, base, kind, rslora):
  """W + α/r B A, or α/√r; everything else is the base's."""
  wanted, tensors = _base(), {}
  for module in (_Q, _DOWN):
    more, product = _factors(module, wanted[f"{module}.weight"].shape)
    tensors |= more
    wanted[f"{module}.weight"] = wanted[f"{module}.weight"] + 6 / (2 if rslora else 4) * product
  path = _adapter(tmp_path / "lora", tensors, {"use_rslora": rslora}, kind)
  network = convert.open_network(path)
  assert network.adapter == path and network.source == base and network.block_length == 4
  _close_trees(network.params, _loaded(network.model, wanted))
  assert convert.fingerprint(path) != convert.fingerprint(base)
  before = convert.fingerprint(path)
  _adapter(tmp_path / "lora", tensors, {"use_rslora": rslora, "lora_alpha": 7}, kind)
  assert convert.fingerprint(path) != before


def test_every_variant_of_a_product(tmp_path):
  """Ranks and α by module, embeddings, transposed layers, whole tensors, prefixes."""
  tensors = {
    "backbone.a.weight": np.ones((3, 5), np.float32),
    "backbone.b.c.weight": np.ones((5, 3), np.float32),
    "backbone.e.weight": np.ones((7, 3), np.float32),
    "backbone.whole": np.ones(3, np.float32),
  }
  stored, wanted = {}, dict(tensors)
  ranks, alphas = {"a": 2, "c": 4, "e": 4}, {"a": 6, "c": 10, "e": 6}
  more, product = _factors("a", (3, 5), 2)
  stored |= {name.replace(".weight", ".default.weight"): x for name, x in more.items()}
  wanted["backbone.a.weight"] = 1 + alphas["a"] / ranks["a"] * product
  more, product = _factors("backbone.b.c", (5, 3))
  stored |= more
  wanted["backbone.b.c.weight"] = 1 + alphas["c"] / ranks["c"] * product
  more, product = _factors("backbone.e", (3, 7))  # an embedding's is transposed
  stored |= {
    name.replace("lora_", "lora_embedding_").removesuffix(".weight"): x for name, x in more.items()
  }
  wanted["backbone.e.weight"] = 1 + alphas["e"] / ranks["e"] * product.T
  wanted["backbone.whole"] = np.full(3, 2, np.float32)
  stored["base_model.model.backbone.whole"] = jnp.full(3, 2.0)
  config = {"rank_pattern": {"a": 2}, "alpha_pattern": {"b.c": 10, "x": 3}}
  folder = _adapter(tmp_path / "lora", stored, config)
  found = adapters.merged(tensors, folder)
  assert set(found) == set(tensors)
  for name, value in wanted.items():
    np.testing.assert_allclose(np.asarray(found[name]), value, rtol=1e-5, atol=1e-6)
  turned = {n: jnp.asarray(x) for n, x in _factors("backbone.a", (5, 3))[0].items()}
  folder = _adapter(tmp_path / "turned", turned, {"fan_in_fan_out": True})
  a, b = (np.asarray(x, np.float64) for x in turned.values())
  found = adapters.merged(tensors, folder)["backbone.a.weight"]
  np.testing.assert_allclose(np.asarray(found), 1 + 1.5 * (b @ a).T, rtol=1e-5)


def test_a_denoiser_with_an_adapter_beside_it(tmp_path):
  wanted = _base("mdlm")
  name = "backbone.blocks.0.attn_qkv"
  tensors, product = _factors(name, wanted[f"{name}.weight"].shape)
  wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + 1.5 * product
  folder = shutil.copytree(CHECKPOINTS / "mdlm", tmp_path / "x", copy_function=shutil.copyfile)
  model, params, _ = convert.load(_adapter(folder, tensors))
  _close_trees(params, _loaded(model, wanted))


@pytest.mark.parametrize("where", ["relative", "absolute", "sibling", "cache", "old cache"])
def test_where_a_base_is_found(tmp_path, base, where):
  named, folder, wanted = "org/base", tmp_path / "lora", base
  if where == "relative":
    folder, named = tmp_path / "deep" / "lora", "../../base"
  elif where == "absolute":
    folder, named = tmp_path / "deep" / "lora", str(base)
  elif where.endswith("cache"):
    cache = tmp_path / "hub"
    folder = cache / "models--me--lora" / "snapshots" / "99"
    wanted = cache / "models--org--base" / "snapshots" / "0a1b"
    shutil.copytree(base, wanted)
    if where == "cache":
      shutil.copytree(CHECKPOINTS / "mdlm", wanted.parent / "0000")
      (wanted.parent.parent / "refs").mkdir()
      (wanted.parent.parent / "refs" / "main").write_text("0a1b")
  tensors, _ = _factors(_Q, _base()[f"{_Q}.weight"].shape)
  path = _adapter(folder, tensors, {"base_model_name_or_path": named})
  network = convert.open_network(places.find_network(path))
  assert network.source.resolve() == wanted.resolve() and network.adapter == path
  assert convert.read_config(path)["model_type"] == "sdar"


def test_a_config_beside_the_adapter_counts(tmp_path, base):
  tensors, _ = _factors(_Q, _base()[f"{_Q}.weight"].shape)
  path = _adapter(tmp_path / "lora", tensors)
  config = json.loads((base / "config.json").read_text())
  (path / "config.json").write_text(json.dumps({**config, "block_size": 8}))
  network = convert.open_network(path)
  assert network.source == path and network.block_length == 8
  assert network.params


@pytest.mark.parametrize(
  "config, change, said",
  [
    ({"peft_type": "IA3"}, None, "peft_type='IA3'"),
    ({"use_dora": True}, None, "use_dora=True is no sum"),
    ({"init_lora_weights": "pissa_niter_4"}, None, "changed the base too"),
    ({"r": 8}, None, "r=8 of .*q_proj, but tensor .* is"),
    ({"r": None}, None, "r=None"),
    ({"lora_alpha": "x"}, None, "lora_alpha='x'"),
    ({"rank_pattern": {"(x+x+)+y": 4}}, None, "more than names of modules"),
    ({"base_model_name_or_path": None}, None, "names no base_model_name_or_path"),
    ({"base_model_name_or_path": "org/other"}, None, "'org/other', which is not here"),
    ({}, ("lora_B.weight", None), "has no partner"),
    ({}, ("lora_B.weight", np.ones((3, 4))), "does not fit"),
    ({}, ("lora_A.weight", np.ones((4, 3))), "does not fit"),
    ({}, ("lora_magnitude_vector", np.ones(3)), "which the base does not have"),
    ({}, ("lora_B.bias", np.ones(3)), "no part of a product"),
  ],
)
def test_adapters_that_are_refused(tmp_path, base, config, change, said):
  tensors, _ = _factors(_Q, _base()[f"{_Q}.weight"].shape)
  if change is not None:
    name = f"base_model.model.{_Q}.{change[0]}"
    tensors.pop(name, None)
    if change[1] is not None:
      tensors[name] = jnp.asarray(change[1], jnp.float32)
  path = _adapter(tmp_path / "lora", tensors, config)
  with pytest.raises(InputError, match=said) as caught:
    convert.load(path)
  assert "\n" not in str(caught.value)


def test_an_adapter_without_its_weights(tmp_path, base):
  path = _adapter(tmp_path / "lora", {})
  (path / "adapter_model.safetensors").unlink()
  with pytest.raises(InputError, match=r"no adapter_model\.safetensors or"):
    convert.load(path)
  assert files.find(base)
