# SPDX-License-Identifier: Apache-2.0
"""A discriminator beside its student: discriminator.safetensors in the public DiDi-Instruct layout.

Names are those of the student's trunk; the head is `output_layer.main.{0,2}` with the leaves of
torch's spectral norm: weight_orig, weight_u, weight_v. In a Lightning checkpoint the same names
stand below `discriminator.`.
"""

import pathlib

from dlm_jax import models
from dlm_jax.convert import families, files, hf_dit
from dlm_jax.errors import InputError
from dlm_jax.models import Critic, discriminator

FILE = "discriminator.safetensors"
_TREE = "discriminator."


def save(path: pathlib.Path | str, critic: Critic) -> None:
  """Write discriminator.safetensors into a model directory that exists."""
  tree = discriminator.join(critic.model, critic.params, critic.spectral)
  tensors = hf_dit.to_tensors(critic.model, tree)
  bare = {name.removeprefix("backbone."): value for name, value in tensors.items()}
  files.write(pathlib.Path(path) / FILE, bare)


def load(path: pathlib.Path | str, config: dict, **overrides) -> Critic | None:
  """Read the discriminator of a model directory or Lightning checkpoint; None if it has none.

  Args:
    path: the directory, or the file of the weights.
    config: the parsed config.json, which gives the sizes.
    **overrides: fields of the model's config that change no shape.

  Raises:
    InputError: a tensor is missing, unknown or of the wrong shape.
  """
  source = pathlib.Path(path)
  directory = source.parent if source.is_file() else source
  file = directory / FILE
  if file.is_file() and source.suffix != ".ckpt":
    (tensors, _), source = files.read(file), file
  elif not files.holds(source, _TREE):
    return None
  else:
    tensors, _ = files.read(source)
    tensors = {name.removeprefix(_TREE): x for name, x in tensors.items() if name.startswith(_TREE)}
    if not tensors:
      return None
  sizes = families.make_model(directory, config, overrides)
  if not isinstance(sizes, models.DiT):
    raise InputError(f"{source}: a discriminator needs the sizes of a denoiser.")
  ours = config.get("dlm_jax")
  stored = ours.get("discriminator", {}) if isinstance(ours, dict) else {}
  trained = stored.get("trained_layers", min(4, sizes.config.layers))
  if not isinstance(trained, int) or not 1 <= trained <= sizes.config.layers:
    raise InputError(
      f"{directory}/config.json: trained_layers={trained!r} must be in 1 … {sizes.config.layers}."
    )
  model = models.Discriminator(sizes.config, trained_layers=trained)
  tree = hf_dit.from_tensors(model, tensors, source=source)
  params, spectral = discriminator.split(model, tree)
  return Critic(model=model, params=params, spectral=spectral)
