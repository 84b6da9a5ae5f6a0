# SPDX-License-Identifier: Apache-2.0
"""`BlockDiT`: the public denoisers of blocks BD3-LM, in the names of the MDLM release."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from dlm_jax import models, process, schedules
from dlm_jax.convert import mdlm_layout, processes
from dlm_jax.convert.families import dit
from dlm_jax.convert.family import Family
from dlm_jax.errors import InputError
from dlm_jax.process import Process

_TYPE = "bd3lm"
# Variants that would change the numbers; absent means the value given here.
_REQUIRED = {"cross_attn": True, "adaln": True, "causal": False, "time_conditioning": False}
# Numbers of its training that the public class keeps among its tensors.
_SCALARS = ("sampling_eps_min", "sampling_eps_max")


def read(
  source: pathlib.Path, config: dict[str, Any], overrides: dict[str, Any]
) -> tuple[models.BlockDiT, Process]:
  """Build the network that a config describes, and its process; the last id is the mask.

  Raises:
    InputError: a size is missing or impossible, the config asks for another architecture, or the
      stored process is incomplete or another one.
  """
  where = f"{source.parent if source.is_file() else source}/config.json"
  for key, value in _REQUIRED.items():
    if config.get(key, value) is not value:
      raise InputError(f"{where}: {key}={config[key]!r} is not supported; it must be {value!r}.")
  fields = dit.numbers(where, config, {**dit.FIELDS, "cond_dim": "cond_dim"})
  try:
    model = models.BlockDiT(models.BlockDiTConfig(**fields, **overrides))
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None
  ours, size = config.get("dlm_jax"), model.config.vocab_size
  stored = ours.get("process") if isinstance(ours, dict) else None
  if stored is None:
    schedule = schedules.LogLinear(eps=0.0)  # the published one reaches 1
    return model, process.Absorbing(vocab_size=size, mask_id=size - 1, schedule=schedule)
  if (kind := processes.name_of(where, stored)) != "absorbing":
    raise InputError(f"{where} contradicts itself: a {_TYPE} is absorbing, but {kind} is stored.")
  return model, processes.read(where, stored, size)


def describe(model: models.BlockDiT, proc: Process) -> dict[str, Any]:
  """Return the config.json of a network and its process; whoever saves it adds the block_size.

  Raises:
    InputError: the process or its schedule has no name, or it is no absorbing one.
  """
  options, stored = dataclasses.asdict(model.config), processes.describe(proc)
  if stored is None or stored["name"] != "absorbing":
    raise InputError(f"a {_TYPE} cannot be saved with the process {type(proc).__name__}.")
  config = {public: options[ours] for public, ours in dit.FIELDS.items()}
  config |= {"cond_dim": options["cond_dim"], "mlp_ratio": options["mlp_ratio"], "var_min": True}
  return {"model_type": _TYPE, **config, **_REQUIRED, "dlm_jax": {"process": stored}}


def match(
  model: models.BlockDiT, tensors: Mapping[str, Any], source: pathlib.Path | str
) -> dict[str, Any]:
  """Return the tensors by public name; two numbers of its training go.

  Raises:
    InputError: a tensor is missing, unknown, of the wrong shape, or of another rotary base.
  """
  scalars = {name for name in _SCALARS if name in tensors and not any(tensors[name].shape)}
  return _READING["match"](model, {x: tensors[x] for x in tensors if x not in scalars}, source)


_READING = mdlm_layout.reading(mdlm_layout.denoiser_entries)
FAMILY = Family(
  model_types=(_TYPE,),
  network=models.BlockDiT,
  read=read,
  describe=describe,
  **{**_READING, "match": match},
  writes=("blocks",),
  processes=("absorbing",),
)
