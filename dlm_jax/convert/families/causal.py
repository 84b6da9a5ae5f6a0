# SPDX-License-Identifier: Apache-2.0
"""`Causal`: our autoregressive judge, in the names of the public MDLM release."""

import dataclasses
import pathlib
from typing import Any

from dlm_jax import models
from dlm_jax.convert import mdlm_layout
from dlm_jax.convert.families import dit
from dlm_jax.convert.family import Family
from dlm_jax.errors import InputError

_TYPE = "dlm_jax_causal"


def read(
  source: pathlib.Path, config: dict[str, Any], overrides: dict[str, Any]
) -> tuple[models.Causal, None]:
  """Build the network that a config describes; it has no process.

  Raises:
    InputError: a size is missing or impossible.
  """
  where = f"{source.parent if source.is_file() else source}/config.json"
  fields = dit.numbers(where, config, dit.FIELDS)
  try:
    return models.Causal(models.CausalConfig(**fields, **overrides)), None
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None


def describe(model: models.Causal, proc: None) -> dict[str, Any]:
  """Return the config.json of a network."""
  del proc
  options = dataclasses.asdict(model.config)
  config = {public: options[ours] for public, ours in dit.FIELDS.items()}
  return {
    "model_type": _TYPE,
    **config,
    "mlp_ratio": options["mlp_ratio"],
    "dlm_jax": {"process": None},
  }


FAMILY = Family(
  model_types=(_TYPE,),
  network=models.Causal,
  read=read,
  describe=describe,
  **mdlm_layout.reading(mdlm_layout.causal_entries),
  name="causal",
  options=models.CausalConfig,
)
