# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the Hugging Face layout ↔ our networks. Strict: nothing is skipped silently."""

import hashlib
import json
import pathlib
from typing import Any

from dlm_jax.arrays import Params
from dlm_jax.convert import hf_dit, hf_gpt2
from dlm_jax.convert.hf_dit import save
from dlm_jax.errors import InputError

__all__ = ["fingerprint", "load", "read_config", "save"]


def read_config(path: pathlib.Path | str) -> dict[str, Any]:
  """Return the parsed config.json of a checkpoint directory.

  Raises:
    InputError: it is missing, unreadable or names no known model_type.
  """
  file = pathlib.Path(path) / "config.json"
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(f"{path} is not a checkpoint: it has no config.json.") from None
  except (OSError, ValueError) as error:
    raise InputError(f"{file} cannot be read as JSON: {error}") from None
  if not isinstance(config, dict) or "model_type" not in config:
    raise InputError(f"{file} names no model_type; is this a model directory?")
  return config


def fingerprint(path: pathlib.Path | str) -> str:
  """Return a hash of a model directory's weights, for recording what a number belongs to.

  Raises:
    InputError: there are none.
  """
  digest = hashlib.sha256()
  files = sorted(pathlib.Path(path).glob("*.safetensors"))
  if not files:
    raise InputError(f"{path} holds no *.safetensors.")
  for file in files:
    with file.open("rb") as stream:
      while block := stream.read(2**22):
        digest.update(block)
  return digest.hexdigest()[:16]


def load(path: pathlib.Path | str, **overrides) -> tuple[Any, Params, Any]:
  """Load a network from config.json + *.safetensors.

  Args:
    path: directory in the Hugging Face layout.
    **overrides: fields of the model's config that change no shape, e.g. dtype="float32".

  Returns:
    (model, float32 params, process); the process is None for autoregressive networks.

  Raises:
    InputError: unknown model type; missing, extra, misshapen or unreadable tensors.
  """
  config = read_config(path)
  kind = config["model_type"]
  if kind in ("mdlm", "dlm_jax_causal"):
    return hf_dit.load(path, config, **overrides)
  if kind == "gpt2":
    return (*hf_gpt2.load(path), None)
  raise InputError(f"{path}: model_type {kind!r} is unknown; known: mdlm, dlm_jax_causal, gpt2.")
