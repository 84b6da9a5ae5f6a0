# SPDX-License-Identifier: Apache-2.0
"""DiT (and our causal judge) ↔ the public checkpoint layout: config.json + model.safetensors.

Names and orientation follow the public MDLM release: `backbone.blocks.3.attn_qkv.weight` is
[3D, D], rows q | k | v, head-major. Our layers are stacked and our kernels transposed.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from dlm_jax import models, process, schedules
from dlm_jax.arrays import Params
from dlm_jax.errors import InputError

# (public name, our path, transposed); {} is the layer number
_TIME_AND_HEAD = (
  ("sigma_map.mlp.0.weight", "time/expand/kernel", True),
  ("sigma_map.mlp.0.bias", "time/expand/bias", False),
  ("sigma_map.mlp.2.weight", "time/contract/kernel", True),
  ("sigma_map.mlp.2.bias", "time/contract/bias", False),
  ("output_layer.norm_final.weight", "output/norm/scale", False),
  ("output_layer.linear.weight", "output/project/kernel", True),
  ("output_layer.linear.bias", "output/project/bias", False),
  ("output_layer.adaLN_modulation.weight", "output/modulation/kernel", True),
  ("output_layer.adaLN_modulation.bias", "output/modulation/bias", False),
  ("blocks.{}.adaLN_modulation.weight", "blocks/modulation/kernel", True),
  ("blocks.{}.adaLN_modulation.bias", "blocks/modulation/bias", False),
)
_BLOCKS = (
  ("vocab_embed.embedding", "embed/embedding", False),
  ("blocks.{}.norm1.weight", "blocks/norm1/scale", False),
  ("blocks.{}.attn_qkv.weight", "blocks/attention/qkv/kernel", True),
  ("blocks.{}.attn_out.weight", "blocks/attention/out/kernel", True),
  ("blocks.{}.norm2.weight", "blocks/norm2/scale", False),
  ("blocks.{}.mlp.0.weight", "blocks/mlp/expand/kernel", True),
  ("blocks.{}.mlp.0.bias", "blocks/mlp/expand/bias", False),
  ("blocks.{}.mlp.2.weight", "blocks/mlp/contract/kernel", True),
  ("blocks.{}.mlp.2.bias", "blocks/mlp/contract/bias", False),
)
_TABLES = {
  "mdlm": _BLOCKS + _TIME_AND_HEAD,
  "dlm_jax_causal": (*_BLOCKS, ("norm_final.weight", "norm/scale", False)),
}
_PREFIX = "backbone."
_BUFFER = "rotary_emb.inv_freq"  # a constant of the network, in some public files
_CONFIG = {  # public key -> ours
  "vocab_size": "vocab_size",
  "hidden_dim": "dim",
  "n_blocks": "layers",
  "n_heads": "heads",
  "model_length": "length",
  "dropout": "dropout",
}


def save(
  path: pathlib.Path | str,
  model: models.DiT | models.Causal,
  params: Params,
  proc: process.Absorbing | None = None,
  *,
  dtype: str = "float32",
  extra: dict[str, Any] | None = None,
) -> None:
  """Write config.json and model.safetensors.

  Args:
    path: directory, created if needed.
    model: the network.
    params: its parameters.
    proc: forward process; None for a causal network.
    dtype: "float32", or "bfloat16" to halve the file.
    extra: JSON-able facts stored in config.json under "dlm_jax" (tokenizer fingerprint, …).
  """
  kind, directory = _kind(model), pathlib.Path(path)
  tensors = {name: x.astype(dtype) for name, x in to_tensors(model, params).items()}
  options = dataclasses.asdict(model.config)
  config = {"model_type": kind, **{public: options[our] for public, our in _CONFIG.items()}}
  if kind == "mdlm":
    config |= {"cond_dim": options["cond_dim"], "time_conditioning": options["time_conditioning"]}
  config |= {"torch_dtype": dtype, "mlp_ratio": options["mlp_ratio"]}
  config["dlm_jax"] = {"process": _process_config(proc), **(extra or {})}
  directory.mkdir(parents=True, exist_ok=True)
  temporary = directory / "model.safetensors.tmp"
  save_file(tensors, str(temporary), metadata={"format": "pt"})
  temporary.chmod(0o644)  # the library writes it readable by its owner only
  temporary.replace(directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(
  path: pathlib.Path | str, config: dict[str, Any], **overrides
) -> tuple[models.DiT | models.Causal, Params, process.Absorbing | None]:
  """Read a directory in the public layout; every tensor must be used and fit.

  Args:
    path: directory with config.json and model.safetensors.
    config: the parsed config.json.
    **overrides: fields of the model's config that do not change shapes (dtype, attention, …).

  Returns:
    The network, float32 parameters and the process (None for a causal network).

  Raises:
    InputError: a tensor is missing, unknown or of the wrong shape, or the file is damaged.
  """
  directory = pathlib.Path(path)
  try:
    tensors = load_file(str(directory / "model.safetensors"))
  except (OSError, SafetensorError) as error:
    raise InputError(f"{directory / 'model.safetensors'} cannot be read: {error}") from None
  model = _make_model(directory, config, overrides)
  params = from_tensors(model, tensors, source=directory)
  return model, params, _make_process(directory, config, model)


def to_tensors(model: models.DiT | models.Causal, params: Params) -> dict[str, Array]:
  """Return a tree like the parameters (gradients too) under public names and orientation."""
  tensors = {}
  for name, ours, transposed in _TABLES[_kind(model)]:
    array = _read(params, ours)
    layers = range(model.config.layers) if "{}" in name else (None,)
    for layer in layers:
      value = array if layer is None else array[layer]
      tensors[_PREFIX + name.format(layer)] = jnp.asarray(value.T if transposed else value)
  return tensors


def from_tensors(
  model: models.DiT | models.Causal,
  tensors: Mapping[str, Any],
  *,
  source: pathlib.Path | str = "checkpoint",
) -> Params:
  """Return float32 parameters from arrays under public names, with or without their prefix.

  Args:
    model: the network; says which tensors there must be, and their shapes.
    tensors: arrays by name; every one must be used, rotary frequencies are checked and dropped.
    source: where they come from, for messages.

  Raises:
    InputError: a tensor is missing, unknown, of the wrong shape, or of another rotary base.
  """
  tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
  _check_rotary(source, tensors.pop(_BUFFER, None), model.config)
  shapes = _shapes(model)
  params: Params = {}
  for name, ours, transposed in _TABLES[_kind(model)]:
    want = _read(shapes, ours).shape
    layers = range(model.config.layers) if "{}" in name else (None,)
    values = [
      _take(source, tensors, name.format(layer), want[layer is not None :], transposed)
      for layer in layers
    ]
    _write(params, ours, jnp.asarray(np.stack(values) if "{}" in name else values[0], jnp.float32))
  if tensors:
    raise InputError(f"{source}: unknown tensor {_PREFIX}{min(tensors)}; the network has none.")
  return params


def _kind(model):
  return "mdlm" if isinstance(model, models.DiT) else "dlm_jax_causal"


def _check_rotary(source, stored, config):
  """Refuse a network whose rotary frequencies are not 10000^(−2k/C): ours would differ."""
  if stored is None:
    return
  channels = config.dim // config.heads
  want = 1e4 ** (-np.arange(0, channels, 2) / channels)
  tolerance = 1e-5 if stored.dtype == np.float32 else 2.0**-8  # half a bfloat16 spacing
  stored = np.asarray(stored, np.float64)
  if stored.shape != want.shape or not np.allclose(stored, want, rtol=tolerance, atol=0):
    raise InputError(
      f"{source}: tensor {_PREFIX}{_BUFFER} is not 10000^(-2k/{channels}); only this base loads."
    )


def _take(source, tensors, name, want, transposed):
  if name not in tensors:
    raise InputError(f"{source}: tensor {_PREFIX}{name} is missing.")
  value = np.asarray(tensors.pop(name), np.float32)
  stored = want[::-1] if transposed else want
  if value.shape != stored:
    raise InputError(f"{source}: tensor {_PREFIX}{name} is {value.shape}, expected {stored}.")
  return value.T if transposed else value


def _make_model(directory, config, overrides):
  causal = config["model_type"] == "dlm_jax_causal"
  keys = dict(_CONFIG) if causal else {**_CONFIG, "cond_dim": "cond_dim"}
  missing = [key for key in keys if key not in config]
  if missing:
    raise InputError(f"{directory}/config.json lacks {missing[0]!r}.")
  for key in keys:
    if isinstance(config[key], bool) or not isinstance(config[key], int | float):
      raise InputError(f"{directory}/config.json: {key}={config[key]!r} is not a number.")
  fields = {ours: config[public] for public, ours in keys.items()}
  fields["mlp_ratio"] = config.get("mlp_ratio", 4)
  if not causal:
    fields["time_conditioning"] = config.get("time_conditioning", False)
  try:
    if causal:
      return models.Causal(models.CausalConfig(**fields, **overrides))
    return models.DiT(models.DiTConfig(**fields, **overrides))
  except ValueError as error:
    raise InputError(f"{directory}/config.json: {error}") from None


def _shapes(model):
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  sigma = (jax.ShapeDtypeStruct((1,), jnp.float32),) if isinstance(model, models.DiT) else ()
  return jax.eval_shape(model.init, jax.random.key(0), tokens, *sigma)["params"]


def _process_config(proc):
  if proc is None:
    return None
  schedule = proc.schedule
  name = {cls: name for name, cls in schedules.NAMES.items()}.get(type(schedule))
  if name is None:
    raise InputError("a user-supplied schedule cannot be saved; use a named one.")
  return {
    "name": "absorbing",
    "mask_id": proc.mask_id,
    "schedule": {"name": name, **dataclasses.asdict(schedule)},
  }


def _make_process(directory, config, model):
  if config["model_type"] == "dlm_jax_causal":
    return None
  stored = config.get("dlm_jax", {}).get("process")
  size = model.config.vocab_size
  if stored is None:  # the public MDLM release: mask is the last row, log-linear schedule
    return process.Absorbing(vocab_size=size, mask_id=size - 1)
  if stored.get("name") != "absorbing":
    raise InputError(f"{directory}: process {stored.get('name')!r} is unknown; known: absorbing.")
  missing = {"mask_id", "schedule"} - set(stored)
  if missing:
    raise InputError(f"{directory}/config.json: the process lacks {', '.join(sorted(missing))}.")
  try:
    schedule = schedules.make(**stored["schedule"])
    return process.Absorbing(vocab_size=size, mask_id=stored["mask_id"], schedule=schedule)
  except (TypeError, ValueError) as error:
    raise InputError(f"{directory}/config.json: process: {error}") from None


def _read(tree, path):
  for key in path.split("/"):
    tree = tree[key]
  return tree


def _write(tree, path, value):
  *folders, leaf = path.split("/")
  for key in folders:
    tree = tree.setdefault(key, {})
  tree[leaf] = value
