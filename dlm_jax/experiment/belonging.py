# SPDX-License-Identifier: Apache-2.0
"""Which fields of a configuration do something with the network and the process that it names."""

import dataclasses

from ml_collections import ConfigDict

from dlm_jax.configs.base import base
from dlm_jax.convert import families
from dlm_jax.errors import InputError
from dlm_jax.process import MASKED, NAMES


def of_network(options: type) -> tuple[str, ...]:
  """Return the fields of `config.model` that a network reads, by the alphabet.

  Args:
    options: of the network, e.g. `models.DiTConfig`.
  """
  own = {field.name for field in dataclasses.fields(options)}
  if "mlp_dim" in own:
    own.add("mlp_ratio")  # where mlp_dim is 0
  return tuple(field for field in base().model if field in own)


def of_process(config: ConfigDict) -> tuple[str, ...]:
  """Return the fields of `config.process` that the chosen network and process read."""
  c = config.process
  if not families.named(config.model.name).processes:
    return ("name",) if c.name == "none" else ()
  if c.name == "none":  # before a training with a mask, which reads them all
    return tuple(base().process)
  mask_id = ("mask_id",) if c.name in MASKED or c.name not in NAMES else ()
  power = ("power",) if c.schedule == "polynomial" else ()
  return ("name", *mask_id, "schedule", *power, "eps")


def check_model(config: ConfigDict, options: type) -> None:
  """Raise InputError if a field of `config.model` is set that the network does not read."""
  _check(config, "model", ("name", *of_network(options)), f"model.name={config.model.name!r}")


def check_process(config: ConfigDict) -> None:
  """Raise InputError if a field of `config.process` is set that the process does not read."""
  owner = f"process.name={config.process.name!r}, process.schedule={config.process.schedule!r}"
  if not families.named(config.model.name).processes:
    owner = f"model.name={config.model.name!r}"
  _check(config, "process", of_process(config), owner)


def _check(config, group, belong, owner):
  """Complain about a field that would do nothing; with the value of `base` it is not set."""
  for field, default in base()[group].items():
    value = config[group][field]
    if field not in belong and value != default:
      others = f"; fields that belong to it: {', '.join(belong)}" if belong else ""
      raise InputError(
        f"{group}.{field}={value!r} does nothing with {owner}; leave it at {default!r}{others}."
      )
