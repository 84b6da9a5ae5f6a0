# SPDX-License-Identifier: Apache-2.0
"""Flags that several verbs share."""

import argparse
import functools
import re
from typing import Any

from dlm_jax import fields
from dlm_jax.errors import InputError
from dlm_jax.experiment import config as experiments

_OUTER_COMMA = re.compile(r",(?![^()]*\))")


class Parser(argparse.ArgumentParser):
  """An argument parser that complains in one line, and takes --config.group.field=value."""

  free_overrides = False  # takes config fields without a --config

  def __init__(self, verb: str, description: str, examples: str, usage: str | None = None):
    super().__init__(
      prog=f"dlm-jax {verb}",
      usage=usage,
      description=description,
      epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines()),
      formatter_class=functools.partial(
        argparse.RawDescriptionHelpFormatter, max_help_position=28, width=100
      ),
      allow_abbrev=False,
      add_help=False,  # who reads it knows the flag
    )
    self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

  def error(self, message: str):
    """Raise InputError: `main` prints its line and returns 2."""
    raise InputError(f"{message}; see `{self.prog} --help`.")

  def parse(self, argv: list[str]) -> argparse.Namespace:
    """Parse; overrides of config fields end up in `.overrides`."""
    overrides, rest = {}, []
    for argument in argv:
      if argument.startswith("--config."):
        field, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
          self.error(f"write --config.{field}=VALUE")
        overrides[field] = text
      else:
        rest.append(argument)
    namespace = self.parse_args(rest)
    if overrides and "config" not in vars(namespace) and not self.free_overrides:
      self.error(f"--config.{next(iter(overrides))}: this verb takes no config fields")
    namespace.overrides = overrides
    return namespace


def add_config(parser: Parser, default: str | None = None) -> None:
  """Add --config and --print_config."""
  parser.add_argument(
    "--config",
    default=default,
    required=default is None,
    metavar="NAME_OR_FILE",
    help="packaged experiment or a Python file; fields: --config.optim.lr=3e-5",
  )
  parser.add_argument("--print_config", action="store_true", help="show all fields and stop")


def add_option(parser: Parser, examples: str) -> None:
  """Add --option, any option of the sampler."""
  parser.add_argument(
    "--option",
    action="append",
    type=option,
    default=[],
    metavar="NAME=VALUE",
    help=f"of the sampler, repeat for several: {examples}",
  )


def load_config(namespace: argparse.Namespace):
  """Return the locked config; None after printing it for --print_config."""
  config = experiments.load_config(namespace.config, namespace.overrides)
  if namespace.print_config:
    print(config)
    return None
  return config


def seed(text: str) -> int:
  """Parse a seed."""
  try:
    return fields.SEED.check("a seed", int(text))
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def number(text: str) -> float:
  """Parse a finite number: "nan" and "inf" are none."""
  try:
    return fields.Number().check("", float(text))
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number") from None


def integers(text: str) -> list[int]:
  """Parse "1,2,4"."""
  return _list(text, int, "1,2,4")


def numbers(text: str) -> list[float]:
  """Parse "0.8,1"."""
  return _list(text, number, "0.8,1,1.2")


def _list(text, kind, example):
  try:
    return [kind(part) for part in text.split(",") if part.strip()]
  except (ValueError, argparse.ArgumentTypeError):
    raise argparse.ArgumentTypeError(f"{text!r} is not a list like {example}") from None


def option(text: str) -> tuple[str, Any]:
  """Parse "name=value"."""
  name, equals, content = text.partition("=")
  if not name or not equals:
    raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
  return name, experiments.parse_literal(content)


def named_path(text: str) -> tuple[str, str, dict[str, Any]]:
  """Parse "NAME=PATH" or "NAME=PATH,option=value,…" into name, path and options.

  Commas inside parentheses belong to a value: h=(30,40).
  """
  (name, _, path), *options = (part.partition("=") for part in _OUTER_COMMA.split(text))
  if not (name and path) or not all(key and sign for key, sign, _ in options):
    raise argparse.ArgumentTypeError(f"{text!r}: write NAME=PATH or NAME=PATH,option=value,…")
  return name, path, {key: experiments.parse_literal(content) for key, _, content in options}
