# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax models`: what there is to name — networks, experiments, samplers, methods."""

import ast
import importlib.util
import inspect
import sys

from dlm_jax import assets, convert
from dlm_jax.cli import flags
from dlm_jax.experiment import config, plan
from dlm_jax.sample import SAMPLERS

PARTS = ("networks", "experiments", "samplers", "methods")


def main(argv: list[str]) -> None:
  """Parse flags and list."""
  parser = flags.Parser(
    "models",
    "List what other verbs take by name: shipped networks, experiments, samplers, methods.",
    """
dlm-jax models
dlm-jax models networks
dlm-jax models experiments --match=idlm
""",
  )
  parser.add_argument("what", nargs="?", choices=PARTS, metavar="WHAT", help=", ".join(PARTS))
  parser.add_argument("--match", default="", metavar="TEXT", help="only lines with this in them")
  given = parser.parse(argv)
  found = {
    "networks": (_networks, "sample --model=NAME; elsewhere shipped:NAME"),
    "experiments": (_experiments, "train --config=NAME --workdir=DIR"),
    "samplers": (_samplers, "sample --sampler=NAME"),
    "methods": (_methods, "--config.objective.name=NAME"),
  }
  for part in [given.what] if given.what else PARTS:
    lines, usage = found[part]
    rows = [row for row in lines() if given.match in " ".join(row)]
    width = max((len(name) for name, _ in rows), default=0)
    print(f"{part} ({usage})")
    print("\n".join(f"  {name:<{width}}  {about}" for name, about in rows) or "  none")


def _networks():
  """Return (name, what it is) of what comes with the package."""
  networks = {name: convert.open_network(assets.path(name)) for name in assets.names()}
  ways = {
    "next": "judges, writes the next token",
    "grid": "writes in any order",
    "blocks": "blocks",
  }
  return [
    (name, f"{network.kind}, {ways[network.writes]}, {network.model.config.length} tokens")
    for name, network in networks.items()
  ]


def _experiments():
  """Return (name, first sentence of its file) of the packaged experiments."""
  about = {name: _sentence(_source(name)) for name in {n.split(":")[0] for n in _names()}}
  return [(name, about[name.split(":")[0]]) for name in _names()]


def _names():
  return config.list_configs()


def _source(name):
  found = importlib.util.find_spec(f"dlm_jax.configs.{name}")
  with open(found.origin, encoding="utf-8") as file:
    return ast.get_docstring(ast.parse(file.read())) or ""


def _samplers():
  """Return (name, its processes and first sentence)."""
  rows = {}
  for process, samplers in SAMPLERS.items():
    for name, sampler in samplers.items():
      rows.setdefault(name, []).append((process.__name__.lower(), inspect.getdoc(sampler) or ""))
  return [
    (name, f"{', '.join(process for process, _ in found)}: {_sentence(found[0][1])}")
    for name, found in rows.items()
  ]


def _methods():
  """Return (name, first sentence of its module)."""
  modules = (
    (n, importlib.import_module(f"dlm_jax.objectives.{n}")) for n in plan.list_objectives()
  )
  return [(name, _sentence(sys.modules[module.__name__].__doc__ or "")) for name, module in modules]


def _sentence(text):
  """Return the first sentence of a docstring, on one line."""
  return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
