# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax evaluate`: held-out likelihood, and the quality of samples, of one model."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax

from dlm_jax import convert, draw, models
from dlm_jax.cli import flags
from dlm_jax.convert import places
from dlm_jax.data import builder, loader, templates
from dlm_jax.decode.passes import Bound
from dlm_jax.errors import InputError, check_counts
from dlm_jax.evaluate import blocks, frontier, generative, likelihood, proteins
from dlm_jax.evaluate.judge import JudgeWithTokens, check_tokenizer, load_judge
from dlm_jax.text import denoiser


def main(argv: list[str]) -> None:
  """Parse flags, measure, print; --json for machines."""
  parser = flags.Parser(
    "evaluate",
    "Measure held-out likelihood (of a judge, or the bound of a denoiser) and sample quality.",
    """
dlm-jax evaluate --checkpoint=runs/novels_judge --data=data/novels_packed
dlm-jax evaluate --checkpoint=runs/novels_teacher --data=data/novels_packed --sequences=1024
dlm-jax evaluate --checkpoint=runs/novels_idlm --judge=runs/novels_judge --steps=8 --samples=512
""",
  )
  parser.add_argument("--checkpoint", "--workdir", required=True, help="workdir or model directory")
  parser.add_argument("--data", default="", help="packed dataset, for likelihood")
  parser.add_argument("--sequences", type=int, default=256, help="validation sequences")
  parser.add_argument("--judge", default="", help="autoregressive judge: GenPPL and entropy")
  parser.add_argument("--steps", type=int, default=16, help="network evaluations per sample")
  parser.add_argument("--samples", type=int, default=256, help="0 with proteins: likelihood only")
  parser.add_argument(
    "--training",
    type=int,
    default=20_000,
    help="of proteins: training sequences that samples are compared with",
  )
  flags.add_option(parser, "sampler=rgas, temperature=0.9")
  parser.add_argument(
    "--block_length",
    type=int,
    default=0,
    help="of a decoder with a mask; 0: what it was trained with. The first token is not scored",
  )
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--seed", type=flags.seed, default=0)
  parser.add_argument("--json", action="store_true")
  flags_ = parser.parse(argv)
  if not flags_.data and not flags_.judge:
    parser.error("say what to measure: --data for likelihood, --judge for samples, or both")
  scores: dict[str, Any] = {}
  dataset = builder.open_dataset(flags_.data) if flags_.data else None
  if dataset is not None and min(flags_.batch_size, flags_.sequences) < 1:
    raise InputError("--sequences and --batch_size must be positive.")
  proteins_, writer = dataset is not None and dataset.info.packing == "documents", None
  if proteins_:
    network = convert.open_network(places.network_directory(flags_.checkpoint))
    if flags_.samples and network.writes == "grid":
      check_counts(samples=flags_.samples, training=flags_.training)
      writer = _open(flags_, dataset)
  elif flags_.judge:
    check_counts(samples=flags_.samples, batch_size=flags_.batch_size)
    packed = dataset is not None and dataset.info.packing == "conversations"
    writer = _open(flags_, dataset if packed else None)
  if dataset is not None:  # what is wrong with samples is said before this takes its time
    scores |= _likelihood(flags_, dataset)
  if writer is not None:
    scores |= _proteins(flags_, writer, dataset) if proteins_ else _samples(flags_, writer)
  if flags_.json:
    print(json.dumps(scores))


def _likelihood(flags_, dataset) -> dict[str, float]:
  directory = places.network_directory(flags_.checkpoint)
  dtype = {} if jax.default_backend() != "cpu" else {"dtype": "float32"}
  network = convert.open_network(directory, **dtype)
  check_tokenizer(network, dataset.tokenizer())
  size = min(flags_.batch_size, flags_.sequences)
  groups = loader.evaluation_groups(dataset, "validation", flags_.sequences)
  tokens, valid = loader.features(groups, "tokens", "valid")
  shared = {
    "batch_size": size,
    "bytes_per_token": dataset.info.splits["validation"].bytes_per_token,
    "valid_NL": valid,
  }
  scores = _scores(flags_, network, tokens, shared)
  what = "perplexity" if network.writes == "next" else "perplexity bound"
  if not flags_.json:
    size = scores["tokens"] if valid is not None else tokens.size
    print(
      f"{what} {generative.plus_minus(scores['perplexity'], scores['perplexity_se'], 2)}, "
      f"{scores['bits_per_byte']:.3f} bits per byte, {scores['sequences']} sequences "
      f"({size:,} tokens)"
    )
  return scores


