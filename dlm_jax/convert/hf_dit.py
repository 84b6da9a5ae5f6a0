# SPDX-License-Identifier: Apache-2.0
"""DiT (and our causal judge) ↔ the public checkpoint layout: config.json + model.safetensors.

Names and orientation follow the public MDLM release: `backbone.blocks.3.attn_qkv.weight` is
[3D, D], rows q | k | v, head-major. Our layers are stacked and our kernels transposed.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
  kind = "mdlm" if isinstance(model, models.DiT) else "dlm_jax_causal"
  directory = pathlib.Path(path)
  tensors = {}
  for name, ours, transposed in _TABLES[kind]:
    array = _read(params, ours)
    layers = range(model.config.layers) if "{}" in name else (None,)
    for layer in layers:
      value = array if layer is None else array[layer]
      value = value.T if transposed else value
      tensors[_PREFIX + name.format(layer)] = jnp.asarray(value, dtype)
  options = dataclasses.asdict(model.config)
  config = {"model_type": kind, **{public: options[our] for public, our in _CONFIG.items()}}
  if kind == "mdlm":
    config |= {"cond_dim": options["cond_dim"], "time_conditioning": options["time_conditioning"]}
  config |= {"torch_dtype": dtype, "mlp_ratio": options["mlp_ratio"]}
  config["dlm_jax"] = {"process": _process_config(proc), **(extra or {})}
  directory.mkdir(parents=True, exist_ok=True)
  temporary = directory / "model.safetensors.tmp"
  save_file(tensors, str(temporary), metadata={"format": "pt"})
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
  directory, kind = pathlib.Path(path), config["model_type"]
  try:
    tensors = load_file(str(directory / "model.safetensors"))
  except (OSError, SafetensorError) as error:
    raise InputError(f"{directory / 'model.safetensors'} cannot be read: {error}") from None
  model = _make_model(directory, config, overrides)
  tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
  tensors.pop(_BUFFER, None)
  shapes = _shapes(model)
  params: Params = {}
  for name, ours, transposed in _TABLES[kind]:
    want = _read(shapes, ours).shape
    layers = range(model.config.layers) if "{}" in name else (None,)
    values = [
      _take(directory, tensors, name.format(layer), want[layer is not None :], transposed)
      for layer in layers
    ]
    _write(params, ours, jnp.asarray(np.stack(values) if "{}" in name else values[0], jnp.float32))
  if tensors:
    raise InputError(f"{directory}: unknown tensor {_PREFIX}{min(tensors)}; the network has none.")
  return model, params, _make_process(directory, config, model)


def _take(directory, tensors, name, want, transposed):
  if name not in tensors:
    raise InputError(f"{directory}: tensor {_PREFIX}{name} is missing.")
  value = np.asarray(tensors.pop(name), np.float32)
  stored = want[::-1] if transposed else want
  if value.shape != stored:
    raise InputError(f"{directory}: tensor {_PREFIX}{name} is {value.shape}, expected {stored}.")
  return value.T if transposed else value


def _make_model(directory, config, overrides):
  causal = config["model_type"] == "dlm_jax_causal"
  keys = dict(_CONFIG) if causal else {**_CONFIG, "cond_dim": "cond_dim"}
  missing = [key for key in keys if key not in config]
  if missing:
    raise InputError(f"{directory}/config.json lacks {missing[0]!r}.")
  fields = {ours: config[public] for public, ours in keys.items()}
  fields["mlp_ratio"] = config.get("mlp_ratio", 4)
  if causal:
    return models.Causal(models.CausalConfig(**fields, **overrides))
  fields["time_conditioning"] = config.get("time_conditioning", False)
  return models.DiT(models.DiTConfig(**fields, **overrides))


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
  schedule = schedules.make(**stored["schedule"])
  return process.Absorbing(vocab_size=size, mask_id=stored["mask_id"], schedule=schedule)


def _read(tree, path):
  for key in path.split("/"):
    tree = tree[key]
  return tree


def _write(tree, path, value):
  *folders, leaf = path.split("/")
  for key in folders:
    tree = tree.setdefault(key, {})
  tree[leaf] = value
