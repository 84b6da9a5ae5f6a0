# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax VERB …`: choose the verb, turn user errors into one line and exit code 2."""

import importlib
import os
import sys

from dlm_jax import disk
from dlm_jax.errors import InputError, hint, one_line

VERBS = {
  "quickstart": "the whole job on this machine: distil, sample, measure, report",
  "prepare": "tokenise and pack a corpus",
  "train": "train a teacher, a judge or a student",
  "sample": "print samples of a trained model",
  "evaluate": "likelihood, GenPPL and entropy of a model",
  "frontier": "quality against network evaluations, for several models",
  "bench": "speed beside the limits of this machine",
  "convert": "between training runs and the Hugging Face layout",
  "models": "what there is to name: networks, experiments, samplers, methods",
}

_RESUME = ("quickstart", "train", "frontier")  # what is done is not done again

_HELP = """usage: dlm-jax VERB [--flag=value ...]

{verbs}

examples:
  dlm-jax quickstart --workdir=runs/quickstart
  dlm-jax train --config=novels_teacher --workdir=runs/novels_teacher --config.optim.lr=3e-4
  dlm-jax sample --checkpoint=runs/quickstart/student --steps=8 --num=4

`dlm-jax VERB --help` lists a verb's flags."""


def main(argv: list[str] | None = None) -> int:
  """Run a verb; return the exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help", "help"):
    width = max(map(len, VERBS))
    print(_HELP.format(verbs="\n".join(f"  {v:<{width}}  {VERBS[v]}" for v in VERBS)))
    return 0
  verb, *rest = argv
  if verb not in VERBS:
    known = ", ".join(VERBS)
    line = f"{verb!r} is no verb; use {known}{hint(verb, VERBS)}."
    print(f"dlm-jax: {one_line(line)}", file=sys.stderr)
    return 2
  try:
    code = importlib.import_module(f"dlm_jax.cli.{verb}").main(rest) or 0
    sys.stdout.flush()  # a full disk behind > is found here
    return code
  except InputError as error:
    print(f"dlm-jax {verb}: {one_line(str(error))}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    again = "; the same command goes on from what it finished" if verb in _RESUME else ""
    print(f"\ndlm-jax {verb}: interrupted{again}.", file=sys.stderr)
    return 130
  except BrokenPipeError:  # … | head
    _drop_output()
    return 0
  except Exception as error:
    if (why := disk.refusal(error)) is None:
      raise
    place = getattr(error, "filename", None)
    print(f"dlm-jax {verb}: {one_line(f'{place}: {why}' if place else why)}.", file=sys.stderr)
    try:
      sys.stdout.flush()
    except OSError:
      _drop_output()
    return 2


def _drop_output() -> None:
  """Let what is left to print go nowhere; Python would try again at its end."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
  """Entry point of the console script."""
  sys.exit(main())
