# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax bench oracle`: what samplers lose of a law that is known."""

import contextlib
import dataclasses
import json
import sys

from dlm_jax import disk
from dlm_jax.cli import flags
from dlm_jax.errors import check_choice, check_counts
from dlm_jax.evaluate import oracle, tables

_USUAL = ("random", "spaced", "confidence", "spaced_confidence", "psi", "uniform")


def main(argv: list[str]) -> None:
  """Parse flags, measure, print a table; draw a figure if asked."""
  options = _parser().parse(argv)
  check_counts(length=options.length, sequences=options.sequences, steps=min(options.steps))
  for name in options.ways:
    check_choice("--ways", name, tuple(oracle.WAYS))
  for name in options.chains:
    check_choice("--chains", name, tuple(oracle.CHAINS))
  with contextlib.ExitStack() as files:
    as_json, figure = (
      files.enter_context(disk.fresh_file(path)) if path else None
      for path in (options.json, options.figure)
    )
    rows = list(_measured(options))
    print(f"\n{options.sequences} sequences of {options.length} tokens, seed {options.seed}")
    print("lost: dependence inside the groups, nats a sequence; pairs: KL of neighbours, nats\n")
    header = ("chain", "way", "steps", "evaluations", "lost", "±", "pairs")
    print(tables.markdown(header, [_cells(row) for row in rows], left=(0, 1)))
    if as_json:
      content = json.dumps(list(map(dataclasses.asdict, rows)), indent=2)
      as_json.write_text(content + "\n", encoding="utf-8")
    if figure:
      from dlm_jax.evaluate import _oracle_plot

      _oracle_plot.save(rows, figure, options.length)


def _measured(options):
  """Yield rows, and say on stderr what is measured."""
  for chain in options.chains:
    for steps in options.steps:
      sizes = {"length": options.length, "sequences": options.sequences, "seed": options.seed}
      for row in oracle.compare(chain, options.ways, steps, **sizes):
        print(f"{chain}, {steps} steps, {row.name}: {_loss(row)}", file=sys.stderr, flush=True)
        yield row


def _loss(row):
  return f"{row.pairs:.5f} of pairs" if row.nats is None else f"{row.nats:.4f} ± {row.error:.4f}"


def _cells(row):
  lost = ("", "") if row.nats is None else (f"{row.nats:.4f}", f"{row.error:.4f}")
  return (row.chain, row.name, str(row.steps), str(row.evaluations), *lost, f"{row.pairs:.5f}")


def _parser() -> flags.Parser:
  parser = flags.Parser(
    "bench oracle",
    "Sample exact denoisers of Markov chains: what is lost is lost by the sampler alone.",
    """
dlm-jax bench oracle
dlm-jax bench oracle --ways=random,spaced,dilated,jittered --steps=2,4,8,16 --figure=oracle.png
dlm-jax bench oracle --chains=hidden --length=64 --sequences=2048 --json=oracle.json
""",
  )
  words = lambda text: text.split(",")  # noqa: E731
  add = parser.add_argument
  known = f"of {', '.join(oracle.WAYS)}"
  add("--ways", type=words, default=list(_USUAL), metavar="W,W,…", help=known)
  add("--chains", type=words, default=list(oracle.CHAINS), metavar="C,C", help="markov, hidden")
  add("--steps", type=flags.integers, default=[1, 2, 4, 8, 16, 32], metavar="K,K,…")
  add("--length", type=int, default=32, metavar="L", help="tokens of a sequence")
  add("--sequences", type=int, default=1024, metavar="N")
  add("--seed", type=flags.seed, default=0, metavar="N")
  add("--json", default="", metavar="FILE", help="all numbers, for machines")
  add("--figure", default="", metavar="FILE", help="PNG: nats lost against evaluations")
  return parser
