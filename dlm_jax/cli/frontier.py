# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax frontier`: GenPPL and entropy against network evaluations, for several models."""

import argparse
import itertools
import math
import pathlib

import numpy as np

from dlm_jax import convert, remote
from dlm_jax.cli import flags
from dlm_jax.convert import places
from dlm_jax.data import loader, packing, templates
from dlm_jax.data.dataset import open_dataset
from dlm_jax.errors import InputError, check_choice, check_counts
from dlm_jax.evaluate import frontier, joined, matched, reference, saving
from dlm_jax.evaluate.frontier import sweep_progress
from dlm_jax.evaluate.judge import load_judge
from dlm_jax.experiment.run import make_workdir
from dlm_jax.text import denoiser, prompts


def main(argv: list[str]) -> None:
  """Parse flags, sweep, write CSV, JSON and PNG; run again it continues."""
  options = _parsed(argv)
  if options.join:
    _join(options)
    return
  frontier.checked_nfes(options.nfes)
  if options.temperatures or options.entropy is not None:
    matched.check_temperatures(options.temperatures or [1.0])
  if options.baseline:
    names = [name for name, *_ in options.model]
    check_choice("--baseline", options.baseline, names)
    if not options.temperatures:
      raise InputError("--baseline compares at matched entropy; give --temperatures, e.g. 0.9,1.")
  check_counts(samples=options.samples, batch_size=options.batch_size)
  data = open_dataset(options.data) if options.data else None
  samplers, tokenizer, fingerprints = _samplers(options, data)
  real_NL = _held_out(options, data, tokenizer, next(iter(samplers.values())).length)
  judge = load_judge(options.judge, tokenizer)
  judge_hash = convert.fingerprint(places.network_directory(options.judge))
  make_workdir(options.workdir)
  mirror = remote.Mirror(options.workdir, ("frontier.jsonl",))
  finished = mirror.folder / "frontier.jsonl"
  context = {"judge": judge_hash, "weights": fingerprints}
  context |= {"lengths": options.data} if options.data else {}
  settings = {
    "judge": judge,
    "samples": options.samples,
    "batch_size": options.batch_size,
    "seed": options.seed,
    "context": context,
    "path": finished,
    "valid_NL": _valid(options, data),
  }
  samplers |= _limits(samplers, options.baseline)
  asked = list(dict.fromkeys(options.nfes))
  of_round = sum(sum(sampler.nfes(asked)) for sampler in samplers.values())
  with sweep_progress(of_round * (1 + len(set(options.temperatures)))) as told:

    def on_row(*row):
      told(*row)
      mirror.sync()

    settings["on_row"] = on_row
    rows, warm = frontier.sweep(samplers, options.nfes, **settings), []
    if options.temperatures:
      warm = matched.sweep(samplers, options.nfes, options.temperatures, **settings)
  real = None if real_NL is None else reference.score(judge, real_NL)
  written = frontier.write(rows, mirror.folder, reference=real, axes=options.x)
  paths = list(written.values())
  print(frontier.table(rows))
  if real is not None:
    print(f"\n{real.label}: {real.genppl:.1f} at {real.entropy:.2f} nats")
  if warm:
    frontier.write_json(warm, mirror.folder / joined.SWEPT, real)
    paths += _match(warm, options, mirror.folder, real)
  mirror.sync()
  print("\n".join(f"{options.workdir.rstrip('/')}/{path.name}" for path in paths))


def _limits(samplers, baseline) -> dict[str, frontier.Sampler]:
  """Return the exact limit of the baseline, with which its curve ends; {} if it has none."""
  exact = saving.limit(samplers[baseline]) if baseline else None
  return {saving.limit_name(baseline): exact} if exact is not None else {}


def _parsed(argv) -> argparse.Namespace:
  """Parse; what measures and what joins do not go together."""
  parser = _parser()
  options = parser.parse(argv)
  if not options.join:
    lacking = [f"--{name}" for name in ("model", "judge") if not getattr(options, name)]
    if lacking:
      parser.error(f"the following arguments are required: {', '.join(lacking)}")
    return options
  kept = {"join", "workdir", "x", "entropy", "baseline", "overrides"}
  others = sorted(set(vars(options)) - kept)
  if idle := [name for name in others if getattr(options, name) != parser.get_default(name)]:
    parser.error(f"--join measures nothing: leave out --{idle[0]}")
  return options