def _scores(flags_, network, tokens, shared):
  """Return the likelihood that belongs to how the network writes; a bound of one with a process."""
  model, params, proc = network.model, network.params, network.process
  if network.writes == "next":
    return likelihood.ar_perplexity(likelihood.Judge(model, params), tokens, **shared)
  rng = draw.key(flags_.seed)
  if network.writes == "grid":
    return likelihood.elbo(models.Denoiser(model, params), proc, tokens, rng, **shared)
  length = flags_.block_length or network.block_length
  if length is None:
    raise InputError(f"{network.source} does not say its block length; give --block_length.")
  shared |= {"block_length": length, "first_given": True}
  return blocks.block_elbo(Bound(model, params), proc, tokens, rng, **shared)


def _proteins(flags_, writer, dataset) -> dict[str, Any]:
  """Draw proteins as long as the first validation records; compare them with the dataset."""
  pipe, judge = writer.pipe, writer.judge
  tokens_NL, valid_NL = writer.draw(flags_)

  def texts(split):
    groups = loader.evaluation_groups(dataset, split, flags_.training)
    return [pipe.tokenizer.decode(row_L) for group in groups for row_L in group["tokens"]]

  compared = proteins.measure(
    [pipe.tokenizer.decode(row_L) for row_L in tokens_NL],
    reference=texts("validation"),
    training=texts("train"),
  )
  spread = generative.entropy(tokens_NL, valid_NL)
  scores = {"steps": flags_.steps, **dataclasses.asdict(compared), **spread}
  lines = [f"entropy {generative.plus_minus(spread['entropy'], spread['entropy_se'], 2)} nats"]
  if judge is not None:
    quality = judge.quality(tokens_NL, flags_.batch_size, valid_NL)
    scores |= dataclasses.asdict(quality)
    lines = [str(quality)]
  if not flags_.json:
    print("\n".join(f"{flags_.steps} steps: {line}" for line in [*lines, str(compared)]))
  return {name: value for name, value in scores.items() if value is not None}


class _Writer(NamedTuple):
  """A model, its judge if one is named, how it samples, and the data whose templates it fills."""

  pipe: denoiser.Pipeline
  judge: JudgeWithTokens | None
  sampler: frontier.Sampler
  data: Any

  def draw(self, flags_):
    """Return samples, and where they are drawn; None: everywhere."""
    count, batch = flags_.samples, min(flags_.batch_size, flags_.samples)
    tokens_NL, _ = frontier.draw_samples(self.sampler, flags_.steps, count, batch, flags_.seed)
    if not self.data:
      return tokens_NL, None
    return tokens_NL, templates.like_validation(self.data, count, batch).valid_NL


def _open(flags_, data) -> _Writer:
  """Open what samples are drawn and judged with; complain about options before that is done."""
  check_counts(steps=flags_.steps)
  pipe = denoiser.load_denoiser(flags_.checkpoint)
  judge = load_judge(flags_.judge, pipe.tokenizer) if flags_.judge else None
  sampler = pipe.sampler(data or "", **dict(flags_.option))
  sampler.check(min(flags_.batch_size, flags_.samples), flags_.steps, flags_.samples)
  return _Writer(pipe, judge, sampler, data)


def _samples(flags_, writer) -> dict[str, float | int]:
  tokens_BL, valid_NL = writer.draw(flags_)
  quality = writer.judge.quality(tokens_BL, flags_.batch_size, valid_NL)
  if not flags_.json:
    print(f"{flags_.steps} steps: {quality}")
  return {"steps": flags_.steps, **dataclasses.asdict(quality)}
