# SPDX-License-Identifier: Apache-2.0
"""Commands of every verb with flags and config fields that hold strange values."""

import dataclasses
import importlib
import pathlib
from typing import Any

import tiny_runs
from hypothesis import strategies as st
from ml_collections import ConfigDict

from dlm_jax.cli import flags, main
from dlm_jax.experiment.config import load_config

_NUMBERS = ["0", "-1", "1", "2", "3", "7", "1.5", "-0.5", "1e-9", "1e999", "nan", "-inf", "1_0"]
_NUMBERS += [str(2**31), str(2**32), str(2**63), str(10**30), "9" * 5000, "²", "0x10", "+1", " 2"]
_BIG = [str(n) for n in (2**20, 2**24, 2**31 - 1, 2**31, 2**32, 2**63, 10**9, 10**30)]
_WORDS = ["", "x", "none", "True", "false", "()", "(1, 2)", "(1,)", "[]", "{}", "{[]: 1}", "("]
_WORDS += ["(" * 3000, "'", '"a', '"\\ud800"', "1 / 0", "a=1", "a=b,c=d", "=", "a=", ",", "1,2"]
_WORDS += [
  "1,x",
  "4,4,0",
  "a\nb",
  "\x1b[2J",
  "é😀",
  "\udcff",
  "\ufeff",
  "a\udcffb",
  "x" * 5000,
  "%s",
  "{}",
]
_WORDS += ["ancestral", "psi", "rgas", "uniform", "cosine", "greedy", "legacy", "float32", "simsd"]
_WORDS += ["bytes", "esm", "bpe:300", "bpe:", "bpe:0", "mdlm", "idlm", "os.path", ".x", "a..b"]
_WORDS += ["documents", "conversations", "absorbing", "decoder", "causal", "samples,likelihood"]
_WORDS += ["sampler=psi", "kappa=cap", "h=30,40", "temperature=nan", "temperature=(", "nucleus=0"]
_PATHS = [".", "..", "x/y/z", "/dev/null", "/dev/null/x", "/dev/zero", "@/dev/zero", "@/dev/null"]
_PATHS += ["@", "@none", "files:/dev/zero", "files:*", "files:", "fasta:/etc/hostname", "chat:x"]
_PATHS += ["shipped:judge", "shipped:", "shipped:../x", "a=shipped:judge", "stdlib:x", "\0"]
_anything = st.one_of(
  st.sampled_from(_NUMBERS), st.sampled_from(_WORDS), st.sampled_from(_PATHS), st.text(max_size=4)
)
_whole = st.one_of(st.integers(-3, 40).map(str), st.sampled_from(_BIG))
_real = st.one_of(st.floats(-2, 2).map(str), _whole)
# By the type of what is there: what a check of types alone lets pass.
_LIKE = {
  bool: st.sampled_from(["True", "False", "true"]),
  int: _whole,
  float: _real,
  list: st.lists(_whole, max_size=4).map(",".join),
  tuple: st.lists(_whole, max_size=4).map(lambda items: f"({', '.join(items)})"),
}
_LEFT_OUT = ("--help", "-h", "--distributed")  # would ask for other hosts


@dataclasses.dataclass(frozen=True)
class Command:
  """A command that works.

  Attributes:
    argv: its words.
    flags: that its verb has, with the types of their values; bool: they have none.
    fields: of its config that may be changed, with theirs.
    writes: it may leave files even if it fails: a workdir that it began.
  """

  argv: tuple[str, ...]
  flags: dict[str, Any]
  fields: dict[str, type]
  writes: bool = False

  def strange(self) -> st.SearchStrategy:
    """Return command lines with one to three values that are others."""
    ways = [st.sampled_from(sorted(self.flags)).flatmap(self._flag)]
    if self.fields:
      ways += [st.sampled_from(sorted(self.fields)).flatmap(self._field)] * 2
    more = st.lists(st.one_of(ways), min_size=1, max_size=3)
    return more.map(lambda given: [*self.argv, *given])

  def _flag(self, name):
    if self.flags[name] is bool:
      return st.just(name)
    return _like(self.flags[name]).map(lambda text: f"{name}={text}")

  def _field(self, name):
    return _like(self.fields[name]).map(lambda text: f"--config.{name}={text}")


