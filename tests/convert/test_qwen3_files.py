# SPDX-License-Identifier: Apache-2.0
"""Decoders in the public layout: recorded logits, round trips, placement, and what is refused."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny
from safetensors.flax import load_file, save_file

from dlm_jax import convert, mesh, process
from dlm_jax.cli import convert as cli
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError
from dlm_jax.models import masks

CHECKPOINTS = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints"
NAMES = ("sdar_bf16", "sdar_bf16_sharded", "qwen3_bf16", "qwen3_bf16_tied")
ABSORBING = process.Absorbing(vocab_size=64, mask_id=63)
DOWN = "model.layers.1.mlp.down_proj.weight"


def _trees_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def copy(tmp_path):
  """Return a function that writes a changed copy of a recorded checkpoint."""

  def write(name="sdar_bf16", tensors=None, config=None, drop=()):
    directory = tmp_path / name
    shutil.copytree(CHECKPOINTS / name, directory, copy_function=shutil.copyfile)
    if tensors is not None:
      stored = load_file(directory / "model.safetensors")
      tensors(stored)
      save_file(stored, directory / "model.safetensors")
    stored = json.loads((directory / "config.json").read_text()) | (config or {})
    stored = {key: value for key, value in stored.items() if key not in drop}
    (directory / "config.json").write_text(json.dumps(stored))
    return directory

  return write


def _refused(directory, message, **options):
  with pytest.raises(InputError, match=message) as error:
    convert.load(directory, **options)
  assert "\n" not in str(error.value)


# --- reading what others wrote --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits(name):
  """9.1-b: public names and orientation, shards, tied heads: the logits recorded beside them."""
  model, params, proc = convert.load(CHECKPOINTS / name, dtype="float32")
  assert proc == (ABSORBING if name.startswith("sdar") else None)
  wanted = "blocks" if name.startswith("sdar") else "next"
  assert convert.open_network(CHECKPOINTS / name).writes == wanted
  assert convert.block_length(CHECKPOINTS / name) == (4 if name.startswith("sdar") else None)
  example = load_file(CHECKPOINTS / name / "example_io.safetensors")
  ids = example["input_ids"].astype(jnp.int32)
  slots = masks.sequence_slots(jnp.arange(ids.shape[1]), 4)
  for case in [case for case in example if case.endswith("_f32")]:
    see = masks.block_causal if "block" in case else masks.causal
    logits, wanted = tiny.logits(model, params, ids, None, see(slots)[None]), example[case]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["sdar_bf16", "qwen3_bf16"])
def test_bfloat16_stays(name):
  """Kept as stored, bit for bit; the 16-bit forward is as near as the recorded one."""
  model, params, _ = convert.load(CHECKPOINTS / name, params_dtype="bfloat16")
  stored = load_file(CHECKPOINTS / name / "model.safetensors")
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  _trees_equal(convert.to_tensors(model, params), stored)
  example = load_file(CHECKPOINTS / name / "example_io.safetensors")
  case = "logits_block_causal" if name.startswith("sdar") else "logits"
  slots = masks.sequence_slots(jnp.arange(24), 4 if name.startswith("sdar") else 1)
  ids = example["input_ids"].astype(jnp.int32)
  logits = tiny.logits(model, params, ids, None, masks.block_causal(slots)[None])
  exact, theirs = (np.asarray(example[f"{case}_{d}"], np.float32) for d in ("f32", "bf16"))
  assert np.abs(logits - exact).max() < 1.5 * np.abs(theirs - exact).max() + 0.02


def test_shards_are_the_file():
  one, many = (convert.load(CHECKPOINTS / name)[1] for name in ("sdar_bf16", "sdar_bf16_sharded"))
  _trees_equal(one, many)


def test_placed_on_a_mesh():
  """Each parameter arrives in its sharding, without having been whole anywhere."""
  wide = mesh.make(2, 2, 2)
  path = CHECKPOINTS / "sdar_bf16_sharded"
  model, params, _ = convert.load(path, mesh=wide, params_dtype="bfloat16")
  axes = model.axes(jax.ShapeDtypeStruct((1, 1), jnp.int32))
  wanted = mesh.param_shardings(wide, axes, params)
  placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, wanted)
  assert all(jax.tree.leaves(placed))
  assert sum("tensor" in s.spec for s in jax.tree.leaves(wanted)) >= 8
  _trees_equal(jax.device_get(params), convert.load(path, params_dtype="bfloat16")[1])


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "changes", [{}, {"tied": True}, tiny.EXPERTS], ids=["untied", "tied", "experts"]
)
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000], ids=["one file", "shards"])
def test_round_trip(tmp_path, changes, shard_bytes):
  """9.1-c: names, shapes, config and process survive; float32 exactly."""
  config = dataclasses.replace(tiny.DENSE, normalize_gate="tied" not in changes, **changes)
  if not config.experts:
    config = dataclasses.replace(config, normalize_gate=True)
  model, params = tiny.make(config)
  for proc in (None, process.Absorbing(vocab_size=tiny.V, mask_id=39)):
    directory = tmp_path / str(proc is None)
    convert.save(
      directory, model, params, proc, extra={"note": 1}, block_length=4, shard_bytes=shard_bytes
    )
    again, loaded, process_again = convert.load(directory, dtype="float32")
    assert again.config == config and process_again == proc
    _trees_equal(params, loaded)
    assert convert.read_config(directory)["dlm_jax"] == {
      "note": 1,
      "writes": "blocks" if proc else "next",
    }
    shards = sorted(file.name for file in directory.glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 10**9)
    assert all(file.stat().st_size < shard_bytes + 10_000 for file in directory.glob("*.safe*s"))
  assert len(convert.fingerprint(directory)) == 16


def test_public_names(tmp_path):
  """9.1-c: exactly the names and shapes of the public layout, experts included."""
  config = dataclasses.replace(tiny.DENSE, layers=1, **tiny.EXPERTS)
  model, params = tiny.make(config)
  shapes = {name: x.shape for name, x in convert.to_tensors(model, params).items()}
  layer = {
    "input_layernorm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
    "self_attn.q_proj.weight": (32, 32),
    "self_attn.k_proj.weight": (16, 32),
    "self_attn.v_proj.weight": (16, 32),
    "self_attn.o_proj.weight": (32, 32),
    "self_attn.q_norm.weight": (8,),
    "self_attn.k_norm.weight": (8,),
    "mlp.gate.weight": (5, 32),
  }
  for e in range(5):
    layer |= {f"mlp.experts.{e}.{part}_proj.weight": (16, 32) for part in ("gate", "up")}
    layer |= {f"mlp.experts.{e}.down_proj.weight": (32, 16)}
  outer = {"model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,)}
  wanted = outer | {"lm_head.weight": (40, 32)}
  wanted |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
  assert shapes == wanted


# --- the mask -------------------------------------------------------------------------------------


def test_mask_of_the_tokenizer(copy):
  """config.json's id, else the tokenizer's <|MASK|> in any of three files, else one clear line."""
  directory = copy(drop=("mask_token_id",))
  _refused(directory, r"names no mask: config.json has no mask_token_id and the tokenizer")
  files = {
    "added_tokens.json": {"<think>": 60, "<|MASK|>": 61},
    "tokenizer.json": {"added_tokens": [{"id": 62, "content": "<|MASK|>"}]},
    "tokenizer_config.json": {"added_tokens_decoder": {"58": {"content": "<|MASK|>"}}},
  }
  for (name, content), mask in zip(files.items(), (61, 62, 58), strict=True):
    (directory / name).write_text(json.dumps(content))
    assert convert.load(directory)[2].mask_id == mask
  _refused(copy("sdar_bf16_sharded", config={"mask_token_id": 64}), "outside the vocabulary of 64")


def test_a_qwen3_with_a_mask(copy):
  assert convert.load(copy("qwen3_bf16", config={"mask_token_id": 5}))[2].mask_id == 5


# --- what is refused ------------------------------------------------------------------------------


def _without(name):
  return lambda tensors: tensors.pop(name)


def _with(name, value):
  return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
  "tensors, message",
  [
    (_without(DOWN), rf"tensor {DOWN} is missing"),
    (_without("lm_head.weight"), "tensor lm_head.weight is missing"),
    (_with("model.norm.bias", jnp.zeros(64)), r"unknown tensor model.norm.bias \(did you mean"),
    (_with("model.layers.2.mlp.down_proj.weight", jnp.zeros(1)), "unknown tensor model.layers.2"),
    (_with(DOWN, jnp.zeros((96, 64))), r"is \(96, 64\), expected \(64, 96\); is it transposed"),
    (_with(DOWN, jnp.zeros((64, 96), jnp.int32)), "is int32, not floating-point"),
  ],
)
def test_tensors_are_matched_strictly(copy, tensors, message):
  """9.1-c: missing, unknown, misshapen and integer tensors."""
  _refused(copy(tensors=tensors), message)


@pytest.mark.parametrize(
  "config, message",
  [
    ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"hidden_size": "64"}, "hidden_size='64' is not a whole number"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 is not a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
    ({"num_hidden_layers": 1}, "unknown tensor model.layers.1"),
    ({"num_key_value_heads": 3}, "model.kv_heads=3 must divide"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it must be 'silu'"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "type 'linear' are not supported"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is neither true nor false"),
    ({"mask_token_id": "63"}, "mask_token_id='63' is not a whole number"),
    ({"model_type": "sdar_moe"}, "lacks 'num_experts'"),
    ({"model_type": "qwen4"}, "model_type 'qwen4' is unknown; known: .*sdar"),
  ],
)
def test_configs_that_mean_something_else(copy, config, message):
  _refused(copy(config=config), message)


def test_rotary_base_of_newer_files(copy):
  newer = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
  assert convert.load(copy(config=newer, drop=("rope_theta",)))[0].config.rope_theta == 5e5


def test_tied_heads(copy):
  """A head beside a tied embedding must be it."""
  directory = copy(config={"tie_word_embeddings": True})
  _refused(directory, "contradicts itself: tie_word_embeddings is true")
  stored = load_file(directory / "model.safetensors")
  stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
  save_file(stored, directory / "model.safetensors")
  assert "project" not in convert.load(directory)[1]


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "missing", "twice"])
def test_damaged_shards(copy, damage):
  """One line that names the file."""
  directory = copy("sdar_bf16_sharded")
  first, second = sorted(directory.glob("*.safetensors"))[1:]
  content = second.read_bytes()
  changes = {"truncated": content[:-100], "header": content[:8] + b"?" * 50, "empty": b""}
  if damage == "missing":
    second.unlink()
  elif damage == "twice":
    save_file(load_file(first) | load_file(second), second)
  else:
    second.write_bytes(changes[damage])
  message = "is in another shard as well" if damage == "twice" else "fetch .* again"
  _refused(directory, re.escape(str(second)) + ".*" + message)


def test_options_of_other_families(copy):
  _refused(copy(), "params_dtype='int8' is unknown", params_dtype="int8")
  _refused(CHECKPOINTS / "sdar_bf16", "a choice of Lightning checkpoints", weights="ema")
  _refused(CHECKPOINTS / "mdlm", "a choice of decoders, not of a mdlm", params_dtype="bfloat16")
  with pytest.raises(InputError, match="is a file; give the directory"):
    convert.load(CHECKPOINTS / "sdar_bf16" / "model.safetensors")
  with pytest.raises(InputError, match="cannot be saved with the process Uniform"):
    model, params, _ = convert.load(CHECKPOINTS / "sdar_bf16")
    convert.save(CHECKPOINTS / "never", model, params, process.Uniform(vocab_size=64))


def test_weights_are_read_where_they_go(monkeypatch):
  """A device's process reads its part of a tensor: no read is larger than a shard of one."""
  sizes = []
  original = jax.make_array_from_callback

  def counted(shape, sharding, read):
    def one(index):
      sizes.append((read(index).size, int(np.prod(shape))))
      return read(index)

    return original(shape, sharding, one)

  monkeypatch.setattr(jax, "make_array_from_callback", counted)
  convert.load(CHECKPOINTS / "sdar_bf16", mesh=mesh.make(1, 1, 8))
  wide = [(part, whole) for part, whole in sizes if whole > 100]
  assert wide and all(part == whole // 8 for part, whole in wide)


def test_command_line(tmp_path, capsys):
  """`dlm-jax convert` writes a decoder with its mask, block length and tokenizer."""
  source, tokenizer = tmp_path / "source", tokenizers.load("bytes")
  config = dataclasses.replace(tiny.DENSE, vocab_size=300)
  model, params = tiny.make(config)
  proc = process.Absorbing(vocab_size=300, mask_id=257)
  convert.save(source, model, params, proc, block_length=4)
  tokenizer.save(source)
  out = tmp_path / "out"
  cli.main(["--checkpoint", str(source), "--out", str(out), "--dtype", "bfloat16"])
  assert "bfloat16" in capsys.readouterr().out
  again, kept, process_again = convert.load(out, params_dtype="bfloat16", dtype="float32")
  assert again.config == config and process_again == proc and convert.block_length(out) == 4
  _trees_equal(kept, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  assert tokenizers.load(out) == tokenizer
  convert.save(source, *tiny.make(), process.Absorbing(vocab_size=tiny.V, mask_id=39))
  with pytest.raises(InputError, match="the tokenizer has 257 tokens and the network 40 rows"):
    cli.main(["--checkpoint", str(source), "--out", str(tmp_path / "more")])


# --- stretched positions --------------------------------------------------------------------------

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
  "config, yarn, length",
  [
    ({"rope_scaling": _YARN}, {}, 128),
    ({"rope_scaling": {**_YARN, "beta_fast": 16, "beta_slow": 2}}, {}, 128),
    ({"rope_scaling": {**_YARN, "attention_factor": 1.5, "truncate": False}}, {}, 128),
    ({"rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}, {"attention": 1.0}, 128),
    ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_slow": None}}, {}, None),
    ({"rope_parameters": {**_YARN, "rope_theta": 5e5}}, {}, 128),
  ],
)
def test_yarn_of_a_config(copy, tmp_path, config, yarn, length):
  scaling = next(iter(config.values()))
  drop = ("rope_theta", "rope_scaling") if "rope_parameters" in config else ()
  model, params, proc = convert.load(copy(config=config, drop=drop))
  found = model.config.yarn
  assert found.factor == 4 and found.beta_fast == scaling.get("beta_fast", 32)
  assert found.beta_slow == (scaling.get("beta_slow") or 1)
  assert found.attention == scaling.get("attention_factor", yarn.get("attention"))
  assert found.truncate == scaling.get("truncate", True)
  assert found.original_length == scaling.get("original_max_position_embeddings", 512)
  assert model.config.length == max(length or 4 * 512, 512)
  convert.save(tmp_path / "out", model, params, proc)
  assert convert.open_network(tmp_path / "out").model == model


@pytest.mark.parametrize(
  "config, message",
  [
    ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got a text"),
    ({"rope_parameters": [1]}, r"rope_parameters must be an object, got a list"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "lacks 'factor' of yarn"),
    ({"rope_scaling": {**_YARN, "factor": 0.5}}, "yarn: factor=0.5 must be at least 1"),
    ({"rope_scaling": {**_YARN, "factor": "4"}}, "factor='4' is not a finite number"),
    ({"rope_scaling": {**_YARN, "long_factor": [1]}}, "'long_factor' is unknown to yarn"),
    ({"rope_scaling": {**_YARN, "truncate": 1}}, "truncate=1 is neither"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic' are not supported"),
  ],
)
def test_stretches_that_are_refused(copy, config, message):
  _refused(copy(config=config), message)
