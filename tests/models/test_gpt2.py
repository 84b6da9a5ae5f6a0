# SPDX-License-Identifier: Apache-2.0
"""GPT-2 against `transformers`, and the strictness of its loader."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax import convert
from dlm_jax.errors import InputError
from dlm_jax.models.gpt2 import GPT2, GPT2Config

TINY = pathlib.Path(__file__).parents[1] / "golden" / "gpt2_tiny"


@pytest.fixture(scope="module")
def tensors():
  return load_file(TINY / "model.safetensors")


@pytest.fixture
def checkpoint(tmp_path, tensors):
  """Return a writer: checkpoint(tensors, **config overrides) -> directory."""

  def write(tensors=tensors, **config):
    given = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | config))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path

  return write


def logits(directory, example):
  model, params, _ = convert.load(directory)
  tokens, mask = (jnp.asarray(example[key], jnp.int32) for key in ("tokens", "attention_mask"))
  return model.apply({"params": params}, tokens, mask)


@pytest.fixture(scope="module")
def example():
  return load_file(TINY / "example_io.safetensors")


def test_matches_transformers(example):
  got = logits(TINY, example)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, example["logits"], atol=2e-5 * np.abs(example["logits"]).max())


def test_mask_matters(example):
  full = logits(TINY, example | {"attention_mask": np.ones_like(example["attention_mask"])})
  assert np.abs(full - example["logits"])[4].max() > 1e-2  # the row with a hole in its mask
  np.testing.assert_allclose(full[0], example["logits"][0], atol=1e-4)


@pytest.mark.slow
def test_names_without_prefix_buffers_and_tied_head(checkpoint, tensors, example):
  bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
  bare["lm_head.weight"] = bare["wte.weight"]
  bare["h.0.attn.bias"] = np.ones((1, 1, 48, 48), bool)
  bare["h.1.attn.masked_bias"] = np.float32([-1e4])
  np.testing.assert_array_equal(logits(checkpoint(bare), example), logits(TINY, example))


def test_shards(checkpoint, tensors, example):
  directory = checkpoint()
  (directory / "model.safetensors").unlink()
  names = sorted(tensors)
  shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
  for file, keys in shards.items():
    save_file({key: tensors[key] for key in keys}, directory / file)
  index = directory / "model.safetensors.index.json"
  where = {key: file for file, keys in shards.items() for key in keys}
  index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
  np.testing.assert_array_equal(logits(directory, example), logits(TINY, example))
  (directory / "b.safetensors").unlink()
  with pytest.raises(InputError, match=r"b\.safetensors is missing"):
    convert.load(directory)
  index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
  with pytest.raises(InputError, match="must lie beside it"):
    convert.load(directory)


def test_bfloat16_becomes_float32(checkpoint, tensors):
  half = {key: value.astype(jnp.bfloat16) for key, value in tensors.items()}
  _, params, _ = convert.load(checkpoint(half))
  assert params["wte"]["embedding"].dtype == jnp.float32
  np.testing.assert_allclose(
    params["wte"]["embedding"], tensors["transformer.wte.weight"], rtol=2**-8
  )


BIAS = "transformer.ln_f.bias"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop(BIAS), "'ln_f.bias' is missing"),
    (lambda t: t.update({BIAS: t[BIAS][:-1]}), r"ln_f.bias has shape \(31,\)"),
    (lambda t: t.update({"transformer.h.2.ln_1.bias": t[BIAS]}), "'h.2.ln_1.bias'"),
    (lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}), "only tied heads"),
    (lambda t: t.update({"ln_f.bias": t[BIAS]}), "'ln_f.bias' appears twice"),
  ],
)
def test_strict(checkpoint, tensors, change, message):
  changed = dict(tensors)
  change(changed)
  with pytest.raises(InputError, match=message):
    convert.load(checkpoint(changed))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"model_type": "llama"}, "model_type 'llama' is unknown"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"activation_function": "swish"}, "'swish' is not supported"),
    ({"n_head": 5}, "n_head=5 does not divide"),
    ({"n_layer": 1}, "more layers than config.json says"),
    ({"n_layer": 3}, "'h.2.*is missing"),
  ],
)
def test_config_is_checked(checkpoint, config, message):
  with pytest.raises(InputError, match=message):
    convert.load(checkpoint(**config))


def test_damaged_files(tmp_path):
  with pytest.raises(InputError, match=r"has no config\.json"):
    convert.load(tmp_path)
  shutil.copy(TINY / "config.json", tmp_path)
  with pytest.raises(InputError, match=r"model\.safetensors cannot be read: there is none"):
    convert.load(tmp_path)
  weights = (TINY / "model.safetensors").read_bytes()
  (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
  with pytest.raises(InputError, match="not a readable safetensors"):
    convert.load(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(InputError, match="cannot be read as JSON"):
    convert.load(tmp_path)


def test_too_long():
  model, params, _ = convert.load(TINY)
  with pytest.raises(InputError, match="49 tokens exceed"):
    model.apply({"params": params}, jnp.zeros((1, 49), jnp.int32))


def test_small_has_the_public_size():
  shapes = jax.eval_shape(GPT2(GPT2Config()).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808
