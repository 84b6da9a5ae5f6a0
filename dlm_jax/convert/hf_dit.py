# SPDX-License-Identifier: Apache-2.0
"""DiT (and our causal judge) ↔ the public checkpoint layout: config.json + model.safetensors.

Names and orientation follow the public MDLM release, which Duo and the distilled students share:
`backbone.blocks.3.attn_qkv.weight` is [3D, D], rows q | k | v, head-major. Our layers are stacked
and our kernels transposed.

Every tensor of a file is used or explained, and its shape is checked. What no check can see: a
square matrix (attn_out, sigma_map.mlp.2) stored transposed, and tensors of one shape swapped.
"""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dlm_jax import models
from dlm_jax.arrays import Params
from dlm_jax.convert import families, files, trees
from dlm_jax.errors import InputError
from dlm_jax.models import discriminator

# (public name, our path, transposed); {} is the layer number. In the order in which the public
# modules register their parameters: moving averages are lists in this order.
_EMBED = (("vocab_embed.embedding", "embed/embedding", False),)
_TIME = (
  ("sigma_map.mlp.0.weight", "time/expand/kernel", True),
  ("sigma_map.mlp.0.bias", "time/expand/bias", False),
  ("sigma_map.mlp.2.weight", "time/contract/kernel", True),
  ("sigma_map.mlp.2.bias", "time/contract/bias", False),
)
_BLOCK = (
  ("blocks.{}.norm1.weight", "blocks/norm1/scale", False),
  ("blocks.{}.attn_qkv.weight", "blocks/attention/qkv/kernel", True),
  ("blocks.{}.attn_out.weight", "blocks/attention/out/kernel", True),
  ("blocks.{}.norm2.weight", "blocks/norm2/scale", False),
  ("blocks.{}.mlp.0.weight", "blocks/mlp/expand/kernel", True),
  ("blocks.{}.mlp.0.bias", "blocks/mlp/expand/bias", False),
  ("blocks.{}.mlp.2.weight", "blocks/mlp/contract/kernel", True),
  ("blocks.{}.mlp.2.bias", "blocks/mlp/contract/bias", False),
)
_MODULATION = (
  ("blocks.{}.adaLN_modulation.weight", "blocks/modulation/kernel", True),
  ("blocks.{}.adaLN_modulation.bias", "blocks/modulation/bias", False),
)
_OUTPUT = (
  ("output_layer.norm_final.weight", "output/norm/scale", False),
  ("output_layer.linear.weight", "output/project/kernel", True),
  ("output_layer.linear.bias", "output/project/bias", False),
  ("output_layer.adaLN_modulation.weight", "output/modulation/kernel", True),
  ("output_layer.adaLN_modulation.bias", "output/modulation/bias", False),
)
_SPECTRAL = tuple(
  (f"output_layer.main.{number}.{public}", f"output/{name}/{ours}", ours == "kernel")
  for number, name in ((0, "expand"), (2, "contract"))
  for public, ours in (
    ("bias", "bias"),
    ("weight_orig", "kernel"),
    ("weight_u", "u"),
    ("weight_v", "v"),
  )
)
Network = models.DiT | models.Causal | models.Discriminator
_LAYOUTS = {
  models.DiT: (_EMBED + _TIME, _BLOCK + _MODULATION, _OUTPUT),
  models.Causal: (_EMBED, _BLOCK, (("norm_final.weight", "norm/scale", False),)),
  models.Discriminator: (_EMBED + _TIME, _BLOCK + _MODULATION, _SPECTRAL),
}
_PREFIX = "backbone."  # twice where a Lightning module wraps a Hugging Face class; or absent
_BUFFER = "rotary_emb.inv_freq"  # a constant of the network, in some public files
# Other networks that distillation keeps beside the student. Each must be complete; none is loaded.
_OTHER_TREES = ("fake_model.", "teacher.", "student_ema.", "discriminator.")
_UNUSED = {"reward_baseline"}  # a scalar that DiDi-Instruct's trainer registers and never reads


