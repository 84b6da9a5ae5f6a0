# SPDX-License-Identifier: Apache-2.0
"""What a config.json says: the family of a checkpoint, its network and its forward process.

The last row of a public vocabulary is the mask in one family and padding in another, and the
tensors do not tell which. The family decides, and a config that contradicts itself is refused.
"""

import dataclasses
import pathlib
from typing import Any

from dlm_jax import models, process, schedules
from dlm_jax.convert import decoder_config
from dlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What every checkpoint of one model_type has in common.

  Attributes:
    processes: names of the forward processes it may have; the first is meant where none is stored.
      Empty: autoregressive.
    time_conditioning: None: the config says, and False is meant where it does not.
    dropout_optional: the config may leave out the dropout rate.
  """

  processes: tuple[str, ...] = ()
  time_conditioning: bool | None = None
  dropout_optional: bool = False


FAMILIES = {
  # MDLM, and its students by SDTT and IDLM; the last id is the mask unless the process says else
  "mdlm": Family(processes=("absorbing", "absorbing_score")),
  # Duo, and its students by DCD and IDLM; no id is special to the process
  "DUO": Family(processes=("uniform",), time_conditioning=True),
  # students of DiDi-Instruct
  "didi-instruct-dit": Family(
    processes=("absorbing",), time_conditioning=False, dropout_optional=True
  ),
  # ours: a uniform process without time conditioning, which readers of DUO would switch on
  "dlm_jax_uniform": Family(processes=("uniform",)),
  "dlm_jax_causal": Family(),
}
_PROCESSES = {
  "absorbing": process.Absorbing,
  "absorbing_score": process.AbsorbingScore,
  "uniform": process.Uniform,
}
_FIELDS = {  # public key -> ours
  "vocab_size": "vocab_size",
  "hidden_dim": "dim",
  "n_blocks": "layers",
  "n_heads": "heads",
  "model_length": "length",
  "dropout": "dropout",
}


def name_family(config: dict[str, Any], source: pathlib.Path | str) -> str:
  """Return the key of FAMILIES that a config names, "gpt2" or a decoder's; case is ignored.

  Raises:
    InputError: the model_type is unknown.
  """
  known = [*FAMILIES, "gpt2", *decoder_config.MODEL_TYPES]
  names = {name.lower(): name for name in known}
  kind = config["model_type"]
  if not isinstance(kind, str) or kind.lower() not in names:
    raise InputError(f"{source}: model_type {kind!r} is unknown; known: {', '.join(known)}.")
  return names[kind.lower()]


def make_model(
  source: pathlib.Path | str, config: dict[str, Any], overrides: dict[str, Any]
) -> models.DiT | models.Causal:
  """Build the network that a config describes.

  Args:
    source: the directory, for messages.
    config: the parsed config.json.
    overrides: fields of the model's config that change no shape.

  Raises:
    InputError: a size is missing or impossible, or a switch contradicts the family.
  """
  name = name_family(config, source)
  family, where = FAMILIES[name], f"{source}/config.json"
  keys = dict(_FIELDS) if not family.processes else {**_FIELDS, "cond_dim": "cond_dim"}
  if family.dropout_optional and "dropout" not in config:
    keys.pop("dropout")
  for key in keys:
    if key not in config:
      raise InputError(f"{where} lacks {key!r}.")
    if isinstance(config[key], bool) or not isinstance(config[key], int | float):
      raise InputError(f"{where}: {key}={config[key]!r} is not a number.")
  fields = {ours: config[public] for public, ours in keys.items()}
  fields["mlp_ratio"] = config.get("mlp_ratio", 4)
  if family.processes:
    fields["time_conditioning"] = _time_conditioning(where, name, config)
    if config.get("causal", False):
      raise InputError(f"{where}: causal={config['causal']!r}; only causal false loads as {name}.")
  try:
    if not family.processes:
      return models.Causal(models.CausalConfig(**fields, **overrides))
    return models.DiT(models.DiTConfig(**fields, **overrides))
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None


def _time_conditioning(where, name, config):
  fixed = FAMILIES[name].time_conditioning
  given = config.get("time_conditioning", bool(fixed))
  if not isinstance(given, bool):
    raise InputError(f"{where}: time_conditioning={given!r} is neither true nor false.")
  if fixed is not None and given != fixed:
    raise InputError(
      f"{where} contradicts itself: model_type {name} has time_conditioning "
      f"{str(fixed).lower()}, given {str(given).lower()}."
    )
  return given


def make_process(source: pathlib.Path | str, config: dict[str, Any], model):
  """Build the forward process; None for a causal network.

  Public files store none: the log-linear schedule is meant, and for absorbing processes the last
  id is the mask.

  Raises:
    InputError: the stored process is incomplete, or not one of the family's.
  """
  name, where = name_family(config, source), f"{source}/config.json"
  known = FAMILIES[name].processes
  if not known:
    return None
  size = model.config.vocab_size
  ours = config.get("dlm_jax", {})
  stored = ours.get("process") if isinstance(ours, dict) else ours
  if stored is None:
    mask = {} if known[0] == "uniform" else {"mask_id": size - 1}
    return _PROCESSES[known[0]](vocab_size=size, **mask)
  kind = stored.get("name") if isinstance(stored, dict) else None
  if kind not in _PROCESSES:
    raise InputError(f"{where}: process {stored!r} is unknown; known: {', '.join(_PROCESSES)}.")
  if kind not in known:
    raise InputError(
      f"{where} contradicts itself: model_type {name} has the process {' or '.join(known)}, "
      f"but {kind} is stored."
    )
  fields = {field.name for field in dataclasses.fields(_PROCESSES[kind])} - {"vocab_size"}
  given = {key: value for key, value in stored.items() if key != "name"}
  optional = {"blocked"}  # written where there are any
  lacking = fields - optional - set(given)
  for problem, names in (("lacks", lacking), ("has unknown", set(given) - fields)):
    if names:
      raise InputError(f"{where}: the process {kind} {problem} {', '.join(sorted(names))}.")
  try:
    given["schedule"] = schedules.make(**given["schedule"])
    if "blocked" in given:
      given["blocked"] = tuple(int(i) for i in given["blocked"])
    return _PROCESSES[kind](vocab_size=size, **given)
  except (TypeError, ValueError) as error:
    raise InputError(f"{where}: process: {error}") from None


def describe(model: models.DiT | models.Causal, proc) -> dict[str, Any]:
  """Return the config.json of a network and its process, in the keys of the public family.

  Raises:
    InputError: the process or its schedule has no name.
  """
  options = dataclasses.asdict(model.config)
  stored = _describe_process(proc)
  if proc is None:
    kind = "dlm_jax_causal"
  elif stored["name"] != "uniform":
    kind = "mdlm"
  else:
    kind = "DUO" if options["time_conditioning"] else "dlm_jax_uniform"
  config = {"model_type": kind, **{public: options[ours] for public, ours in _FIELDS.items()}}
  if proc is not None:
    config |= {key: options[key] for key in ("cond_dim", "time_conditioning")}
  if kind == "DUO":
    config |= {"causal": False, "var_min": True}
  return config | {"mlp_ratio": options["mlp_ratio"], "dlm_jax": {"process": stored}}


def _describe_process(proc):
  if proc is None:
    return None
  name = {cls: name for name, cls in _PROCESSES.items()}.get(type(proc))
  schedule = {cls: name for name, cls in schedules.NAMES.items()}.get(type(proc.schedule))
  if name is None:
    raise InputError(f"a {type(proc).__name__} process cannot be saved.")
  if schedule is None:
    raise InputError("a user-supplied schedule cannot be saved; use a named one.")
  mask = {} if name == "uniform" else {"mask_id": proc.mask_id}
  if getattr(proc, "blocked", ()):
    mask["blocked"] = list(proc.blocked)
  options = dataclasses.asdict(proc.schedule)
  return {"name": name, **mask, "schedule": {"name": schedule, **options}}
