# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax evaluate`: held-out likelihood, and the quality of samples, of one model."""

import dataclasses
import json
from typing import Any

import jax

from dlm_jax import convert, models
from dlm_jax.cli import flags
from dlm_jax.convert import places
from dlm_jax.data import builder, loader, templates
from dlm_jax.decode.passes import Bound
from dlm_jax.errors import InputError, check_counts
from dlm_jax.evaluate import blocks, frontier, generative, likelihood, proteins
from dlm_jax.evaluate.judge import check_tokenizer, load_judge
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
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", action="store_true")
  flags_ = parser.parse(argv)
  if not flags_.data and not flags_.judge:
    parser.error("say what to measure: --data for likelihood, --judge for samples, or both")
  scores: dict[str, Any] = {}
  dataset = builder.open_dataset(flags_.data) if flags_.data else None
  if dataset is not None:
    scores |= _likelihood(flags_, dataset)
  if dataset is not None and dataset.info.packing == "documents":
    network = convert.open_network(places.network_directory(flags_.checkpoint))
    if flags_.samples and network.writes == "grid":
      scores |= _proteins(flags_, dataset)
  elif flags_.judge:
    packed = dataset is not None and dataset.info.packing == "conversations"
    scores |= _samples(flags_, dataset if packed else None)
  if flags_.json:
    print(json.dumps(scores))


def _likelihood(flags_, dataset) -> dict[str, float]:
  directory = places.network_directory(flags_.checkpoint)
  dtype = {} if jax.default_backend() != "cpu" else {"dtype": "float32"}
  network = convert.open_network(directory, **dtype)
  check_tokenizer(network, dataset.tokenizer())
  size = min(flags_.batch_size, flags_.sequences)
  if size < 1:
    raise InputError("--sequences and --batch_size must be positive.")
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
  rng = jax.random.key(flags_.seed)
  if network.writes == "grid":
    return likelihood.elbo(models.Denoiser(model, params), proc, tokens, rng, **shared)
  length = flags_.block_length or network.block_length
  if length is None:
    raise InputError(f"{network.source} does not say its block length; give --block_length.")
  shared |= {"block_length": length, "first_given": True}
  return blocks.block_elbo(Bound(model, params), proc, tokens, rng, **shared)


def _proteins(flags_, dataset) -> dict[str, Any]:
  """Draw proteins as long as the first validation records; compare them with the dataset."""
  check_counts(samples=flags_.samples, training=flags_.training)
  pipe, judge, tokens_NL, valid_NL = _draw(flags_, dataset)

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


def _draw(flags_, data):
  """Return the model, its judge if one is named, samples like `data`, and where they are drawn."""
  pipe = denoiser.load_denoiser(flags_.checkpoint)
  judge = load_judge(flags_.judge, pipe.tokenizer) if flags_.judge else None
  sampler = pipe.sampler(data or "", **dict(flags_.option))
  batch = min(flags_.batch_size, flags_.samples)
  tokens_NL, _ = frontier.draw_samples(sampler, flags_.steps, flags_.samples, batch, flags_.seed)
  valid_NL = None
  if data:
    valid_NL = templates.like_validation(data, flags_.samples, batch).valid_NL
  return pipe, judge, tokens_NL, valid_NL


def _samples(flags_, data) -> dict[str, float | int]:
  check_counts(samples=flags_.samples, batch_size=flags_.batch_size)
  _, judge, tokens_BL, valid_NL = _draw(flags_, data)
  quality = judge.quality(tokens_BL, flags_.batch_size, valid_NL)
  if not flags_.json:
    print(f"{flags_.steps} steps: {quality}")
  return {"steps": flags_.steps, **dataclasses.asdict(quality)}