def _like(kind) -> st.SearchStrategy:
  """Return texts of values, most of them of a type."""
  return st.one_of(_LIKE.get(kind, _anything), _LIKE.get(kind, _anything), _anything)


def commands(root: pathlib.Path, decoder: pathlib.Path) -> list[Command]:
  """Return a command of every verb, of `sample` and `train` several; `decoder` is a network."""
  tiny = tiny_runs.make()
  networks = [f"--checkpoint={path}" for path in (tiny.teacher, tiny.judge, decoder)]
  prompt = root / "prompt.txt"
  prompt.write_text("a = 1\n")
  runs = {kind: tiny.flags(kind) for kind in tiny_runs.CONFIGS}
  made = [
    ("sample", networks[0], "--steps=2"),
    ("sample", networks[1]),
    ("sample", networks[2], "--max_new_tokens=4", f"--prompt=@{prompt}"),
    ("sample", networks[2], f"--draft={decoder}", "--prompt=a", "--chat"),
    *(("train", *run, "--workdir=run") for run in runs.values()),
    ("train", *runs["idlm"], "--dry_run"),
    ("prepare", *runs["teacher"], "--config.data.options.tests=none", _DIRECTORY),
    ("evaluate", networks[0], f"--data={tiny.data}", f"--judge={tiny.judge}"),
    ("evaluate", networks[1], f"--data={tiny.data}"),
    ("frontier", f"--model=a={tiny.teacher}", f"--judge={tiny.judge}", "--workdir=run"),
    ("bench", "sample", *runs["teacher"]),
    ("bench", "decode", *networks[2:], "--num_prompts=1", f"--prompts={prompt}"),
    ("convert", networks[0], "--out=out"),
    ("models",),
    ("quickstart", "--workdir=run", "--pretrained"),
    ("quickstart", "--workdir=run", *(f"--config.{k}={v}" for k, v in tiny_runs.SHAPE.items())),
  ]
  return [_command(argv) for argv in made]


_DIRECTORY = "--config.data.directory=out"


def _command(argv) -> Command:
  named = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), None)
  if argv[0] == "quickstart" and "--pretrained" not in argv:
    named = "quickstart_idlm"
  fields = _fields(load_config(named)) if named else {}
  if argv[0] == "prepare":
    fields = {name: kind for name, kind in fields.items() if name.startswith("data.")}
  began = argv[0] in ("train", "frontier", "quickstart", "bench")
  return Command(tuple(argv), _flags(argv[0]), fields, began)


def _fields(config, prefix="") -> dict[str, type]:
  """Return the types of all fields by their dotted names."""
  found = {}
  for name in config:
    inner = config[name]
    more = isinstance(inner, ConfigDict)
    found |= _fields(inner, f"{prefix}{name}.") if more else {prefix + name: type(inner)}
  return found


def _flags(verb: str) -> dict[str, Any]:
  """Return the flags of a verb, asked of its parser before it parses anything."""

  class Found(Exception):
    pass

  def parse(parser, _):
    raise Found(parser)

  kept, flags.Parser.parse = flags.Parser.parse, parse
  try:
    importlib.import_module(f"dlm_jax.cli.{verb}").main([])
  except Found as found:
    actions = found.args[0]._actions
  finally:
    flags.Parser.parse = kept
  kinds = {name: _kind(action) for action in actions for name in action.option_strings}
  return {name: kind for name, kind in kinds.items() if name not in _LEFT_OUT}


def _kind(action) -> Any:
  """Return the type of a flag's value."""
  if action.nargs == 0:
    return bool
  lists = {flags.integers: list, flags.numbers: list, flags.seed: int, flags.number: float}
  return lists.get(action.type, action.type)


def verbs_without(made: list[Command]) -> list[str]:
  """Return the verbs that no command has."""
  return sorted(set(main.VERBS) - {command.argv[0] for command in made})
