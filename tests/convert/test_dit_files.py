# SPDX-License-Identifier: Apache-2.0
"""The public checkpoint layout: recorded logits, exact round trips, and what is refused."""

import json
import pathlib

import copies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from given_schedule import Given
from safetensors.numpy import load_file

from dlm_jax import convert, process, schedules
from dlm_jax.errors import InputError
from dlm_jax.models import Causal, CausalConfig, DiT, DiTConfig

PUBLIC = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints" / "mdlm"
EMBEDDING = "backbone.vocab_embed.embedding"
QKV = "backbone.blocks.1.attn_qkv.weight"
ROTARY = "backbone.rotary_emb.inv_freq"


def _trees_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def copy(tmp_path):
  """Return a function that writes a damaged copy of the public checkpoint."""

  def write(tensors=None, config=None):
    return copies.write(PUBLIC, tmp_path / "copy", tensors, config)

  return write


# --- reading what others wrote ------------------------------------------------------------------


def test_public_checkpoint_gives_the_recorded_logits():
  model, params, proc = convert.load(PUBLIC, dtype="float32")
  example = load_file(PUBLIC / "example_io.safetensors")
  tokens = jnp.asarray(example["input_ids"], jnp.int32)
  logits = jax.jit(model.apply)({"params": params}, tokens, jnp.asarray(example["sigma"]))
  scale = np.abs(example["logits"]).max()
  np.testing.assert_allclose(logits, example["logits"], rtol=0, atol=2e-5 * scale)
  assert proc == process.Absorbing(vocab_size=48, mask_id=47)
  assert model.config == DiTConfig(
    vocab_size=48, dim=32, cond_dim=16, layers=2, heads=4, length=24, dtype="float32"
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_names_without_prefix_and_without_buffer(copy):
  def strip(tensors):
    tensors.pop(ROTARY)
    for name in list(tensors):
      tensors[name.removeprefix("backbone.")] = tensors.pop(name)

  _trees_equal(convert.load(copy(strip))[1], convert.load(PUBLIC)[1])


def test_what_is_saved_has_the_public_names(tmp_path):
  convert.save(tmp_path, *convert.load(PUBLIC))
  ours, public = (load_file(p / "model.safetensors") for p in (tmp_path, PUBLIC))
  public.pop(ROTARY)
  _trees_equal(ours, public)
  ours, public = (json.loads((p / "config.json").read_text()) for p in (tmp_path, PUBLIC))
  shared = set(ours) & set(public)
  assert {"vocab_size", "hidden_dim", "cond_dim", "n_blocks", "model_length"} <= shared
  assert {k: ours[k] for k in shared} == {k: public[k] for k in shared}


# --- round trips --------------------------------------------------------------------------------

_SMALL = {"vocab_size": 9, "dim": 8, "layers": 2, "heads": 2, "length": 5}
_NETWORKS = {
  "dit": DiT(DiTConfig(**_SMALL, cond_dim=6, mlp_ratio=3, dropout=0.25, time_conditioning=True)),
  "causal": Causal(CausalConfig(**_SMALL, mlp_ratio=2)),
}
_PROCESSES = {
  "dit": process.Absorbing(
    vocab_size=9, mask_id=4, schedule=schedules.Polynomial(power=3.0, eps=0.01)
  ),
  "causal": None,
}


def _random(model):
  tokens = jax.ShapeDtypeStruct((1, 5), jnp.int32)
  sigma = (jax.ShapeDtypeStruct((1,), jnp.float32),) if isinstance(model, DiT) else ()
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, *sigma)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(_NETWORKS))
def test_round_trip(tmp_path, kind, dtype):
  model, proc = _NETWORKS[kind], _PROCESSES[kind]
  params = _random(model)
  convert.save(tmp_path / "a" / "b", model, params, proc, dtype=dtype, extra={"note": 7})
  loaded, back, process_back = convert.load(tmp_path / "a" / "b")
  assert (loaded, process_back) == (model, proc)
  _trees_equal(back, jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  assert json.loads((tmp_path / "a/b/config.json").read_text())["dlm_jax"]["note"] == 7
  assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == [
    "config.json",
    "model.safetensors",
  ]


def test_a_user_supplied_schedule_cannot_be_saved(tmp_path):
  model = _NETWORKS["dit"]
  given = process.Absorbing(vocab_size=9, mask_id=8, schedule=Given(function=lambda t: 1 - t))
  with pytest.raises(InputError, match="schedule"):
    convert.save(tmp_path / "out", model, _random(model), given)
  assert not (tmp_path / "out").exists()


# --- refusals -----------------------------------------------------------------------------------


def _transpose(name):
  return lambda tensors: tensors.update({name: tensors[name].T})


@pytest.mark.parametrize(
  "damage,named",
  [
    (lambda t: t.pop(QKV), QKV),
    (lambda t: t.pop(EMBEDDING), EMBEDDING),
    (lambda t: t.update({"backbone.blocks.2.norm1.weight": np.ones(32, np.float32)}), "blocks.2"),
    (lambda t: t.update({"critic.weight": np.ones(3, np.float32)}), "critic.weight"),
    (_transpose(QKV), QKV),
    (_transpose(EMBEDDING), EMBEDDING),
    (_transpose("backbone.output_layer.linear.weight"), "output_layer.linear.weight"),
    (lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1]}), EMBEDDING),
    (lambda t: t.update({QKV: t[QKV][None]}), QKV),
    (lambda t: t.update({ROTARY: t[ROTARY] * np.float32(1.001)}), ROTARY),
    (lambda t: t.update({ROTARY: np.float32(5e5) ** (-np.arange(4, dtype="f4") / 4)}), ROTARY),
    (lambda t: t.update({ROTARY: t[ROTARY][:2]}), ROTARY),
  ],
)
def test_damaged_tensors_are_named(copy, damage, named):
  directory = copy(damage)
  with pytest.raises(InputError) as caught:
    convert.load(directory)
  message = str(caught.value)
  assert named in message and str(directory) in message and "\n" not in message


