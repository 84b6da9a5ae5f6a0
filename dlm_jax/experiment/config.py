# SPDX-License-Identifier: Apache-2.0
"""A configuration by name or from a file, with overrides from the command line."""

import ast
import importlib
import importlib.util
import inspect
import os
import pkgutil
import traceback
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FieldReference

from dlm_jax import remote
from dlm_jax.errors import InputError, hint

_PACKAGE = "dlm_jax.configs"
_BASE = "base"  # a file of the folder that is no experiment; nor is a folder


def load_config(name: str, overrides: dict[str, str] | None = None) -> ConfigDict:
  """Build the config of a packaged experiment or of a file, apply overrides, lock it.

  Args:
    name: "novels_idlm", with a variant "sdar:8b", or a path to a Python file with `get_config()`,
      "my.py" or "my.py:variant".
    overrides: dotted field to text, e.g. {"optim.lr": "3e-5"}.

  Raises:
    InputError: no such config, variant or field, a value of the wrong type, or an error in the
      file, which is told with its line.
  """
  module, variant = _open(name)
  config = _call(name, module, variant)
  _check_fields(name, config)
  config.lock()
  for field, text in (overrides or {}).items():
    _override(config, field, text)
  return config


def list_configs() -> list[str]:
  """Return the names of the packaged experiments, "sdar:8b" where there are variants."""
  found = []
  for name in _files():
    module = importlib.import_module(f"{_PACKAGE}.{name}")
    found += [name] if _takes(module) != "required" else []
    found += [f"{name}:{variant}" for variant in getattr(module, "VARIANTS", ())]
  return sorted(found)


# --- files and variants ---------------------------------------------------------------------------


def _files() -> list[str]:
  modules = pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__)
  return sorted(m.name for m in modules if m.name != _BASE and not m.ispkg)


def _open(name: str) -> tuple[ModuleType, str | None]:
  """Return the module that --config names and the variant asked for."""
  path, suffix, variant = name.rpartition(".py")
  if suffix and variant[:1] in ("", ":"):
    return _run(path + suffix), variant[1:] or None
  stem, _, variant = name.partition(":")
  if stem not in _files():
    known = list_configs()
    raise InputError(f"--config={name} is unknown{hint(name, known)}; found: {', '.join(known)}.")
  return importlib.import_module(f"{_PACKAGE}.{stem}"), variant or None


def _run(path: str) -> ModuleType:
  """Run a user's file."""
  file = remote.fetch(path)
  spec = importlib.util.spec_from_file_location("user_config", os.path.abspath(file))
  if not file.is_file() or spec is None:
    raise InputError(f"--config={path}: no such file.")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise _located(path, error) from error
  if not callable(getattr(module, "get_config", None)):
    raise InputError(f"--config={path}: the file defines no get_config().")
  return module


def _takes(module: ModuleType) -> str:
  """Return whether get_config takes a variant: "required", "optional" or "none"."""
  parameters = list(inspect.signature(module.get_config).parameters.values())
  if not parameters:
    return "none"
  return "required" if parameters[0].default is inspect.Parameter.empty else "optional"


def _call(name: str, module: ModuleType, variant: str | None) -> ConfigDict:
  """Return the config of a module."""
  takes, variants = _takes(module), list(getattr(module, "VARIANTS", ()))
  stem = name.removesuffix(f":{variant}").removesuffix(":")
  listed = ", ".join(full := [f"{stem}:{one}" for one in variants]) or f"{stem}:VARIANT"
  if variant is None and takes == "required":
    raise InputError(f"--config={name} needs a variant; choose one of {listed}.")
  if variant is not None and takes == "none":
    raise InputError(f"--config={name}: {stem} has no variants; use --config={stem}.")
  if variant is not None and variants and variant not in variants:
    near = hint(variant, variants) or hint(name, full)  # of sdar:9b all are near, of 9b none is
    raise InputError(f"--config={name} is no variant of {stem}{near}; choose one of {listed}.")
  try:
    config = module.get_config() if variant is None else module.get_config(variant)
  except (Exception, SystemExit) as error:
    raise _located(stem if stem.endswith(".py") else module.__file__, error) from error
  if not isinstance(config, ConfigDict):
    got = type(config).__name__
    raise InputError(f"--config={name}: get_config() returned {got}; return what base() gave.")
  return config


def _located(path: str, error: BaseException) -> InputError:
  """Return an error of a config file as one line that names file and line."""
  file = os.path.abspath(path)  # as the interpreter calls it
  frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
  line = frames[-1].lineno if frames else 1
  message = str(error)
  if isinstance(error, SyntaxError):
    line, message = error.lineno or line, error.msg
    path = path if error.filename in (None, file) else error.filename
  kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
  return InputError(f"{path}:{line}: {kind}{' '.join(message.split())}")


def _check_fields(name: str, config: ConfigDict) -> None:
  """Complain about what `base` does not know, and about what it has and the config has not."""
  base = importlib.import_module(f"{_PACKAGE}.{_BASE}").base()
  _same(name, "group", _fields(config), _fields(base), "")
  for group in base:
    if isinstance(base[group], ConfigDict):
      known, given = _fields(base[group]), _fields(config[group])
      if group == "objective":
        given = [field for field in given if field in known]  # a method has fields of its own
      if group == "optim":
        given = [field for field in given if not isinstance(config[group][field], ConfigDict)]
      _same(name, "field", given, known, f"{group}.")


def _same(name, kind, given, known, prefix):
  for field in given:
    if field not in known:
      raise InputError(
        f"--config={name}: there is no {kind} {prefix + field!r}{hint(field, known)}; see "
        "configs/base.py."
      )
  for field in known:
    if field not in given:
      raise InputError(
        f"--config={name}: the {kind} {prefix + field!r} is missing; start from base()."
      )


# --- fields from the command line -----------------------------------------------------------------


def _override(config: ConfigDict, field: str, text: str) -> None:
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
  kind, optional = _kind(node, leaf)
  value = _parse(text, kind, optional)
  if kind is not None and type(value) is not kind and not (optional and value is None):
    like = f" like {old!r}" if old is not None else ""
    raise InputError(
      f"--config.{field}={text}: expected {kind.__name__}{like}{' or none' if optional else ''}, "
      f"got {type(value).__name__}."
    )
  node[leaf] = value


def _kind(node: ConfigDict, leaf: str) -> tuple[type | None, bool]:
  """Return the type of a field, None if any, and whether it may be unset; see `base.optional`."""
  stored = dict(node.items(preserve_field_references=True))[leaf]
  if isinstance(stored, FieldReference):
    return stored.get_type(), True
  return (None, True) if stored is None else (type(stored), False)


def _parse(text: str, kind: type | None, optional: bool) -> Any:
  """Return a text as a value of that kind if it can be one, else as what it looks like."""
  value = parse_literal(text)
  if value is None and optional:
    return None
  if kind is str:
    return text
  if kind is float and type(value) is int:
    return float(value)
  if kind is tuple and (value is None or text == ""):
    return ()
  if kind is tuple and type(value) in (int, float):
    return (value,)
  if kind is tuple and isinstance(value, list):
    return tuple(value)
  return value


def parse_literal(text: str) -> Any:
  """Parse a value from the command line: a Python literal, true, false or none; else text."""
  special = {"true": True, "false": False, "none": None, "": ""}
  if text.lower() in special:
    return special[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
    return text  # {[]: 1} is a TypeError, a thousand brackets are the latter two


def _fields(node) -> list[str]:
  """Return what a group of fields holds; a field itself holds nothing."""
  return list(node) if isinstance(node, ConfigDict) else []