def _join(options) -> None:
  """Write and print finished sweeps as one; with a baseline or an entropy, at matched entropy."""
  rows, real = joined.join(options.join)
  matching, warm = options.baseline or options.entropy is not None, []
  if matching:
    warm, _ = joined.join(options.join, joined.SWEPT)
  if options.baseline:
    check_choice("--baseline", options.baseline, tuple(dict.fromkeys(r["name"] for r in rows)))
  workdir = options.workdir.rstrip("/")
  if remote.exists(f"{workdir}/frontier.jsonl"):
    raise InputError(f"{workdir} holds a sweep of its own; join into another --workdir.")
  make_workdir(options.workdir)
  mirror = remote.Mirror(options.workdir)
  paths = list(frontier.write(rows, mirror.folder, reference=real, axes=options.x).values())
  print(frontier.table(rows))
  if matching:
    paths += _match(warm, options, mirror.folder, real)
  mirror.sync()
  print("\n".join(f"{workdir}/{path.name}" for path in paths))


def _match(rows, options, folder, real) -> list[pathlib.Path]:
  """Print and write the comparison at matched entropy."""
  told = []
  if at := [options.entropy] if options.entropy is not None else matched.entropies(rows):
    told.append(f"GenPPL at common entropies:\n{matched.table(rows, at)}")
  if options.baseline:
    saved = saving.table(rows, options.baseline, options.entropy)
    told.append(f"evaluations saved beside {options.baseline}, two errors in brackets:\n{saved}")
    told += _said(rows, at, options.baseline)
  rows = matched.match(rows, options.entropy)
  if not all(math.isfinite(row["genppl"]) for row in rows):
    print("\nnot every model reaches the entropy between these --temperatures: nan below.")
  print(f"\nat matched entropy:\n{frontier.table(rows)}")
  for text in told:
    print(f"\n{text}")
  if not any(math.isfinite(row["genppl"]) for row in rows):
    return []
  settings = {"reference": real, "axes": options.x, "stem": "matched"}
  return list(frontier.write(rows, folder, **settings).values())


