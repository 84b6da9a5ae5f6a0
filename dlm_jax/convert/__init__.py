# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the Hugging Face layout ↔ our networks. Strict: nothing is skipped silently."""

import hashlib
import json
import pathlib
import re
from typing import Any

from jax.sharding import Mesh

from dlm_jax.arrays import Params
from dlm_jax.convert import (
  decoder_config,
  families,
  files,
  hf_discriminator,
  hf_dit,
  hf_gpt2,
  hf_qwen3,
)
from dlm_jax.convert.decoder_config import mask_id
from dlm_jax.convert.hf_discriminator import save as save_discriminator
from dlm_jax.errors import InputError
from dlm_jax.models import Critic, Decoder
from dlm_jax.process import Absorbing

__all__ = [
  "block_length",
  "fingerprint",
  "is_decoder",
  "is_denoiser",
  "load",
  "load_discriminator",
  "mask_id",
  "open_decoder",
  "read_config",
  "save",
  "save_discriminator",
]


def read_config(path: pathlib.Path | str) -> dict[str, Any]:
  """Return the parsed config.json of a checkpoint directory, or beside a file of weights.

  Raises:
    InputError: it is missing, unreadable or names no model_type.
  """
  path = pathlib.Path(path)
  known = ", ".join((*families.FAMILIES, *decoder_config.MODEL_TYPES))
  file = (path.parent if path.is_file() else path) / "config.json"
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    if path.is_file():
      raise InputError(
        f"{path} has no config.json beside it; write one with the sizes and the model_type "
        f"({known}), which tensors do not tell."
      ) from None
    raise InputError(f"{path} is not a checkpoint: it has no config.json.") from None
  except (OSError, ValueError) as error:
    raise InputError(f"{file} cannot be read as JSON: {error}") from None
  if not isinstance(config, dict) or "model_type" not in config:
    raise InputError(f"{file} names no model_type; is this a model directory? Known: {known}.")
  return config


def is_denoiser(path: pathlib.Path | str) -> bool:
  """Return whether a checkpoint has a forward process, that is, can be sampled by denoising.

  Raises:
    InputError: as `read_config`, or the model type is unknown.
  """
  name = families.name_family(read_config(path), path)
  return name in families.FAMILIES and bool(families.FAMILIES[name].processes)


def is_decoder(path: pathlib.Path | str) -> bool:
  """Return whether a checkpoint is a decoder of the Qwen3 family, SDAR and I-DLM included.

  Raises:
    InputError: as `read_config`, or the model type is unknown.
  """
  return families.name_family(read_config(path), path) in decoder_config.MODEL_TYPES


def block_length(path: pathlib.Path | str) -> int | None:
  """Return the block length of a decoder: config.json's block_size, else the suffix -bN.

  Public files seldom have the former, and names of checkpoints of four tokens no suffix: None.

  Raises:
    InputError: as `read_config`, or block_size is no length.
  """
  given = read_config(path).get("block_size")
  if given is None:
    suffix = re.search(r"-b(\d+)$", pathlib.Path(path).resolve().name)
    return int(suffix[1]) if suffix else None
  if isinstance(given, bool) or not isinstance(given, int) or given < 1:
    raise InputError(f"{path}/config.json: block_size={given!r} is not a number of tokens.")
  return given


def open_decoder(path: pathlib.Path | str, **overrides) -> tuple[Decoder, Absorbing | None]:
  """Return the network and process of a decoder without reading its weights; see `load`.

  Raises:
    InputError: its config.json asks for something else, or an SDAR names no mask.
  """
  config, path = read_config(path), pathlib.Path(path)
  model = decoder_config.make_model(path, config, overrides)
  return model, decoder_config.make_process(path, config, model)


def fingerprint(path: pathlib.Path | str) -> str:
  """Return a hash of a model directory's weights, for recording what a number belongs to.

  A discriminator beside them counts: it guides samples.

  Raises:
    InputError: there are none.
  """
  digest = hashlib.sha256()
  found, critic = files.find(path), pathlib.Path(path) / hf_discriminator.FILE
  for file in (*found, *((critic,) if critic.is_file() else ())):
    with file.open("rb") as stream:
      while block := stream.read(2**22):
        digest.update(block)
  return digest.hexdigest()[:16]


def load(
  path: pathlib.Path | str,
  *,
  weights: str | None = None,
  params_dtype: str = "float32",
  mesh: Mesh | None = None,
  **overrides,
) -> tuple[Any, Params, Any]:
  """Load a network from config.json and the weights beside it.

  Weights are model.safetensors or its shards; pytorch_model.bin; or one Lightning *.ckpt. The
  latter two are read without torch and without running anything they contain.

  Args:
    path: directory in the Hugging Face layout, or the file of weights next to a config.json.
    weights: of a Lightning checkpoint: "raw", or "ema" for the moving average; None: the average
      if there is one.
    params_dtype: of a decoder: "bfloat16" keeps public weights as they are.
    mesh: of a decoder: devices that its parameters are sharded over.
    **overrides: fields of the model's config that change no shape, e.g. dtype="float32".

  Returns:
    (model, params, process); the process is None for autoregressive networks. That of a decoder
    with a mask token is absorbing: it names the mask; how blocks are denoised is the sampler's.

  Raises:
    InputError: unknown model type; missing, extra, misshapen or unreadable tensors.

  Example:
    >>> model, params, proc = load("data/idlm-duo", dtype="float32")  # doctest: +SKIP
  """
  config = read_config(path)
  name = families.name_family(config, path)
  if weights is not None and name in (*decoder_config.MODEL_TYPES, "gpt2"):
    raise InputError(f"{path}: weights={weights!r} is a choice of Lightning checkpoints only.")
  if name in decoder_config.MODEL_TYPES:
    return hf_qwen3.load(path, config, params_dtype=params_dtype, mesh=mesh, **overrides)
  if params_dtype != "float32" or mesh is not None:
    raise InputError(f"{path}: params_dtype and mesh are choices of decoders, not of a {name}.")
  if name != "gpt2":
    return hf_dit.load(path, config, weights=weights, **overrides)
  return (*hf_gpt2.load(path), None)


def save(
  path: pathlib.Path | str,
  model,
  params: Params,
  proc=None,
  *,
  dtype: str | None = None,
  extra: dict[str, Any] | None = None,
  **options,
) -> None:
  """Write a network as `load` reads it: config.json and model.safetensors.

  Args:
    path: directory, created if needed.
    model: the network.
    params: its parameters.
    proc: forward process; None for an autoregressive network.
    dtype: "float32" or "bfloat16"; None: float32, for a decoder what its parameters are kept in.
    extra: JSON-able facts stored in config.json under "dlm_jax" (tokenizer fingerprint, …).
    **options: of a decoder: block_length, shard_bytes; see `hf_qwen3.save`.

  Raises:
    InputError: the process or its schedule has no name to store.
  """
  if isinstance(model, Decoder):
    hf_qwen3.save(path, model, params, proc, dtype=dtype, extra=extra, **options)
  else:
    hf_dit.save(path, model, params, proc, dtype=dtype or "float32", extra=extra, **options)


def load_discriminator(path: pathlib.Path | str, **overrides) -> Critic | None:
  """Load the discriminator that lies beside a student's weights; None if there is none.

  Args:
    path: as for `load`.
    **overrides: fields of the model's config that change no shape, e.g. dtype="float32".

  Raises:
    InputError: unknown model type; missing, extra, misshapen or unreadable tensors.
  """
  return hf_discriminator.load(path, read_config(path), **overrides)