def save(
  path: pathlib.Path | str,
  model: models.DiT | models.Causal,
  params: Params,
  proc=None,
  *,
  dtype: str = "float32",
  extra: dict[str, Any] | None = None,
) -> None:
  """Write config.json and model.safetensors.

  A network of a uniform process is written as model_type DUO, one of an absorbing process as mdlm.

  Args:
    path: directory, created if needed.
    model: the network.
    params: its parameters.
    proc: forward process; None for a causal network.
    dtype: "float32", or "bfloat16" to halve the file.
    extra: JSON-able facts stored in config.json under "dlm_jax" (tokenizer fingerprint, …).

  Raises:
    InputError: the process or its schedule has no name to store.
  """
  directory = pathlib.Path(path)
  tensors = {name: x.astype(dtype) for name, x in to_tensors(model, params).items()}
  config = {**families.describe(model, proc), "torch_dtype": dtype}
  config["dlm_jax"] |= extra or {}
  directory.mkdir(parents=True, exist_ok=True)
  files.write(directory / "model.safetensors", tensors)
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(
  path: pathlib.Path | str, config: dict[str, Any], *, weights: str | None = None, **overrides
) -> tuple[models.DiT | models.Causal, Params, Any]:
  """Read a network in the public layout; every tensor must be used or explained, and fit.

  Args:
    path: directory with config.json and the weights, or the file of the weights; see `files.find`.
    config: the parsed config.json.
    weights: "ema" or "raw" of a Lightning checkpoint; None: the moving average if there is one.
    **overrides: fields of the model's config that do not change shapes (dtype, attention, …).

  Returns:
    The network, float32 parameters and the process (None for a causal network).

  Raises:
    InputError: a tensor is missing, unknown or of the wrong shape, or the file is damaged.
  """
  if weights not in (None, "ema", "raw"):
    raise InputError(f"weights={weights!r} is unknown; use 'ema' or 'raw'.")
  source = pathlib.Path(path)
  directory = source.parent if source.is_file() else source
  model = families.make_model(directory, config, overrides)
  proc = families.make_process(directory, config, model)
  tensors, average = files.read(source)
  if weights == "ema" and average is None:
    raise InputError(f"{source} keeps no moving average; leave out weights='ema'.")
  if average is not None and weights != "raw":
    _match(model, tensors, source)
    tensors = _name_average(model, average, source)
  return model, from_tensors(model, tensors, source=source), proc


def to_tensors(model: Network, params: Params) -> dict[str, Array]:
  """Return a tree like the parameters (gradients too) under public names and orientation."""
  tensors = {}
  for name, ours, layer, transposed in _entries(model):
    value = trees.read(params, ours)
    value = value if layer is None else value[layer]
    tensors[_PREFIX + name] = jnp.asarray(value.T if transposed else value)
  return tensors


def from_tensors(
  model: Network,
  tensors: Mapping[str, Any],
  *,
  source: pathlib.Path | str = "checkpoint",
) -> Params:
  """Return float32 parameters from arrays under public names, with or without their prefix.

  Args:
    model: the network; says which tensors there must be, and their shapes. A discriminator's come
      in the layout of `discriminator.join`.
    tensors: arrays by name; every one must be used, rotary frequencies are checked and dropped.
      The trees fake_model.*, teacher.*, student_ema.* and discriminator.* of distillation are
      dropped if each is one complete network of the same sizes.
    source: where they come from, for messages.

  Raises:
    InputError: a tensor is missing, unknown, of the wrong shape, or of another rotary base.
  """
  matched = _match(model, tensors, source)
  columns: dict[str, list] = {}
  for name, ours, _, transposed in _entries(model):
    value = np.asarray(matched[name], np.float32)
    columns.setdefault(ours, []).append(value.T if transposed else value)
  params: Params = {}
  for ours, values in columns.items():
    stacked = ours.startswith("blocks/")
    trees.write(params, ours, jnp.asarray(np.stack(values) if stacked else values[0]))
  return params


def _entries(model: Network) -> Iterator[tuple[str, str, int | None, bool]]:
  """Yield (public name, our path, layer, transposed), in the order of the public modules."""
  before, block, after = _LAYOUTS[type(model)]
  for name, ours, transposed in before:
    yield name, ours, None, transposed
  for layer in range(model.config.layers):
    for name, ours, transposed in block:
      yield name.format(layer), ours, layer, transposed
  for name, ours, transposed in after:
    yield name, ours, None, transposed


