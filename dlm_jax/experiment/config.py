# SPDX-License-Identifier: Apache-2.0
"""A configuration by name or from a file, with overrides from the command line."""

import ast
import importlib
import importlib.util
import pathlib
import pkgutil
from typing import Any

from ml_collections import ConfigDict

from dlm_jax.errors import InputError, hint


def load_config(name: str, overrides: dict[str, str] | None = None) -> ConfigDict:
  """Build the config of a packaged experiment or of a file, apply overrides, lock it.

  Args:
    name: "novels_idlm", or a path to a Python file with `get_config()`.
    overrides: dotted field to text, e.g. {"optim.lr": "3e-5"}.

  Raises:
    InputError: no such config or field, or a value of the wrong type.
  """
  if name.endswith(".py"):
    spec = importlib.util.spec_from_file_location("user_config", name)
    if not pathlib.Path(name).is_file() or spec is None:
      raise InputError(f"--config={name}: no such file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise InputError(f"--config={name}: the file defines no get_config().")
  else:
    known = list_configs()
    if name not in known:
      raise InputError(f"--config={name} is unknown{hint(name, known)}; found: {', '.join(known)}.")
    module = importlib.import_module(f"dlm_jax.configs.{name}")
  config = module.get_config().lock()
  for field, text in (overrides or {}).items():
    _override(config, field, text)
  return config


def list_configs() -> list[str]:
  """Return the names of the packaged experiments."""
  configs = importlib.import_module("dlm_jax.configs")
  return sorted(m.name for m in pkgutil.iter_modules(configs.__path__) if m.name != "common")


def _override(config, field, text):
  *groups, leaf = field.split(".")
  node = config
  for key in groups:
    if not isinstance(node, ConfigDict) or key not in node:
      raise InputError(f"--config.{field}: there is no group {key!r}{hint(key, _fields(node))}.")
    node = node[key]
  free = field.startswith("data.options.")  # its fields belong to the source
  if not isinstance(node, ConfigDict) or (leaf not in node and not free):
    raise InputError(f"--config.{field}: there is no field {leaf!r}{hint(leaf, _fields(node))}.")
  if free and (leaf not in node or text.lower() == "none"):  # none: as if it had not been given
    with node.unlocked():
      node[leaf] = parse_literal(text)
    return
  old = node[leaf]
  if isinstance(old, ConfigDict):
    raise InputError(f"--config.{field} is a group with the fields {', '.join(old)}.")
  value = parse_literal(text) if not isinstance(old, str) else text
  if isinstance(old, float) and type(value) is int:
    value = float(value)
  if isinstance(old, tuple) and type(value) in (int, float):
    value = (value,)
  if isinstance(old, tuple) and isinstance(value, list):
    value = tuple(value)
  if type(value) is not type(old):
    raise InputError(
      f"--config.{field}={text}: expected {type(old).__name__} like {old!r}, got "
      f"{type(value).__name__}."
    )
  node[leaf] = value


def parse_literal(text: str) -> Any:
  """Parse a value from the command line: a Python literal, true, false or none; else text."""
  special = {"true": True, "false": False, "none": None, "": ""}
  if text.lower() in special:
    return special[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _fields(node) -> list[str]:
  """Return what a group of fields holds; a field itself holds nothing."""
  return list(node) if isinstance(node, ConfigDict) else []
