# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a `Network`: opened without weights, loaded. No family is named here."""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dlm_jax import fields, json_file
from dlm_jax.arrays import Params
from dlm_jax.convert import adapters, families, files, layout, places
from dlm_jax.convert.family import Family
from dlm_jax.convert.weights import Weights
from dlm_jax.errors import InputError
from dlm_jax.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Network:
  """A network of a checkpoint; how it writes is asked here, never of its class.

  Attributes:
    model: the network.
    process: forward process; None for one that predicts next tokens.
    family: of `convert.families`.
    writes: "grid", "blocks", "next", "introspective" or "whole", see `family.WRITES`.
    source: directory or file of the weights.
    config: its config.json.
    weights: own the parameters; read when they are first asked for.
    adapter: directory of a low-rank adapter that is added to the weights; None: there is none.
  """

  model: Any
  process: Process | None
  family: Family
  writes: str
  source: pathlib.Path
  config: dict[str, Any]
  weights: Weights
  adapter: pathlib.Path | None = None

  def __repr__(self) -> str:
    return f"Network({str(self.source)!r}: {self.kind}, writes {self.writes}, {self.weights!r})"

  @property
  def params(self) -> Params:
    """Parameters; see `weights`."""
    return self.weights.read()

  @property
  def kind(self) -> str:
    """What config.json calls it."""
    return self.config["model_type"]

  @property
  def facts(self) -> dict[str, Any]:
    """What we stored of it: tokenizer fingerprint, objective, step, …; {} of public files."""
    return self.config.get("dlm_jax", {})

  @property
  def block_length(self) -> int | None:
    """Tokens of a block, of a network of blocks: config.json's block_size, else the suffix -bN.

    Public files seldom have the former, and names of checkpoints of four tokens no suffix: None.
    The name is the given one, that of what it links to, or that of a Hugging Face cache.

    Raises:
      InputError: block_size is no length.
    """
    if "blocks" not in self.family.writes:
      return None
    where, most = f"{self.source}/config.json", self.model.config.length
    kind = fields.Optional(fields.Whole(1, most))
    given = fields.read(where, self.config, {"block_size": kind}, {"block_size": None})
    if given["block_size"] is not None:
      return given["block_size"]
    known = [name for x in (self.adapter, self.source) if x for name in places.names(x)]
    found = (re.search(r"-b([1-9]\d{0,8})$", name) for name in known)
    return next((int(suffix[1]) for suffix in found if suffix), None)


def read_config(path: pathlib.Path | str) -> dict[str, Any]:
  """Return the parsed config.json of a checkpoint directory, or beside a file of weights.

  Raises:
    InputError: it is missing, unreadable or names no model_type.
  """
  path = adapters.locate(places.as_path(path)).source
  known = ", ".join(families.model_types())
  file = (path.parent if path.is_file() else path) / "config.json"
  try:
    config = json_file.read(file)
  except FileNotFoundError:
    if path.is_file():
      raise InputError(
        f"{path} has no config.json beside it; write one with the sizes and the model_type "
        f"({known}), which tensors do not tell."
      ) from None
    raise InputError(f"{path} is not a checkpoint: it has no config.json.") from None
  except (OSError, ValueError) as error:
    problem = getattr(error, "strerror", None) or error
    raise InputError(f"{file} cannot be read as JSON: {problem}; fetch it again.") from None
  if not isinstance(config, dict) or "model_type" not in config:
    raise InputError(f"{file} names no model_type; is this a model directory? Known: {known}.")
  fields.read(file, config, {"model_type": fields.Text()})
  fields.part(file, config, "dlm_jax")
  return config


def open_network(
  path: pathlib.Path | str,
  *,
  weights: str | None = None,
  params_dtype: str | None = None,
  mesh: Mesh | None = None,
  **overrides,
) -> Network:
  """Open a checkpoint: what config.json says is checked now, weights are read when asked for.

  Args:
    path: as for `load`; so are the others.
    weights: of a Lightning checkpoint.
    params_dtype: what parameters are kept in.
    mesh: what they are sharded over.
    **overrides: fields of the network's config that change no shape.

  Raises:
    InputError: unknown model type, a config that contradicts itself, or a choice it does not have.
  """
  place = adapters.locate(places.as_path(path))
  path, config = place.source, read_config(place.source)
  family = families.find(config, path)
  dtype = params_dtype or family.dtypes[0]
  if dtype not in family.dtypes:
    if len(family.dtypes) == 1:
      raise InputError(
        f"{path}: params_dtype={dtype!r} is a choice of decoders, not of a {config['model_type']}."
      )
    raise InputError(f"params_dtype={dtype!r} is unknown; use {' or '.join(family.dtypes)}.")
  if weights is not None and family.average is None:
    raise InputError(f"{path}: weights={weights!r} is a choice of Lightning checkpoints only.")
  if weights not in (None, "ema", "raw"):
    raise InputError(f"weights={weights!r} is unknown; use 'ema' or 'raw'.")
  model, process = family.read(path, config, overrides)
  kinds, where = {"writes": fields.Optional(fields.Text())}, f"{path}/config.json"
  stored = fields.read(f"{where}: dlm_jax", config.get("dlm_jax", {}), kinds, {"writes": None})
  return Network(
    model=model,
    process=process,
    family=family,
    writes=family.way(process, stored["writes"], where),
    source=path,
    config=config,
    weights=Weights(functools.partial(_read, family, model, place, config, weights, dtype, mesh)),
    adapter=place.adapter,
  )


