# SPDX-License-Identifier: Apache-2.0
"""Names of tensors in the public MDLM release, which Duo and the distilled students share.

`backbone.blocks.3.attn_qkv.weight` is [3D, D], rows q | k | v, head-major. Our causal judge and the
discriminators of DiDi-Instruct have the same trunk.

Every tensor of a file is used or explained, and its shape is checked. What no check can see: a
square matrix (attn_out, sigma_map.mlp.2) stored transposed, and tensors of one shape swapped.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dlm_jax import models
from dlm_jax.convert import layout
from dlm_jax.convert.layout import Entry
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
PREFIX = "backbone."  # twice where a Lightning module wraps a Hugging Face class; or absent
_BUFFER = "rotary_emb.inv_freq"  # a constant of the network, in some public files
# Other networks that distillation keeps beside the student. Each must be complete; none is loaded.
_OTHER_TREES = ("fake_model.", "teacher.", "student_ema.", "discriminator.")
_UNUSED = {"reward_baseline"}  # a scalar that DiDi-Instruct's trainer registers and never reads


def denoiser_entries(model: models.DiT | models.BlockDiT) -> Iterator[Entry]:
  """Yield where a denoiser's tensors lie, in the order of the public modules."""
  yield from _entries(model, _EMBED + _TIME, _BLOCK + _MODULATION, _OUTPUT)
  if model.config.mask_noise:  # ours, behind what public files have
    yield Entry(f"{PREFIX}mask_noise.weight", "mask_noise", transposed=True)


def causal_entries(model: models.Causal) -> Iterator[Entry]:
  """Yield where our causal network's tensors lie."""
  return _entries(model, _EMBED, _BLOCK, (("norm_final.weight", "norm/scale", False),))


def discriminator_entries(model: models.Discriminator) -> Iterator[Entry]:
  """Yield where a discriminator's tensors lie in the tree of `discriminator.join`."""
  return _entries(model, _EMBED + _TIME, _BLOCK + _MODULATION, _SPECTRAL)


def _entries(model, before, block, after):
  for name, path, index, transposed in (
    *layout.numbered(before),
    *layout.numbered(block, model.config.layers),
    *layout.numbered(after),
  ):
    yield Entry(PREFIX + name, path, index, transposed)


def reading(entries: Callable[[Any], Iterable[Entry]]) -> dict[str, Callable]:
  """Return the fields of a `Family` that follow from where a network's tensors lie."""

  def match_entries(model, tensors, source):
    return match(entries(model), layout.param_shapes(model), model.config, tensors, source)

  def average_entries(model, shadows, source):
    return average(model, entries(model), shadows, source)

  return {"entries": entries, "match": match_entries, "average": average_entries}


def discriminator_shapes(model: models.Discriminator) -> Any:
  """Return the shapes of the tree of `discriminator.join`."""
  variables = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())
  joined = functools.partial(discriminator.join, model)
  return jax.eval_shape(joined, variables["params"], variables["spectral"])


def match(
  entries: Iterable[Entry],
  shapes: Any,
  config: models.DiTConfig | models.CausalConfig,
  tensors: Mapping[str, Any],
  source: pathlib.Path | str,
) -> dict[str, Any]:
  """Return a network's tensors by public name, after checking every name and shape of a file.

  Names may have their prefix once, twice or not at all. Rotary frequencies are checked and
  dropped. The trees fake_model.*, teacher.*, student_ema.* and discriminator.* of distillation are
  dropped if each is one complete network of the same sizes.

  Args:
    entries: of the network.
    shapes: of its parameters.
    config: its sizes.
    tensors: by stored name.
    source: where they come from, for messages.

  Raises:
    InputError: a tensor is missing, unknown, of the wrong shape, or of another rotary base.
  """
  by_tree: dict[str, dict[str, str]] = {"": {}}  # tree -> bare name -> name in the file
  for stored in sorted(tensors.keys() - _UNUSED):
    tree = next((tree for tree in _OTHER_TREES if stored.startswith(tree)), "")
    name = stored.removeprefix(tree).removeprefix(PREFIX).removeprefix(PREFIX)
    names = by_tree.setdefault(tree, {})
    if name in names:
      raise InputError(f"{source}: tensor {stored} is there twice, also as {names[name]}.")
    names[name] = stored
  wanted = _bare(layout.public_shapes(entries, shapes))
  for tree, names in by_tree.items():
    wants = wanted
    if tree == "discriminator.":
      judge = models.Discriminator(config, trained_layers=1)
      wants = layout.public_shapes(discriminator_entries(judge), discriminator_shapes(judge))
      wants = _bare(wants)
    bare = bool(names) and all(tree + name == stored for name, stored in names.items())
    missing = tree if bare else tree + PREFIX
    rest = {name: stored for name, stored in names.items() if name != _BUFFER}
    layout.check(lambda _: source, rest, tensors, wants, missing)
    if _BUFFER in names:
      _check_rotary(source, names[_BUFFER], tensors[names[_BUFFER]], config)
  return {PREFIX + name: tensors[by_tree[""][name]] for name in wanted}


def _bare(tensors):
  return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


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


def average(
  model: models.DiT | models.BlockDiT | models.Causal,
  entries: Iterable[Entry],
  shadows: Sequence[Any],
  source: pathlib.Path | str,
) -> dict[str, Any]:
  """Return a list of shadow parameters by public name; they lie in the order of the modules.

  Raises:
    InputError: their number or a shape is another one.
  """
  wanted = layout.public_shapes(entries, layout.param_shapes(model))
  if len(shadows) != len(wanted):
    raise InputError(
      f"{source}: ema.shadow_params holds {len(shadows)} tensors, the network {len(wanted)}."
    )
  for number, (value, (name, shape)) in enumerate(zip(shadows, wanted.items(), strict=True)):
    if value.shape != shape:
      name = name.removeprefix(PREFIX)
      raise InputError(
        f"{source}: ema.shadow_params[{number}] is {value.shape}, expected {shape} of {name}."
      )
  return dict(zip(wanted, shadows, strict=True))
