# SPDX-License-Identifier: Apache-2.0
"""BD3-LM's public checkpoints: recorded logits, loss and sampling pass, caches, what is refused."""

import json
import pathlib
import shutil

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax import convert, models, process, schedules
from dlm_jax.errors import InputError
from dlm_jax.models import Cache, commit, masks
from dlm_jax.objectives import block_diffusion

PUBLIC = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints" / "bd3lm"
FORWARD = ["bd3_forward__a", pytest.param("bd3_forward__b", marks=pytest.mark.slow)]


def _close(found, wanted):
  found, wanted = (np.maximum(np.asarray(x), -1e6) for x in (found, wanted))
  tolerance = 2e-5 * np.abs(wanted[wanted > -1e5]).max()  # that is minus infinity
  np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def _network(golden, name):
  """Return (vectors, config, network, parameters) of a recorded forward pass."""
  vectors, config = golden(name)
  return vectors, config, *golden_networks.block_dit(vectors, config)


def _copy(folder, config=None, tensors=None):
  shutil.copytree(PUBLIC, folder, copy_function=shutil.copyfile)
  if config is not None:
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
  if tensors is not None:
    save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
  return folder


def test_recorded_logits():
  """Of the public class: [noisy | clean] under its mask, the logits of the noisy half."""
  network = convert.open_network(PUBLIC, dtype="float32")
  assert isinstance(network.model, models.BlockDiT)
  assert (network.writes, network.block_length, network.kind) == ("blocks", 4, "bd3lm")
  linear = schedules.LogLinear(eps=0.0)
  assert network.process == process.Absorbing(vocab_size=48, mask_id=47, schedule=linear)
  example = load_file(PUBLIC / "example_io.safetensors")
  tokens = jnp.asarray(example["input_ids_xt_then_x0"], jnp.int32)
  length = tokens.shape[1] // 2
  slots = masks.doubled_slots(jnp.arange(length)[None], network.block_length)
  logits = network.model.apply(
    {"params": network.params}, tokens, slots.position, masks.doubled(slots)
  )
  _close(logits[:, :length], example["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORWARD)
def test_recorded_loss(golden, name):
  """The network itself, not a DiT under a mask put in from outside."""
  vectors, config, model, params = _network(golden, name)
  x0, xt = (jnp.asarray(vectors[key], jnp.int32) for key in ("x0", "xt"))
  slots = masks.doubled_slots(jnp.arange(x0.shape[1])[None], config["bs"])
  inputs, visible = jnp.concatenate([xt, x0], axis=1), masks.doubled(slots)
  np.testing.assert_array_equal(visible[0], vectors["attention_mask"])
  logits = model.apply({"params": params}, inputs, slots.position, visible)[:, : x0.shape[1]]
  _close(logits, vectors["logits"])
  linear = schedules.LogLinear(eps=0.0)
  proc = process.Absorbing(vocab_size=config["V"], mask_id=config["mask_index"], schedule=linear)
  _close(jax.vmap(proc.log_x0)(logits, xt), vectors["log_x_theta"])
  batch = {"tokens": x0, "noisy": xt, "weight": 1 / jnp.asarray(vectors["t"])}
  nats = block_diffusion.token_nll(
    params, batch, model=model, process=proc, block_length=config["bs"]
  )
  _close(nats, vectors["loss_per_token"])


@pytest.mark.parametrize("name", FORWARD)
def test_recorded_sampling_pass(golden, name):
  """A block-causal pass over a context, at once and block by block on a cache."""
  vectors, config, model, params = _network(golden, name)
  context, size = jnp.asarray(vectors["sample_ctx"], jnp.int32), config["bs"]
  visible = masks.block_causal(masks.sequence_slots(jnp.arange(context.shape[1])[None], size))
  logits = model.apply({"params": params}, context, None, visible)
  _close(logits, vectors["sample_mode_logits"])
  cache = Cache.make(model.config, len(context), context.shape[1])
  assert context.shape[1] > size
  for start in range(0, context.shape[1], size):
    now = slice(start, start + size)
    hidden, kv = model.apply(
      {"params": params}, context[:, now], None, None, cache, method="extend"
    )
    _close(
      model.apply({"params": params}, hidden, method="head"), vectors["sample_mode_logits"][:, now]
    )
    cache = commit(cache, kv)


def test_round_trip(tmp_path):
  network = convert.open_network(PUBLIC, dtype="float32")
  convert.save(tmp_path, network.model, network.params, network.process, block_length=4)
  back = convert.open_network(tmp_path, dtype="float32")
  assert (back.model, back.process, back.block_length) == (network.model, network.process, 4)
  jax.tree.map(np.testing.assert_array_equal, back.params, network.params)
  ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, PUBLIC))
  known = set(ours) & set(theirs) - {"torch_dtype"}
  assert {"block_size", "vocab_size", "cross_attn", "model_type"} < known
  assert {key: ours[key] for key in known} == {key: theirs[key] for key in known}
  other = process.Uniform(vocab_size=48)
  with pytest.raises(InputError, match="cannot be saved with the process Uniform"):
    convert.save(tmp_path / "no", network.model, network.params, other)


@pytest.mark.parametrize(
  "config, said",
  [
    ({"cross_attn": False}, "cross_attn=False is not supported"),
    ({"adaln": False}, "adaln=False is not supported"),
    ({"causal": True}, "causal=True is not supported"),
    ({"time_conditioning": True}, "time_conditioning=True is not supported"),
    ({"n_heads": 5}, "model.heads=5 must divide"),
    ({"block_size": 0}, "block_size=0 must be at least 1"),
    ({"dlm_jax": {"process": {"name": "uniform", "schedule": {}}}}, "contradicts itself"),
  ],
)
def test_other_architectures(tmp_path, config, said):
  with pytest.raises(InputError, match=said):
    convert.block_length(_copy(tmp_path / "x", config))


def test_tensors_are_matched_strictly(tmp_path):
  name = "backbone.blocks.1.norm2.weight"
  for number, (change, said) in enumerate(
    (
      (lambda x: {k: v for k, v in x.items() if k != name}, f"{name} is missing"),
      (lambda x: {**x, "sampling_eps": x[name]}, "unknown tensor sampling_eps"),
      (lambda x: {**x, "sampling_eps_min": x[name]}, "unknown tensor sampling_eps_min"),
    )
  ):
    with pytest.raises(InputError, match=said):
      convert.load(_copy(tmp_path / str(number), tensors=change))
