# SPDX-License-Identifier: Apache-2.0
"""`DiT`: the public denoisers MDLM and Duo, their students by SDTT, IDLM, DCD and DiDi-Instruct.

The last row of a public vocabulary is the mask in one model_type and padding in another, and the
tensors do not tell which. The model_type decides, and a config that contradicts itself is refused.
"""

import dataclasses
import pathlib
from typing import Any

from dlm_jax import models, process
from dlm_jax.convert import mdlm_layout, processes
from dlm_jax.convert.family import Family
from dlm_jax.errors import InputError
from dlm_jax.fields import Number, Switch, shown
from dlm_jax.fields import read as read_fields
from dlm_jax.models.dit import SIZES
from dlm_jax.process import Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
  """What every checkpoint of one model_type has in common.

  Attributes:
    processes: names of the forward processes it may have; the first is meant where none is stored.
    time_conditioning: None: the config says, and False is meant where it does not.
    dropout_optional: the config may leave out the dropout rate.
  """

  processes: tuple[str, ...]
  time_conditioning: bool | None = None
  dropout_optional: bool = False


_KINDS = {
  # MDLM, and its students by SDTT and IDLM; the last id is the mask unless the process says else
  "mdlm": _Kind(processes=("absorbing", "absorbing_score")),
  # Duo, and its students by DCD and IDLM; no id is special to the process
  "DUO": _Kind(processes=("uniform",), time_conditioning=True),
  # students of DiDi-Instruct
  "didi-instruct-dit": _Kind(
    processes=("absorbing",), time_conditioning=False, dropout_optional=True
  ),
  # ours: a uniform process without time conditioning, which readers of DUO would switch on
  "dlm_jax_uniform": _Kind(processes=("uniform",)),
}
FIELDS = {  # public key -> ours, without cond_dim
  "vocab_size": "vocab_size",
  "hidden_dim": "dim",
  "n_blocks": "layers",
  "n_heads": "heads",
  "model_length": "length",
  "dropout": "dropout",
}


def read(
  source: pathlib.Path, config: dict[str, Any], overrides: dict[str, Any]
) -> tuple[models.DiT, Process]:
  """Build the network and the process that a config describes.

  Public files store no process: the log-linear schedule is meant, and for absorbing ones the last
  id is the mask.

  Args:
    source: the directory, or the file of the weights beside the config.
    config: the parsed config.json.
    overrides: fields of `DiTConfig` that change no shape.

  Raises:
    InputError: a size is missing or impossible, a switch contradicts the model_type, or the stored
      process is incomplete or not one of its own.
  """
  where = f"{source.parent if source.is_file() else source}/config.json"
  model = read_model(where, config, overrides)
  name = config["model_type"]
  known, size = _kind(config).processes, model.config.vocab_size
  stored = config.get("dlm_jax", {}).get("process")
  if stored is None:
    mask = {} if known[0] == "uniform" else {"mask_id": size - 1}
    return model, process.NAMES[known[0]](vocab_size=size, **mask)
  kind = processes.name_of(where, stored)
  if kind not in known:
    raise InputError(
      f"{where} contradicts itself: model_type {name} has the process {' or '.join(known)}, "
      f"but {kind} is stored."
    )
  return model, processes.read(where, stored, size)


def read_model(where: str, config: dict[str, Any], overrides: dict[str, Any]) -> models.DiT:
  """Build the network alone; arguments as for `read`, but `where` is what messages name."""
  kind = _kind(config)
  keys = {**FIELDS, "cond_dim": "cond_dim"}
  if kind.dropout_optional and "dropout" not in config:
    keys.pop("dropout")
  fields = numbers(where, config, keys)
  fields |= read_fields(where, config, {"mask_noise": SIZES["mask_noise"]}, {"mask_noise": 0})
  fields["time_conditioning"] = _time_conditioning(where, config, kind)
  if config.get("causal", False):
    given = shown(config["causal"])
    raise InputError(f"{where}: causal={given}; only causal false loads as {config['model_type']}.")
  try:
    return models.DiT(models.DiTConfig(**fields, **overrides))
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None


def numbers(where: str, config: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
  """Return our fields from a config's; `keys` are public key -> ours.

  Raises:
    InputError: one is missing, no number, or out of range.
  """
  keys = {**keys, "mlp_ratio": "mlp_ratio"}
  kinds = {public: SIZES.get(ours, Number("[0, 1)")) for public, ours in keys.items()}
  found = read_fields(where, config, kinds, {"mlp_ratio": 4})
  return {ours: found[public] for public, ours in keys.items()}


def _kind(config):
  """Return the row of a model_type; case is ignored."""
  return {name.lower(): kind for name, kind in _KINDS.items()}[config["model_type"].lower()]


def _time_conditioning(where, config, kind):
  fixed = kind.time_conditioning
  name, absent = "time_conditioning", bool(fixed)
  given = read_fields(where, config, {name: Switch()}, {name: absent})[name]
  if fixed is not None and given != fixed:
    raise InputError(
      f"{where} contradicts itself: model_type {config['model_type']} has time_conditioning "
      f"{str(fixed).lower()}, given {str(given).lower()}."
    )
  return given


def describe(model: models.DiT, proc: Process) -> dict[str, Any]:
  """Return the config.json of a network and its process, in the keys of the public release.

  A network of a uniform process is written as model_type DUO, one of an absorbing process as mdlm.

  Raises:
    InputError: the process or its schedule has no name.
  """
  options, stored = dataclasses.asdict(model.config), processes.describe(proc)
  kind = "mdlm"
  if stored["name"] == "uniform":
    kind = "DUO" if options["time_conditioning"] else "dlm_jax_uniform"
  config = {"model_type": kind, **{public: options[ours] for public, ours in FIELDS.items()}}
  config |= {key: options[key] for key in ("cond_dim", "time_conditioning")}
  if kind == "DUO":
    config |= {"causal": False, "var_min": True}
  if options["mask_noise"]:
    config |= {"mask_noise": options["mask_noise"]}
  return config | {"mlp_ratio": options["mlp_ratio"], "dlm_jax": {"process": stored}}


FAMILY = Family(
  model_types=tuple(_KINDS),
  network=models.DiT,
  read=read,
  describe=describe,
  **mdlm_layout.reading(mdlm_layout.denoiser_entries),
  writes=("grid",),
  processes=("absorbing", "absorbing_score", "uniform"),
  pad_row=True,
  name="dit",
  options=models.DiTConfig,
)
