# SPDX-License-Identifier: Apache-2.0
"""A discriminator beside its student: discriminator.safetensors in the public DiDi-Instruct layout.

Names are those of the student's trunk; the head is `output_layer.main.{0,2}` with the leaves of
torch's spectral norm: weight_orig, weight_u, weight_v. In a Lightning checkpoint the same names
stand below `discriminator.`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from dlm_jax import fields, models
from dlm_jax.convert import files, layout, mdlm_layout
from dlm_jax.convert.families import dit
from dlm_jax.convert.family import Beside
from dlm_jax.errors import InputError
from dlm_jax.models import Critic, discriminator

_FILE = "discriminator.safetensors"
_TREE = "discriminator."


def save(directory: pathlib.Path, critic: Critic) -> None:
  """Write discriminator.safetensors into a model directory that exists."""
  tree = discriminator.join(critic.model, critic.params, critic.spectral)
  tensors = layout.to_tensors(mdlm_layout.discriminator_entries(critic.model), tree)
  bare = {name.removeprefix(mdlm_layout.PREFIX): value for name, value in tensors.items()}
  files.write(directory / _FILE, bare)


def load(source: pathlib.Path, config: dict[str, Any], overrides: dict[str, Any]) -> Critic | None:
  """Read the discriminator of a model directory or Lightning checkpoint; None if it has none.

  Args:
    source: the directory, or the file of the weights.
    config: the parsed config.json, which gives the sizes.
    overrides: fields of the network's config that change no shape.

  Raises:
    InputError: a tensor is missing, unknown or of the wrong shape.
  """
  directory = source.parent if source.is_file() else source
  file = directory / _FILE
  if file.is_file() and source.suffix != ".ckpt":
    (tensors, _), source = files.read(file, config), file
  else:
    found, _ = files.read(source, config)
    tensors = {name.removeprefix(_TREE): found[name] for name in found if name.startswith(_TREE)}
    if not tensors:
      return None
  where = f"{directory}/config.json"
  if config["model_type"].lower() not in map(str.lower, dit.FAMILY.model_types):
    raise InputError(f"{source}: a discriminator needs the sizes of a denoiser.")
  sizes = dit.read_model(where, config, overrides).config
  stored = fields.part(f"{where}: dlm_jax", config.get("dlm_jax", {}), "discriminator")
  kinds = {"trained_layers": fields.Whole(1, sizes.layers)}
  facts = fields.read(where, stored, kinds, {"trained_layers": min(4, sizes.layers)})
  return from_tensors(models.Discriminator(sizes, **facts), tensors, source)


def from_tensors(
  model: models.Discriminator, tensors: Mapping[str, Any], source: pathlib.Path | str = "checkpoint"
) -> Critic:
  """Return a discriminator with its parameters from arrays under public names.

  Args:
    model: says which tensors there must be, and their shapes.
    tensors: by name.
    source: where they come from, for messages.

  Raises:
    InputError: a tensor is missing, unknown or of the wrong shape.
  """
  entries = list(mdlm_layout.discriminator_entries(model))
  shapes = mdlm_layout.discriminator_shapes(model)
  found = mdlm_layout.match(entries, shapes, model.config, tensors, source)
  params, spectral = discriminator.split(model, layout.read(entries, found, shapes, source=source))
  return Critic(model=model, params=params, spectral=spectral)


def _facts(critic):
  return {"trained_layers": critic.model.trained_layers}


BESIDE = Beside(network=models.Discriminator, save=save, load=load, facts=_facts)
