# SPDX-License-Identifier: Apache-2.0
"""Every family of public checkpoints: recorded logits, round trips, the last id, other trees."""

import dataclasses
import json
import pathlib

import copies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax import convert, process, schedules
from dlm_jax.errors import InputError
from dlm_jax.models import DiT

CHECKPOINTS = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints"
PROCESSES = {
  "mdlm": process.Absorbing(vocab_size=48, mask_id=47),
  "duo": process.Uniform(vocab_size=48),
  "didi_instruct": process.Absorbing(vocab_size=48, mask_id=47),
}
OUT = "blocks.0.mlp.2.weight"


def _trees_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def copy(tmp_path):
  """Return a function that writes a changed copy of a recorded checkpoint."""

  def write(family, tensors=None, config=None):
    change = None if config is None else lambda stored: stored.update(config)
    return copies.write(CHECKPOINTS / family, tmp_path / family, tensors, change)

  return write


# --- reading what others wrote --------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(PROCESSES))
def test_recorded_logits(family):
  model, params, proc = convert.load(CHECKPOINTS / family, dtype="float32")
  assert proc == PROCESSES[family] and type(proc) is type(PROCESSES[family])
  assert model.config.time_conditioning == (family == "duo")
  example = load_file(CHECKPOINTS / family / "example_io.safetensors")
  # recorded from the bare network, which listens to σ also where the method feeds 0
  bare = DiT(dataclasses.replace(model.config, time_conditioning=True))
  tokens = jnp.asarray(example["input_ids"], jnp.int32)
  logits = jax.jit(bare.apply)({"params": params}, tokens, jnp.asarray(example["sigma"]))
  scale = np.abs(example["logits"]).max()
  np.testing.assert_allclose(logits, example["logits"], rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.backbone."])
def test_names_may_have_a_prefix(copy, prefix):
  def rename(tensors):
    for name in list(tensors):
      tensors[prefix + name.removeprefix("backbone.")] = tensors.pop(name)

  _trees_equal(convert.load(copy("mdlm", rename))[1], convert.load(CHECKPOINTS / "mdlm")[1])


def test_model_type_in_either_case(copy):
  directory = copy("duo", config={"model_type": "duo"})
  assert convert.load(directory)[2] == process.Uniform(vocab_size=48)


def test_shards(copy):
  directory = copy("duo")
  tensors = load_file(directory / "model.safetensors")
  (directory / "model.safetensors").unlink()
  names, files = sorted(tensors), ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
  for number, file in enumerate(files):
    save_file({name: tensors[name] for name in names[number::2]}, directory / file)
  index = {"weight_map": {name: files[number % 2] for number, name in enumerate(names)}}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  _trees_equal(convert.load(directory)[1], convert.load(CHECKPOINTS / "duo")[1])
  save_file({names[0]: tensors[names[0]], names[1]: tensors[names[1]]}, directory / files[1])
  with pytest.raises(InputError, match="another shard"):
    convert.load(directory)
  (directory / files[1]).unlink()
  with pytest.raises(InputError, match=files[1]):
    convert.load(directory)


# --- trees of distillation ------------------------------------------------------------------------


def _with_trees(tensors, *trees):
  for tree in trees:
    for name in [name for name in tensors if name.startswith("backbone.")]:
      tensors[tree + name] = tensors[name] * (1 if name.endswith("inv_freq") else 2)


@pytest.mark.parametrize("family", ["mdlm", "duo"])
def test_complete_trees_of_distillation_are_dropped(copy, family):
  directory = copy(family, lambda t: _with_trees(t, "fake_model.", "teacher."))
  _trees_equal(convert.load(directory)[1], convert.load(CHECKPOINTS / family)[1])


@pytest.mark.parametrize(
  "damage, named",
  [
    (lambda t: t.pop(f"fake_model.backbone.{OUT}"), f"fake_model.backbone.{OUT} is missing"),
    (lambda t: t.update({"teacher.extra": np.ones(2, "f4")}), "unknown tensor teacher.extra"),
    (lambda t: t.update({f"teacher.backbone.{OUT}": np.ones((2, 2), "f4")}), "is (2, 2), expected"),
    (lambda t: t.update({"critic.weight": np.ones(2, "f4")}), "unknown tensor critic.weight"),
  ],
)
def test_incomplete_trees_are_refused(copy, damage, named):
  def change(tensors):
    _with_trees(tensors, "fake_model.", "teacher.")
    damage(tensors)

  with pytest.raises(InputError) as caught:
    convert.load(copy("mdlm", change))
  assert named in str(caught.value)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, prefix", [("duo", "backbone."), ("didi_instruct", "")])
@pytest.mark.parametrize(
  "damage, said",
  [
    (lambda t, name: t.pop(name), "is missing"),
    (lambda t, name: t.update({name: t[name].T}), "is it transposed?"),
    (lambda t, name: t.update({name: t[name][:-1]}), "expected (32, 128)."),
    (lambda t, name: t.update({name: t[name].astype("i4")}), "not floating-point"),
    (lambda t, name: t.update({f"backbone.backbone.{OUT}": t[name]}), "is there twice"),
  ],
)
def test_damaged_tensors_are_named(copy, family, prefix, damage, said):
  with pytest.raises(InputError) as caught:
    convert.load(copy(family, lambda tensors: damage(tensors, prefix + OUT)))
  assert prefix + OUT in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
  "family, config, said",
  [
    ("duo", {"time_conditioning": False}, "DUO has time_conditioning true, given false"),
    ("duo", {"dlm_jax": {"process": {"name": "absorbing", "mask_id": 47}}}, "contradicts itself"),
    ("duo", {"dlm_jax": {"process": {"name": "uniform", "mask_id": 47}}}, "lacks schedule"),
    (
      "duo",
      {"dlm_jax": {"process": {"name": "uniform", "mask_id": 47, "schedule": {}}}},
      "has unknown mask_id",
    ),
    ("duo", {"dlm_jax": {"process": "uniform"}}, "process 'uniform' is unknown"),
    ("duo", {"causal": True}, "causal"),
    ("mdlm", {"dlm_jax": {"process": {"name": "uniform", "schedule": {}}}}, "contradicts itself"),
    ("mdlm", {"dlm_jax": {"process": {"name": "gaussian"}}}, "is unknown; known: absorbing"),
    ("mdlm", {"time_conditioning": "no"}, "neither true nor false"),
    ("mdlm", {"model_type": "mdml"}, "'mdml' is unknown; known: mdlm, DUO, didi-instruct-dit"),
    ("didi_instruct", {"time_conditioning": True}, "contradicts itself"),
  ],
)
def test_contradictions(copy, family, config, said):
  directory = copy(family, config=config)
  with pytest.raises(InputError) as caught:
    convert.load(directory)
  assert said in str(caught.value) and str(directory) in str(caught.value)