def _read(family, model, place, config, weights, dtype, mesh):
  """Return the parameters of a checkpoint; every tensor must be used or explained, and fit."""
  path = place.weights
  tensors, shadows = files.read(path, config)
  if place.adapter is not None:
    if shadows is not None and weights != "raw":
      raise InputError(f"{path} keeps a moving average, which adapters are not for; weights='raw'.")
    tensors = adapters.merged(tensors, place.adapter)
  if weights == "ema" and shadows is None:
    raise InputError(f"{path} keeps no moving average; leave out weights='ema'.")
  found = family.match(model, tensors, path)
  if shadows is not None and weights != "raw":
    if family.average is None:
      raise InputError(f"{path} keeps a moving average, which of this network is not known.")
    found = family.average(model, shadows, path)
  shapes = layout.param_shapes(model)
  shardings = layout.sharding_of(mesh, model, shapes)
  entries = family.entries(model)
  return layout.read(entries, found, shapes, dtype=dtype, shardings=shardings, source=path)


def load(
  path: pathlib.Path | str,
  *,
  weights: str | None = None,
  params_dtype: str | None = None,
  mesh: Mesh | None = None,
  **overrides,
) -> tuple[Any, Params, Process | None]:
  """Load a network from config.json and the weights beside it.

  Weights are model.safetensors or pytorch_model.bin, either in shards too, or one Lightning *.ckpt.
  All but the first are read without torch and without running anything they contain.

  Args:
    path: directory in the Hugging Face layout, or the file of weights next to a config.json; or the
      directory of a LoRA adapter, see `adapters`.
    weights: of a Lightning checkpoint: "raw", or "ema" for the moving average; None: the average
      if there is one.
    params_dtype: of a decoder: "bfloat16" keeps public weights as they are; None: float32.
    mesh: devices that parameters are sharded over by the rules of `dlm_jax.mesh`; None: the first.
    **overrides: fields of the network's config that change no shape, e.g. dtype="float32".

  Returns:
    (model, params, process); the process is None for autoregressive networks. That of a decoder
    with a mask token is absorbing: it names the mask; how blocks are denoised is the sampler's.

  Raises:
    InputError: unknown model type; missing, extra, misshapen or unreadable tensors.

  Example:
    >>> model, params, proc = load("data/idlm-duo", dtype="float32")  # doctest: +SKIP
  """
  options = {"weights": weights, "params_dtype": params_dtype, "mesh": mesh}
  network = open_network(path, **options, **overrides)
  return network.model, network.params, network.process


def to_tensors(model: Any, params: Params) -> dict[str, jax.Array]:
  """Return a tree like the parameters (gradients too) under public names and orientation."""
  return layout.to_tensors(families.of(model).entries(model), params)


def from_tensors(
  model: Any,
  tensors: Mapping[str, Any],
  *,
  dtype: str = "float32",
  source: pathlib.Path | str = "checkpoint",
) -> Params:
  """Return parameters from arrays under public names; every one must be used or explained.

  Args:
    model: says which tensors there must be, and their shapes.
    tensors: by name.
    dtype: what parameters are kept in.
    source: where they come from, for messages.

  Raises:
    InputError: a tensor is missing, unknown or of the wrong shape.
  """
  family = families.of(model)
  found = family.match(model, tensors, source)
  shapes = layout.param_shapes(model)
  return layout.read(family.entries(model), found, shapes, dtype=dtype, source=source)


def load_beside(path: pathlib.Path | str, name: str, **overrides) -> Any:
  """Load what lies beside a network's weights; None if there is none.

  Args:
    path: as for `load`.
    name: "discriminator": a `models.Critic`.
    **overrides: fields of the network's config that change no shape, e.g. dtype="float32".

  Raises:
    InputError: unknown model type; missing, extra, misshapen or unreadable tensors.
  """
  source = adapters.locate(path).source
  return families.beside()[name].load(source, read_config(source), overrides)


def fingerprint(path: pathlib.Path | str) -> str:
  """Return a hash of a model directory's weights, for recording what a number belongs to.

  What lies beside them counts: a discriminator guides samples, an adapter is added.

  Raises:
    InputError: there are none.
  """
  digest = hashlib.sha256()
  place = adapters.locate(path)
  others = [place.source / f"{name}.safetensors" for name in families.beside()]
  if place.adapter is not None:
    others += [place.adapter / adapters.CONFIG, adapters.weights_of(place.adapter)]
  for file in (*files.find(place.weights), *(file for file in others if file.is_file())):
    with file.open("rb") as stream:
      while block := stream.read(2**22):
        digest.update(block)
  return digest.hexdigest()[:16]


def block_length(path: pathlib.Path | str) -> int | None:
  """Return `Network.block_length` of a checkpoint.

  Raises:
    InputError: as `open_network`.
  """
  return open_network(path).block_length


def writes(model: Any, process: Process | None) -> str:
  """Return how a network made in code writes, as `Network.writes` of its checkpoint would say.

  Raises:
    InputError: there are no checkpoints of such networks.
  """
  return families.of(model).way(process)
