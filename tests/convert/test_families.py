# SPDX-License-Identifier: Apache-2.0
"""Every file of `convert/families/`: found by listing, round trips, says how it writes."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax import convert, mesh, models, process
from dlm_jax.convert import families, layout
from dlm_jax.convert.family import WRITES
from dlm_jax.errors import InputError
from dlm_jax.models import discriminator

FOLDER = pathlib.Path(families.__file__).parent
_SIZES = {"vocab_size": 11, "dim": 8, "layers": 2, "heads": 2, "length": 6}
_DIT = models.DiT(models.DiTConfig(**_SIZES, cond_dim=4))
_ABSORBING = process.Absorbing(vocab_size=11, mask_id=10)
_DECODER = models.Decoder(
  models.DecoderConfig(**_SIZES, kv_heads=1, head_dim=4, mlp_dim=8, dtype="float32")
)
_BLOCKS = models.BlockDiT(models.BlockDiTConfig(**_SIZES, cond_dim=4))
_GPT2 = models.GPT2(models.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2))
# Family -> (network, process, how it writes); a new file of the folder needs a row.
NETWORKS = {
  "causal": [(models.Causal(models.CausalConfig(**_SIZES)), None, "next")],
  "dit": [(_DIT, _ABSORBING, "grid"), (_DIT, process.Uniform(vocab_size=11), "grid")],
  "dit_blocks": [(_BLOCKS, _ABSORBING, "blocks")],
  "gpt2": [(_GPT2, None, "next")],
  "qwen3": [(_DECODER, _ABSORBING, "blocks"), (_DECODER, None, "next")],
}
_ROWS = [(name, *row) for name, rows in NETWORKS.items() for row in rows]


def random_params(model):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), layout.param_shapes(model)
  )


def equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_folder_is_the_registry():
  files = {file.stem for file in FOLDER.glob("*.py")} - {"__init__"}
  assert set(families.found()) | set(families.beside()) == files
  assert set(NETWORKS) == set(families.found())
  for name, family in families.found().items():
    assert family.model_types and set(family.writes) <= set(WRITES), name
    assert families.of(NETWORKS[name][0][0]) is family
    for kind in family.model_types:
      assert families.find({"model_type": kind.upper()}, "here") is family


@pytest.mark.parametrize("name, model, proc, writes", _ROWS)
def test_round_trip(tmp_path, name, model, proc, writes):
  params = random_params(model)
  convert.save(tmp_path, model, params, proc, extra={"note": 1})
  network = convert.open_network(tmp_path, dtype=getattr(model.config, "dtype", "float32"))
  assert network.family is families.found()[name] and not network.weights.held
  assert network.writes == writes == convert.writes(model, proc)
  assert network.facts["writes"] == writes and network.facts["note"] == 1
  assert (network.model, network.process) == (model, proc)
  equal(network.params, params)
  assert jax.tree.structure(network.params) == jax.tree.structure(params)
  assert network.weights.held and "\n" not in repr(network) and len(repr(network)) < 300
  back, loaded, proc_back = convert.load(tmp_path, dtype=getattr(model.config, "dtype", "float32"))
  assert (back, proc_back) == (model, proc)
  equal(loaded, params)


@pytest.mark.parametrize("name, model, proc, writes", _ROWS)
def test_what_public_files_do_not_say_is_derived(tmp_path, name, model, proc, writes):
  convert.save(tmp_path, model, random_params(model), proc)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["dlm_jax"].pop("writes") == writes
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert convert.open_network(tmp_path).writes == writes
  config["dlm_jax"]["writes"] = "nekst"
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(InputError, match="writes='nekst' is not how this network writes; it writes"):
    convert.open_network(tmp_path)


def test_a_network_may_write_otherwise(tmp_path):
  """What its family leaves open is stored."""
  given = (_DECODER, random_params(_DECODER), _ABSORBING)
  convert.save(tmp_path, *given, extra={"writes": "introspective"})
  assert convert.open_network(tmp_path).writes == "introspective"
  with pytest.raises(InputError, match="writes='grid' is not how"):
    convert.save(tmp_path / "no", *given, extra={"writes": "grid"})
  assert not (tmp_path / "no").exists()


@pytest.mark.first_case
@pytest.mark.parametrize("name, model, proc, writes", _ROWS)
@pytest.mark.parametrize("on_host", [2**26, 0])
def test_a_mesh_changes_no_number(tmp_path, monkeypatch, name, model, proc, writes, on_host):
  """Nor does the device that puts the layers together."""
  monkeypatch.setattr(layout, "_ON_HOST", on_host)
  params = random_params(model)
  convert.save(tmp_path, model, params, proc, shard_bytes=900)
  assert len(list(tmp_path.glob("*.safetensors"))) > 1
  equal(convert.load(tmp_path)[1], params)
  devices = mesh.make(1, 2, 1, devices=jax.devices()[:2])
  placed = convert.load(tmp_path, mesh=devices)[1]
  equal(jax.device_get(placed), params)
  wanted = mesh.param_shardings(devices, model.axes(*model.inputs()), params)
  same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), placed, wanted)
  assert all(jax.tree.leaves(same))


def test_a_network_beside_another(tmp_path):
  model = models.Discriminator(_DIT.config, trained_layers=1)
  variables = model.init(jax.random.key(0), *model.inputs())
  critic = models.Critic(model=model, params=variables["params"], spectral=variables["spectral"])
  beside = {"discriminator": critic}
  convert.save(tmp_path, _DIT, random_params(_DIT), _ABSORBING, beside=beside)
  facts = convert.open_network(tmp_path).facts
  assert facts["discriminator"] == {"trained_layers": 1}
  back = convert.load_beside(tmp_path, "discriminator")
  assert back.model == model
  equal(back, critic)
  assert families.beside()["discriminator"].network is discriminator.Discriminator


def test_unknown_architectures(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
  with pytest.raises(InputError) as caught:
    convert.load(tmp_path)
  line = str(caught.value)
  assert (
    "model_type 'qwen2' is unknown; known: mdlm, DUO" in line and "did you mean 'qwen3'" in line
  )
  assert all(kind in line for kind in families.model_types())
  with pytest.raises(InputError, match="a dict has no checkpoints; known: Causal, DiT"):
    convert.save(tmp_path, {}, {}, None)


def test_weights_are_owned():
  read = []
  weights = convert.Weights(lambda: read.append(1) or len(read))
  assert not weights.held and repr(weights) == "Weights(not read)"
  assert weights.read() == weights.read() == 1 and weights.held
  weights.free()
  assert not weights.held and weights.read() == 2


# --- what a config asks of a family ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "noise", "masked", "rows"),
  [
    ("dit", "absorbing", True, {11}),
    ("dit", "absorbing_score", True, {11}),
    ("dit", "uniform", False, {10, 11}),  # public ones have a row for padding
    ("causal", "none", False, {10}),
    ("causal", "absorbing", False, {10}),  # the default, which does nothing
    ("decoder", "absorbing", True, {11, 12, 13}),
    ("decoder", "none", True, {11, 12, 13}),  # from the start: blocks may come later
  ],
)
def test_rows_of_a_vocabulary(name, noise, masked, rows):
  """Ten tokens, the mask not among them, in so many rows."""
  family = families.named(name)
  assert family.has_mask_row(noise) == masked
  assert {n for n in range(8, 14) if family.fits(n, 10, masked)} == rows


def test_a_config_names_a_network():
  """Every name builds a network of its family; what is only read from files has none."""
  named = {family.name: family for family in families.found().values() if family.name}
  assert set(named) == {"dit", "causal", "decoder"} and families.found()["gpt2"].name is None
  for name, family in named.items():
    assert families.named(name) is family and dataclasses.is_dataclass(family.options)
    assert [n for n, f in named.items() if f.several] == ["decoder"]
  with pytest.raises(InputError, match=r"'decoders' is unknown \(did you mean 'decoder'\?\)"):
    families.named("decoders")


def test_sizes_left_at_0_follow_others():
  complete = families.named("decoder").complete
  sizes = {"dim": 12, "heads": 3, "mlp_ratio": 4, "kv_heads": 0, "head_dim": 0, "mlp_dim": 0}
  given = {"dim": 12, "heads": 3, "kv_heads": 3, "head_dim": 4, "mlp_dim": 48}
  assert complete(sizes) == given and sizes["mlp_dim"] == 0
  assert complete({**sizes, "kv_heads": 1, "mlp_dim": 7}) == given | {"kv_heads": 1, "mlp_dim": 7}
  assert families.named("dit").complete(sizes) == sizes


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
@pytest.mark.parametrize("name, model, proc, writes", _ROWS[1::2])
@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_that_are_none_are_found(
  tmp_path, monkeypatch, name, model, proc, writes, wrong, compiled
):
  """One in one tensor is enough; the line names it. On a host and where it has to be compiled."""
  params = random_params(model)
  convert.save(tmp_path, model, params, proc)
  file = tmp_path / "model.safetensors"
  tensors = load_file(file)
  victim = sorted(tensors)[-1]
  tensors[victim].flat[-1] = wrong
  save_file(tensors, file)
  if compiled:
    monkeypatch.setattr(layout, "_finite", layout._all_finite)
  with pytest.raises(InputError, match=f"tensor {victim} holds 1 of .* NaN or infinite in float32"):
    convert.load(tmp_path)