# --- round trips ----------------------------------------------------------------------------------

_COSINE = schedules.Cosine()
_SAVED = {
  "absorbing": (process.Absorbing(vocab_size=48, mask_id=3, schedule=_COSINE), False, "mdlm"),
  "absorbing_timed": (process.Absorbing(vocab_size=48, mask_id=47), True, "mdlm"),
  "score": (process.AbsorbingScore(vocab_size=48, mask_id=47, schedule=_COSINE), True, "mdlm"),
  "uniform": (process.Uniform(vocab_size=48, schedule=_COSINE), True, "DUO"),
  "uniform_untimed": (process.Uniform(vocab_size=48), False, "dlm_jax_uniform"),
}


@pytest.mark.parametrize("name", sorted(_SAVED))
def test_round_trip_of_every_process(tmp_path, name):
  proc, timed, model_type = _SAVED[name]
  model, params, _ = convert.load(CHECKPOINTS / "duo")
  model = DiT(dataclasses.replace(model.config, time_conditioning=timed))
  convert.save(tmp_path, model, params, proc)
  loaded, back, process_back = convert.load(tmp_path)
  assert loaded == model and process_back == proc and type(process_back) is type(proc)
  _trees_equal(back, params)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["model_type"] == model_type and config["time_conditioning"] == timed


@pytest.mark.parametrize("family", sorted(PROCESSES))
def test_round_trip_of_every_family(tmp_path, family):
  first = convert.load(CHECKPOINTS / family)
  convert.save(tmp_path, *first)
  second = convert.load(tmp_path)
  assert first[0] == second[0] and first[2] == second[2]
  _trees_equal(first[1], second[1])
  ours, public = (load_file(p / "model.safetensors") for p in (tmp_path, CHECKPOINTS / family))
  bare = {name.removeprefix("backbone."): x for name, x in public.items()}
  bare.pop("rotary_emb.inv_freq")
  _trees_equal({name.removeprefix("backbone."): x for name, x in ours.items()}, bare)


def test_a_uniform_network_is_written_for_readers_of_duo(tmp_path):
  convert.save(tmp_path, *convert.load(CHECKPOINTS / "duo"))
  ours, public = (
    json.loads((path / "config.json").read_text()) for path in (tmp_path, CHECKPOINTS / "duo")
  )
  expected = {"model_type", "causal", "var_min", "hidden_dim", "cond_dim", "n_blocks", "n_heads"}
  assert expected <= set(ours) & set(public)
  assert {key: ours[key] for key in set(ours) & set(public)} == {
    key: public[key] for key in set(ours) & set(public)
  }
