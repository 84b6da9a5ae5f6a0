# SPDX-License-Identifier: Apache-2.0
"""Architectures of checkpoints, one file each; the folder is the registry.

A file exports `FAMILY`, or `BESIDE` if its networks lie beside others. Nothing else lists them.
"""

import functools
import importlib
import pkgutil
from typing import Any

from dlm_jax.convert.family import Beside, Family
from dlm_jax.errors import InputError, hint


@functools.cache
def found() -> dict[str, Family]:
  """Return every family by the name of its file."""
  return _exported("FAMILY")


@functools.cache
def beside() -> dict[str, Beside]:
  """Return what may lie beside a network, by the name of its file."""
  return _exported("BESIDE")


def _exported(name):
  files = sorted(module.name for module in pkgutil.iter_modules(__path__))
  modules = {file: importlib.import_module(f"{__name__}.{file}") for file in files}
  return {file: getattr(m, name) for file, m in modules.items() if hasattr(m, name)}


def model_types() -> list[str]:
  """Return what a config.json may name, public names first."""
  names = [name for family in found().values() for name in family.model_types]
  return sorted(names, key=lambda name: name.startswith("dlm_jax"))  # stable


def find(config: dict[str, Any], source: Any) -> Family:
  """Return the family that a config.json names; case is ignored.

  Args:
    config: the parsed config.json.
    source: where it lies, for the message.

  Raises:
    InputError: the model_type is unknown; the line lists those known.
  """
  kind, known = config["model_type"], model_types()
  for family in found().values():
    if isinstance(kind, str) and kind.lower() in map(str.lower, family.model_types):
      return family
  raise InputError(
    f"{source}: model_type {kind!r} is unknown; known: {', '.join(known)}{hint(str(kind), known)}."
  )


def named(name: str) -> Family:
  """Return the family that `model.name` of a config means.

  Raises:
    InputError: there is none; the line lists those known.
  """
  known = {family.name: family for family in found().values() if family.name}
  if name not in known:
    raise InputError(
      f"model.name={name!r} is unknown{hint(name, known)}; found: {', '.join(sorted(known))}."
    )
  return known[name]


def of(model: Any) -> Family:
  """Return the family of a network.

  Raises:
    InputError: no file of the folder knows its class.
  """
  classes = {family.network: family for family in found().values() if family.network is not None}
  if type(model) in classes:
    return classes[type(model)]
  known = ", ".join(kind.__name__ for kind in classes)
  raise InputError(f"a {type(model).__name__} has no checkpoints; known: {known}.")