def test_rotary_frequencies_in_bfloat16_are_fine():

  model, params, _ = convert.load(PUBLIC)
  tensors = {k: jnp.asarray(v) for k, v in load_file(PUBLIC / "model.safetensors").items()}
  tensors[ROTARY] = tensors[ROTARY].astype(jnp.bfloat16)
  _trees_equal(convert.from_tensors(model, tensors), params)


@pytest.mark.parametrize("keep", [0, 4, 300, 0.5])
def test_truncated_files(copy, keep):
  directory = copy()
  file = directory / "model.safetensors"
  data = file.read_bytes()
  file.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
  with pytest.raises(InputError, match=r"model\.safetensors"):
    convert.load(directory)


def test_missing_weights(copy):
  directory = copy()
  (directory / "model.safetensors").unlink()
  with pytest.raises(InputError, match=r"model\.safetensors"):
    convert.load(directory)


@pytest.mark.parametrize(
  "key", ["vocab_size", "hidden_dim", "cond_dim", "n_blocks", "n_heads", "model_length", "dropout"]
)
def test_missing_config_keys_are_named(copy, key):
  with pytest.raises(InputError, match=key):
    convert.load(copy(config=lambda c: c.pop(key)))


@pytest.mark.parametrize(
  "change,named",
  [
    ({"model_type": "bert"}, "bert"),
    ({"n_heads": 5}, "heads"),
    ({"n_blocks": 3}, "blocks.2"),
    ({"n_blocks": 1}, "blocks.1"),
    ({"vocab_size": 47}, EMBEDDING),
    ({"vocab_size": "48"}, "config.json"),
    ({"dlm_jax": {"process": {"name": "uniform"}}}, "uniform"),
    ({"dlm_jax": {"process": {"name": "absorbing"}}}, "mask_id"),
  ],
  ids=str,
)
def test_foreign_configs(copy, change, named):
  with pytest.raises(InputError, match=named.replace(".", r"\.")):
    convert.load(copy(config=lambda c: c.update(change)))


def test_not_a_checkpoint(tmp_path, copy):
  with pytest.raises(InputError, match=r"config\.json"):
    convert.load(tmp_path)
  with pytest.raises(InputError, match="model_type"):
    convert.load(copy(config=lambda c: c.pop("model_type")))
  (tmp_path / "copy" / "config.json").write_text("{")
  with pytest.raises(InputError, match="JSON"):
    convert.load(tmp_path / "copy")
