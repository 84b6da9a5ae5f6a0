# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax bench`: speed beside the machine's limits."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax

from dlm_jax.bench import decode, limits, networks, passes, programs
from dlm_jax.cli import flags, oracle
from dlm_jax.errors import InputError, check_counts
from dlm_jax.evaluate import tables
from dlm_jax.experiment import build, plan
from dlm_jax.experiment.config import load_config

_BLOCKS = (4, 8, 16, 32)  # block lengths of public checkpoints


def main(argv: list[str]) -> None:
  """Parse flags, measure, print a table."""
  if argv[:1] == ["oracle"]:
    return oracle.main(argv[1:])
  options = _parser().parse(argv)
  counted = ("steps", "repeats", "cache_length", "prompt_length")
  check_counts(**{name: getattr(options, name) for name in counted})
  _check_file(options.json)
  if not options.batch_size or min(options.batch_size) < 1:
    raise InputError("--batch_size must be positive: one number, or several as in 8,32.")
  if options.option and options.what != "sample":
    raise InputError("--option is of `bench sample`.")
  if options.draft and options.what not in ("decode", "passes"):
    raise InputError("--draft is of `bench decode` and `bench passes`.")
  for name in ("checkpoint", "temperature", "dtype", "judge"):
    if getattr(options, name) and options.what != "decode":
      raise InputError(f"--{name} is of `bench decode`.")
  if options.judge and not options.checkpoint:
    raise InputError("--judge is of `bench decode --checkpoint`: random weights write no text.")
  config = flags.load_config(options)
  if config is None:
    return
  device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
  content = {
    "config": options.config,
    "overrides": options.overrides,
    "device": device,
    "jax": jax.__version__,
  }
  run = {"decode": _decode, "passes": _passes}.get(options.what, _programs)
  content |= run(options, config, device)
  if options.json:
    try:
      pathlib.Path(options.json).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
      raise InputError(f"{options.json} cannot be written ({error.strerror}).") from error


def _check_file(path: str) -> None:
  """Complain before anything is measured if a file cannot be written."""
  file = pathlib.Path(path)
  if path and (file.is_dir() or not os.access(file.parent, os.W_OK)):
    reason = "it is a directory" if file.is_dir() else "its directory cannot be written"
    raise InputError(f"--json={path} cannot be written: {reason}.")


def _programs(options, config, device) -> dict[str, Any]:
  """Time programs of training and sampling."""
  sampling = options.what == "sample"
  more = {"steps": options.steps, "options": dict(options.option)} if sampling else {}
  read = plan.read(config)
  vocab_size, dtype = build.vocabulary(read), read.model.fields["dtype"]
  ceiling = limits.measure(dtype, options.repeats)
  run = programs.BENCHES[options.what]
  rows = run(read, vocab_size, options.batch_size, ceiling, options.repeats, **more)
  print(
    f"{options.config} on {device}, jax {jax.__version__}: {ceiling.matmul / 1e12:.3g} TFLOP/s "
    f"{dtype} products, {ceiling.copy / 1e9:.3g} GB/s copied, on one\n"
  )
  header = ("program", "batch", "ms", "±", "rate", "GiB", "compared with", "ratio")
  print(tables.markdown(header, [_cells(row) for row in rows], left=(0, 6)))
  return {"limits": dataclasses.asdict(ceiling), "rows": list(map(dataclasses.asdict, rows))}


def _cells(row: programs.Row) -> tuple[str, ...]:
  time, tokens = row.timing, row.unit == "token/s"
  rate = f"{row.rate:,.0f} token/s" if tokens else f"{row.rate / 1e12:.3g} TFLOP/s"
  memory = "" if time.memory is None else f"{time.memory / 2**30:.2f}"
  ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
  seconds = (f"{1e3 * time.seconds:.2f}", f"{100 * time.spread:.0f} %")
  return (row.name, str(row.batch), *seconds, rate, memory, row.limit, ratio)


def _passes(options, config, device) -> dict[str, Any]:
  """Time passes of one row, and say what they mean for decoding with a draft."""
  timed = {"target": networks.make_decoder(plan.read(config))}
  if options.draft:
    timed["draft"] = networks.make_decoder(plan.read(load_config(options.draft)))
  ceiling = limits.measure(config.model.dtype, options.repeats)
  read = passes.read_rate(config.model.dtype, options.repeats)
  rows = passes.bench_passes(
    timed,
    queries=options.queries,
    cache_length=options.cache_length,
    variants=options.variants,
    copy=ceiling.copy,
    read=read,
    repeats=options.repeats,
  )
  print(
    f"{options.config} on {device}, jax {jax.__version__}: {ceiling.copy / 1e9:.4g} GB/s read and "
    f"written by a copy, {read / 1e9:.4g} GB/s read; {options.cache_length} cached tokens\n"
    "limit: bytes of weights over half the copy rate; ratio: measured over limit\n"
  )
  print(passes.table(rows))
  drafts = passes.speedups(rows, _BLOCKS)
  if drafts:
    print("\nwith the fastest of these passes, if a draft's tokens are accepted so often:\n")
    print(passes.speedup_table(drafts))
  return {
    "limits": dataclasses.asdict(ceiling) | {"read": read},
    "cache_length": options.cache_length,
    "rows": [
      dataclasses.asdict(row) | {"ratio": row.ratio, "read_ratio": row.read_ratio} for row in rows
    ],
    "speedups": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in drafts],
  }


