# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax evaluate`: held-out likelihood, and the quality of samples, of one model."""

import dataclasses
import json

import jax
import numpy as np

from dlm_jax import convert, evaluators, experiment, models, pipeline
from dlm_jax.cli import flags
from dlm_jax.data import builder, loader
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier, generative, likelihood


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
  parser.add_argument("--samples", type=int, default=256)
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", action="store_true")
  flags_ = parser.parse(argv)
  if not flags_.data and not flags_.judge:
    parser.error("say what to measure: --data for likelihood, --judge for samples, or both")
  scores: dict[str, float | int] = {}
  if flags_.data:
    scores |= _likelihood(flags_)
  if flags_.judge:
    scores |= _samples(flags_)
  if flags_.json:
    print(json.dumps(scores))


def _likelihood(flags_) -> dict[str, float]:
  dataset = builder.open_dataset(flags_.data)
  directory = experiment.network_directory(flags_.checkpoint)
  dtype = {} if jax.default_backend() != "cpu" else {"dtype": "float32"}
  model, params, proc = convert.load(directory, **dtype)
  evaluators.check_tokenizer(directory, dataset.tokenizer(), model.config.vocab_size, proc)
  size = min(flags_.batch_size, flags_.sequences)
  if size < 1:
    raise InputError("--sequences and --batch_size must be positive.")
  batches = loader.evaluation_batches(flags_.data, "validation", 1, flags_.sequences)
  tokens_NL = np.concatenate(list(batches))
  shared = {
    "batch_size": size, "bytes_per_token": dataset.info.splits["validation"].bytes_per_token,
  }  # fmt: skip
  if proc is None:
    scores = likelihood.ar_perplexity(likelihood.Judge(model, params), tokens_NL, **shared)
    what = "perplexity"
  else:
    denoiser, rng = models.Denoiser(model, params), jax.random.key(flags_.seed)
    scores = likelihood.elbo(denoiser, proc, tokens_NL, rng, **shared)
    what = "perplexity bound"
  if not flags_.json:
    print(
      f"{what} {generative.plus_minus(scores['perplexity'], scores['perplexity_se'], 2)}, "
      f"{scores['bits_per_byte']:.3f} bits per byte, {len(tokens_NL)} sequences "
      f"({tokens_NL.size:,} tokens)"
    )
  return scores


def _samples(flags_) -> dict[str, float | int]:
  likelihood.check_counts(samples=flags_.samples, batch_size=flags_.batch_size)
  pipe = pipeline.load(flags_.checkpoint)
  judge = evaluators.load_judge(flags_.judge, pipe.tokenizer)
  sampler = frontier.Sampler(denoiser=pipe.denoiser, process=pipe.process, length=pipe.length)
  tokens_BL, _ = frontier.draw_samples(
    sampler, flags_.steps, flags_.samples, min(flags_.batch_size, flags_.samples), flags_.seed
  )
  quality = judge.quality(tokens_BL, batch_size=flags_.batch_size)
  if not flags_.json:
    print(f"{flags_.steps} steps: {quality}")
  return {"steps": flags_.steps, **dataclasses.asdict(quality)}