def _shapes(model) -> dict[str, tuple[int, ...]]:
  """Return the shape of every public tensor, in the order of the public modules."""
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  sigma = () if isinstance(model, models.Causal) else (jax.ShapeDtypeStruct((1,), jnp.float32),)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens, *sigma)
  shapes = variables["params"]
  if isinstance(model, models.Discriminator):
    shapes = jax.eval_shape(
      functools.partial(discriminator.join, model), shapes, variables["spectral"]
    )
  wanted = {}
  for name, ours, layer, transposed in _entries(model):
    shape = trees.read(shapes, ours).shape[layer is not None :]
    wanted[name] = shape[::-1] if transposed else shape
  return wanted


def _match(model, tensors: Mapping[str, Any], source) -> dict[str, Any]:
  """Return the student's tensors without prefix, after checking every name and shape of a file."""
  by_tree: dict[str, dict[str, str]] = {"": {}}  # tree -> bare name -> name in the file
  for stored in sorted(tensors.keys() - _UNUSED):
    tree = next((tree for tree in _OTHER_TREES if stored.startswith(tree)), "")
    name = stored.removeprefix(tree).removeprefix(_PREFIX).removeprefix(_PREFIX)
    names = by_tree.setdefault(tree, {})
    if name in names:
      raise InputError(f"{source}: tensor {stored} is there twice, also as {names[name]}.")
    names[name] = stored
  wanted = _shapes(model)
  for tree, names in by_tree.items():
    shapes = wanted
    if tree == "discriminator.":
      shapes = _shapes(models.Discriminator(model.config, trained_layers=1))
    _check_tree(source, tree, names, tensors, shapes)
    if _BUFFER in names:
      _check_rotary(source, names[_BUFFER], tensors[names[_BUFFER]], model.config)
  return {name: tensors[by_tree[""][name]] for name in wanted}


def _check_tree(source, tree, names, tensors, wanted):
  """Refuse a tree that is not exactly one network of the wanted shapes."""
  bare = bool(names) and all(tree + name == stored for name, stored in names.items())
  for name, shape in wanted.items():
    if name not in names:
      raise InputError(f"{source}: tensor {tree}{'' if bare else _PREFIX}{name} is missing.")
    value = tensors[names[name]]
    if value.shape != shape:
      hint = "; is it transposed?" if value.shape == shape[::-1] else "."
      raise InputError(f"{source}: tensor {names[name]} is {value.shape}, expected {shape}{hint}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise InputError(f"{source}: tensor {names[name]} is {value.dtype}, not floating-point.")
  strangers = sorted(stored for name, stored in names.items() if name not in {*wanted, _BUFFER})
  if strangers:
    raise InputError(f"{source}: unknown tensor {strangers[0]}; the network has none.")


def _check_rotary(source, name, stored, config):
  """Refuse a network whose rotary frequencies are not 10000^(−2k/C): ours would differ."""
  channels = config.dim // config.heads
  want = 1e4 ** (-np.arange(0, channels, 2) / channels)
  tolerance = 1e-5 if stored.dtype == np.float32 else 2.0**-8  # half a bfloat16 spacing
  stored = np.asarray(stored, np.float64)
  if stored.shape != want.shape or not np.allclose(stored, want, rtol=tolerance, atol=0):
    raise InputError(
      f"{source}: tensor {name} is not 10000^(-2k/{channels}); only this base loads."
    )


def _name_average(model, average: Sequence[Any], source) -> dict[str, Any]:
  """Return a list of shadow parameters by name; they are stored in the order of the modules."""
  wanted = _shapes(model)
  if len(average) != len(wanted):
    raise InputError(
      f"{source}: ema.shadow_params holds {len(average)} tensors, the network {len(wanted)}."
    )
  for number, (value, (name, shape)) in enumerate(zip(average, wanted.items(), strict=True)):
    if value.shape != shape:
      raise InputError(
        f"{source}: ema.shadow_params[{number}] is {value.shape}, expected {shape} of {name}."
      )
  return dict(zip(wanted, average, strict=True))
