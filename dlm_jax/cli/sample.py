# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax sample`: texts from a trained model."""

import json
import sys

import jax
import numpy as np

from dlm_jax import assets, pipeline, viz
from dlm_jax.cli import flags
from dlm_jax.errors import InputError, hint


def main(argv: list[str]) -> None:
  """Parse flags, sample, print."""
  parser = flags.Parser(
    "sample",
    "Print samples of a trained model.",
    """
dlm-jax sample --model=novels-student --steps=8 --prompt='It was ' --show_steps
dlm-jax sample --checkpoint=runs/quickstart/student --steps=8 --sampler=psi --option kappa=0.9
dlm-jax sample --checkpoint=data/idlm-duo --tokenizer=data/gpt2 --steps=8
""",
  )
  parser.add_argument("--model", default="", help="a shipped network, e.g. novels-student")
  parser.add_argument("--checkpoint", "--workdir", default="",
                      help="instead of --model: workdir, model directory or *.ckpt")  # fmt: skip
  parser.add_argument("--tokenizer", default="", help="default: the one beside the network")
  parser.add_argument("--steps", type=int, default=16, help="network evaluations per text")
  parser.add_argument("--num", type=int, default=1, help="number of texts")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--length", type=int, default=0, help="tokens, or residues; 0: the model's")
  parser.add_argument("--prompt", default="", help="text that every sample starts with")
  parser.add_argument(
    "--sampler", default="ancestral", help="ancestral, first_hitting, psi, analytic or rgas"
  )
  flags.add_option(parser, "kappa=0.9 or kappa=cap, eta=0.02 (psi); h=30,40, candidates=4 (rgas)")
  parser.add_argument("--noise_removal", default="ancestral", help="ancestral, greedy or none")
  parser.add_argument("--temperature", type=float, default=1.0)
  parser.add_argument("--nucleus", type=float, default=1.0, help="p of nucleus truncation")
  parser.add_argument("--precision", default="exact", help="exact, or legacy: the public fp32 race")
  parser.add_argument("--show_steps", action="store_true", help="show the denoising of text 1")
  parser.add_argument("--json", action="store_true", help="one JSON string per line")
  options = vars(parser.parse(argv))
  options.pop("overrides")
  show, as_json = options.pop("show_steps"), options.pop("json")
  path = _source(options.pop("checkpoint"), options.pop("model"))
  tokenizer = options.pop("tokenizer")
  if not options["length"]:
    options.pop("length")
  options |= dict(options.pop("option"))
  if options["precision"] == "legacy":
    for name in ("temperature", "nucleus"):
      if options.pop(name) != 1.0:
        raise InputError(f"--{name} does not combine with --precision=legacy.")
  pipe = pipeline.load(path, tokenizer or None)
  if show:
    _, trace_KBL = pipe.tokens(**{**options, "num": 1}, return_trace=True)
    trace_KL = np.asarray(jax.device_get(trace_KBL))[:, 0]
    print(viz.terminal(trace_KL, pipe.tokenizer, colour=sys.stdout.isatty()))
    return
  for number, text in enumerate(pipe(**options), start=1):
    if as_json:
      print(json.dumps(text))
    else:
      print(f"──── {number} ────\n{text}\n")


def _source(checkpoint: str, model: str) -> str:
  """Return what to load: exactly one of the two is given."""
  if checkpoint and not model:
    return checkpoint
  known = assets.denoisers()
  if checkpoint or not model:
    raise InputError(
      f"{'both --model and' if model else 'neither --model nor'} --checkpoint given; give one: "
      f"--checkpoint=PATH of a trained network, or --model=NAME, one of {', '.join(known)}."
    )
  if model not in known:
    near = hint(model, known)
    raise InputError(
      f"--model={model} is no shipped model{near}; choose one of {', '.join(known)}."
    )
  return f"shipped:{model}"
