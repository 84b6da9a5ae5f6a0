# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax bench`: speed beside the machine's limits."""

import dataclasses
import json
import pathlib

import jax

from dlm_jax import experiment, tables
from dlm_jax.bench import limits, programs
from dlm_jax.cli import flags
from dlm_jax.errors import InputError
from dlm_jax.evaluate.likelihood import check_counts


def main(argv: list[str]) -> None:
  """Parse flags, measure, print a table."""
  options = _parser().parse(argv)
  check_counts(steps=options.steps, repeats=options.repeats)
  if not options.batch_size or min(options.batch_size) < 1:
    raise InputError("--batch_size must be positive: one number, or several as in 8,32.")
  config = flags.load_config(options)
  if config is None:
    return
  if options.what == "sample":
    more = {"steps": options.steps, "options": dict(options.option)}
  elif options.option:
    raise InputError("--option is of `bench sample`.")
  else:
    more = {}
  vocab_size = experiment.vocabulary(config)
  ceiling = limits.measure(config.model.dtype, options.repeats)
  run = programs.BENCHES[options.what]
  rows = run(config, vocab_size, options.batch_size, ceiling, options.repeats, **more)
  device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
  print(
    f"{options.config} on {device}, jax {jax.__version__}: {ceiling.matmul / 1e12:.3g} TFLOP/s "
    f"{config.model.dtype} products, {ceiling.copy / 1e9:.3g} GB/s copied, on one\n"
  )
  header = ("program", "batch", "ms", "±", "rate", "GiB", "compared with", "ratio")
  print(tables.markdown(header, [_cells(row) for row in rows], left=(0, 6)))
  if options.json:
    content = {
      "config": options.config, "overrides": options.overrides, "device": device,
      "jax": jax.__version__, "limits": dataclasses.asdict(ceiling),
      "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip
    try:
      pathlib.Path(options.json).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
      raise InputError(f"{options.json} cannot be written ({error.strerror}).") from error


def _cells(row: programs.Row) -> tuple[str, ...]:
  time, tokens = row.timing, row.unit == "token/s"
  rate = f"{row.rate:,.0f} token/s" if tokens else f"{row.rate / 1e12:.3g} TFLOP/s"
  memory = "" if time.memory is None else f"{time.memory / 2**30:.2f}"
  ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
  seconds = (f"{1e3 * time.seconds:.2f}", f"{100 * time.spread:.0f} %")
  return (row.name, str(row.batch), *seconds, rate, memory, row.limit, ratio)


def _parser() -> flags.Parser:
  parser = flags.Parser(
    "bench",
    "Measure speed: medians of repeated timings, beside the limits of this machine.",
    """
dlm-jax bench trunk --batch_size=32,64
dlm-jax bench sample --config=owt_duo --batch_size=32 --steps=16
dlm-jax bench train --config=owt_idlm --batch_size=8 --json=idlm.json
""",
  )
  parser.add_argument("what", choices=sorted(programs.BENCHES), help="which programs")
  small = jax.default_backend() == "cpu"
  flags.add_config(parser, default="quickstart_teacher" if small else "owt_teacher")
  parser.add_argument("--batch_size", type=flags.integers, default=[32], metavar="B,B,…")
  parser.add_argument("--steps", type=int, default=16, help="of a sample")
  flags.add_option(parser, "sampler=psi, temperature=0.9")
  parser.add_argument("--repeats", type=int, default=10, help="of which the median counts")
  parser.add_argument("--json", default="", metavar="FILE", help="all numbers, for machines")
  return parser