def _decode(options, config, device) -> dict[str, Any]:
  """Compare ways of decoding."""
  shared = {
    "block_length": options.block_length,
    "temperature": options.temperature,
    "dtype": options.dtype,
    "storage": options.storage or None,
  }
  if options.checkpoint:
    prompts = networks.Prompts(
      count=options.num_prompts,
      file=options.prompts,
      data=options.data,
      length=options.prompt_length,
    )
    task = networks.from_checkpoint(
      options.checkpoint,
      options.draft or None,
      prompts,
      chat=options.chat,
      max_new_tokens=options.max_new_tokens,
      judge=options.judge,
      **shared,
    )
  else:
    draft = plan.read(load_config(options.draft)) if options.draft else None
    shared |= {"count": options.num_prompts, "length": options.prompt_length}
    task = networks.from_config(plan.read(config), draft, **shared)
  arms = decode.bench_decode(
    task.target,
    task.draft,
    task.prompts,
    task.rule,
    task.options,
    new_tokens=options.new_tokens,
    max_new_tokens=options.max_new_tokens,
    repeats=options.repeats,
    threshold=options.threshold,
    judge=task.judge,
  )
  name = options.checkpoint or f"{options.config} with random weights"
  print(
    f"{name} on {device}, jax {jax.__version__}: {len(task.prompts)} prompts one at a time, blocks "
    f"of {task.rule.block_length}, {task.target.model.config.dtype}, temperature "
    f"{options.temperature:g}, {options.new_tokens} new tokens timed\n"
  )
  print(decode.table(arms))
  keys = ("new_tokens", "max_new_tokens", "temperature", "threshold", "repeats", "judge")
  return {
    "checkpoint": options.checkpoint,
    "draft": options.draft,
    "prompts": len(task.prompts),
    "block_length": task.rule.block_length,
    "dtype": task.target.model.config.dtype,
    **{key: getattr(options, key) for key in keys},
    "rows": list(map(dataclasses.asdict, arms)),
  }


def _parser() -> flags.Parser:
  parser = flags.Parser(
    "bench",
    "Measure speed: medians of repeated timings, beside the limits of this machine.",
    """
dlm-jax bench sample --config=owt_duo --batch_size=32 --steps=16
dlm-jax bench passes --config=sdar:8b --draft=sdar:1b7 --json=passes.json
dlm-jax bench decode --checkpoint=SDAR-8B-Chat-b8 --draft=SDAR-1.7B-Chat-b8 --prompts=gsm8k.txt
""",
    usage="dlm-jax bench WHAT [--flag=value ...]",
  )
  what = [*sorted(programs.BENCHES), "passes", "decode"]
  parser.add_argument(
    "what", choices=what, metavar="WHAT", help=f"{', '.join(what)}; oracle: see its --help"
  )
  small = jax.default_backend() == "cpu"
  flags.add_config(parser, default="quickstart_teacher" if small else "owt_teacher")
  add = parser.add_argument
  add("--batch_size", type=flags.integers, default=[32], metavar="B,B,…")
  add("--steps", type=int, default=16, metavar="N", help="of a sample")
  flags.add_option(parser, "sampler=psi, temperature=0.9")
  add("--repeats", type=int, default=10, metavar="N", help="of which the median counts")
  add("--json", default="", metavar="FILE", help="all numbers, for machines")
  add = parser.add_argument_group("of passes and decode, for decoders of blocks").add_argument
  add("--draft", default="", metavar="NAME", help="config, or with --checkpoint a directory")
  add(
    "--queries",
    type=flags.integers,
    default=[1, 4, 16, 64],
    metavar="Q,Q,…",
    help="tokens of a pass",
  )
  add("--cache_length", type=int, default=1024, metavar="N", help="tokens before a pass")
  add(
    "--variants",
    type=lambda text: text.split(","),
    default=list(passes.VARIANTS),
    metavar="V,V,…",
    help=f"how layers run: {', '.join(passes.VARIANTS)}",
  )
  add("--checkpoint", default="", metavar="PATH", help="of decode: trained weights")
  add("--prompts", default="", metavar="FILE", help="a prompt per line")
  add("--chat", action="store_true", help="a prompt is what a user says")
  add("--data", default="", metavar="DIR", help="or the validation split of a packed dataset")
  add("--num_prompts", type=int, default=16, metavar="N")
  add("--prompt_length", type=int, default=64, metavar="N", help="of --data, tokens")
  add("--new_tokens", type=int, default=128, metavar="N", help="emitted in timed runs")
  add("--max_new_tokens", type=int, default=256, metavar="N", help="in runs that may stop")
  add("--block_length", type=int, metavar="N", help="default: what checkpoint or config names")
  add("--temperature", type=float, default=0.0, metavar="T")
  add("--threshold", type=float, default=0.9, metavar="P", help="of the dynamic arm")
  add("--judge", default="", metavar="PATH", help="next-token network that reads the texts")
  add(
    "--dtype",
    choices=("float32", "bfloat16"),
    help="of products; default: as in sampling, or the config's",
  )
  add("--storage", default="", help="stacked, layers or fused: how parameters are kept")
  return parser