def _said(rows, at, baseline) -> list[str]:
  """Say of every model what it saves at the middle one of the entropies and of its evaluations.

  Not what it saves at most: the largest of many is large by chance, too.
  """
  found = saving.savings(rows, baseline, at[len(at) // 2]) if at else []
  each = saving.by_name(found).values()
  return [saving.told(own[len(own) // 2], baseline) for own in each]


def _held_out(options, data, words, length) -> np.ndarray | None:
  """Return at most as many held-out texts as there are samples, as long as these."""
  path = options.held_out
  if not path:
    return None
  flag = f"--held_out={path}"
  if data is not None or words.framed:
    raise InputError(
      f"{flag} is of plain text only, not of proteins or conversations; leave it out."
    )
  if remote.is_remote(path) or pathlib.Path(path).is_dir():
    dataset = open_dataset(path)
    if dataset.info.packing != "concatenate":
      raise InputError(f"{flag} was prepared with packing={dataset.info.packing}; give plain text.")
    if dataset.tokenizer().fingerprint != words.fingerprint:
      raise InputError(f"{flag} was prepared with another tokenizer than the models have.")
    if dataset.info.length != length:
      raise InputError(f"{flag} has sequences of {dataset.info.length} tokens, samples {length}.")
    count = min(options.samples, dataset.info.splits["validation"].records)
    (record,) = loader.evaluation_batches(dataset, "validation", count, 1)
    return record["tokens"]
  text = prompts.read_text(path, flag)
  pieces = packing.pack([words.encode(text)], length, words.eos_id)
  texts = list(itertools.islice(pieces, options.samples))
  if not texts:
    raise InputError(f"{flag} is shorter than one sample of {length} tokens; give more text.")
  return np.stack(texts)


def _valid(options, data):
  """Return where samples are drawn, not given; None: everywhere."""
  if data is None:
    return None
  return templates.like_validation(data, options.samples, options.batch_size).valid_NL


def _samplers(options, data):
  """Load every model; return samplers, their common tokenizer and the hashes of their weights."""
  samplers, tokenizer, fingerprints = {}, None, {}
  for name, path, sampling in options.model:
    if name in samplers:
      raise InputError(f"--model={name}=… is given twice; every name needs its own.")
    pipe = denoiser.load_denoiser(path, options.tokenizer or None)
    if tokenizer is not None and pipe.tokenizer.fingerprint != tokenizer.fingerprint:
      raise InputError(f"--model={name}={path} has another tokenizer than the first model.")
    tokenizer = pipe.tokenizer
    sampler = samplers[name] = pipe.sampler(data or "", **sampling)
    batch, most = min(options.batch_size, options.samples), max(sampler.nfes(options.nfes))
    sampler.check(batch, most, options.samples)
    fingerprints[name] = convert.fingerprint(places.network_directory(path))
  return samplers, tokenizer, fingerprints


def _parser() -> flags.Parser:
  parser = flags.Parser(
    "frontier",
    "Compare models over numbers of network evaluations (NFE).",
    """
dlm-jax frontier --model teacher=runs/t --model student=runs/s --judge=runs/j --workdir=runs/f
dlm-jax frontier --model teacher=shipped:teacher --judge=shipped:judge --nfes=4,8 --workdir=runs/f
dlm-jax frontier --join=runs/teachers,runs/students --baseline=teacher --workdir=runs/all
""",
  )
  parser.add_argument(
    "--model",
    action="append",
    type=flags.named_path,
    metavar="NAME=PATH[,K=V]",
    help="repeat for several; options K=V are the sampler's: sampler=psi,kappa=cap,nucleus=0.9",
  )
  parser.add_argument("--judge", help="autoregressive judge, or a GPT-2 directory")
  parser.add_argument("--tokenizer", default="", help="default: the one beside each network")
  parser.add_argument(
    "--data",
    default="",
    help="of proteins or conversations: prepared dataset whose lengths or prompts samples get",
  )
  parser.add_argument(
    "--held_out",
    default="",
    metavar="PATH",
    help="what real text scores is drawn too: a text file, or a prepared dataset's validation part",
  )
  parser.add_argument("--workdir", required=True, help="frontier.csv, .json and .png go there")
  _add_join(parser)
  parser.add_argument("--nfes", type=flags.integers, default=[1, 2, 4, 8, 16, 32, 64, 128])
  parser.add_argument("--samples", type=int, default=512)
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--seed", type=flags.seed, default=0)
  parser.add_argument(
    "--x",
    type=_axes,
    default=["nfe"],
    metavar="AXES",
    help="plot against: nfe, evaluations (of all networks), seconds; or several: nfe,seconds",
  )
  parser.add_argument(
    "--temperatures",
    type=flags.numbers,
    default=[],
    metavar="T,T,…",
    help="also compare at matched entropy, interpolated between these temperatures",
  )
  parser.add_argument(
    "--entropy",
    type=flags.number,
    help="nats to match; default: at every NFE what all models reach",
  )
  _add_baseline(parser)
  return parser


def _add_baseline(parser) -> None:
  parser.add_argument(
    "--baseline",
    default="",
    metavar="NAME",
    help="model beside which evaluations are saved, at matched entropies; masks: its exact limit "
    "is drawn too",
  )


def _add_join(parser) -> None:
  parser.add_argument(
    "--join",
    type=_folders,
    default=[],
    metavar="DIR,DIR,…",
    help="measure nothing: draw the finished frontiers of these workdirs as one; with --baseline "
    "or --entropy also compare their --temperatures",
  )


def _folders(text: str) -> list[str]:
  if not (found := [part for part in text.split(",") if part]):
    raise argparse.ArgumentTypeError("write --join=DIR,DIR")
  return found


def _axes(text: str) -> list[str]:
  names = text.split(",")
  for name in names:
    if name not in frontier.AXES:
      raise argparse.ArgumentTypeError(f"{name!r} is not among {', '.join(frontier.AXES)}")
  return names
