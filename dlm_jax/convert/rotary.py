# SPDX-License-Identifier: Apache-2.0
"""Rotary positions ↔ what config.json of the Qwen3 family says of them."""

import math
from typing import Any

from dlm_jax import models
from dlm_jax.errors import InputError

_OBJECTS = ("rope_parameters", "rope_scaling")  # newer files have the former, and θ in it
_TRAINED = ("original_max_position_embeddings", "max_position_embeddings")
_WEIGHTS = ("mscale", "mscale_all_dim")  # of two factors of attention, one over the other
_NUMBERS = {  # public key -> ours
  "factor": "factor",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "attention_factor": "attention",
}
_KNOWN = (*_NUMBERS, _TRAINED[0], *_WEIGHTS, "truncate", "rope_type", "type", "rope_theta")


def read(where: Any, config: dict[str, Any]) -> tuple[float, models.Yarn | None]:
  """Return θ and how positions are stretched; None: they are not.

  Args:
    where: the file, for messages.
    config: the parsed config.json; what is null in it is as if it were not there.

  Raises:
    InputError: a field is missing or impossible, or positions are of another type.
  """
  nested, scaling = ({} if config.get(key) is None else config[key] for key in _OBJECTS)
  for key, value in zip(_OBJECTS, (nested, scaling), strict=True):
    if not isinstance(value, dict):
      raise InputError(f"{where}: {key}={value!r} is no object; leave it out, or give its fields.")
  scaling = scaling or nested
  base = _number(where, {**nested, **config}, "rope_theta")
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "default":
    return base, None
  if kind != "yarn":
    raise InputError(
      f"{where}: rotary positions of type {kind!r} are not supported; default and yarn are."
    )
  return base, _yarn(where, config, {key: x for key, x in scaling.items() if x is not None})


def _yarn(where, config, given):
  if strange := sorted(set(given) - set(_KNOWN)):
    raise InputError(f"{where}: {strange[0]!r} is unknown to yarn; known: {', '.join(_KNOWN)}.")
  fields = {ours: _number(where, given, key) for key, ours in _NUMBERS.items() if key in given}
  weights = [_number(where, given, key) for key in _WEIGHTS if key in given]
  if "factor" not in fields:
    raise InputError(f"{where} lacks 'factor' of yarn, how many times the length is stretched.")
  if len(weights) == 2 and "attention" not in fields:
    over, under = (0.1 * weight * math.log(max(fields["factor"], 1)) + 1 for weight in weights)
    fields["attention"] = over / under
  trained = next((x for x in (given, config) if x.get(_TRAINED[0]) is not None), None)
  name = _TRAINED[1] if trained is None else _TRAINED[0]
  length, truncate = _number(where, trained or config, name), given.get("truncate", True)
  if length % 1:
    raise InputError(f"{where}: {name}={length!r} is not a whole number.")
  if not isinstance(truncate, bool):
    raise InputError(f"{where}: truncate={truncate!r} is neither true nor false.")
  try:
    return models.Yarn(original_length=int(length), truncate=truncate, **fields)
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None


def _number(where, fields, key):
  value = fields.get(key)
  if value is None:
    raise InputError(f"{where} lacks {key!r}.")
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**63:
    raise InputError(f"{where}: {key}={value!r} is not a number above 0.")
  return float(value)


def describe(yarn: models.Yarn | None) -> dict[str, Any] | None:
  """Return the rope_scaling of a config.json."""
  if yarn is None:
    return None
  fields = {key: getattr(yarn, ours) for key, ours in _NUMBERS.items()}
  fields |= {_TRAINED[0]: yarn.original_length, "truncate": yarn.truncate}
  return {"rope_type": "yarn", **{key: x for key, x in fields.items() if x is not None}}
