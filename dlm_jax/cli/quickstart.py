# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax quickstart`: the main job with one command."""

import argparse
import pathlib

from dlm_jax import remote
from dlm_jax.cli import flags
from dlm_jax.errors import InputError
from dlm_jax.quickstart import distil, shipped

_OF_TRAINING = ("from_scratch", "methods", "teacher_steps", "judge_steps")


def main(argv: list[str]) -> int:
  """Parse flags and run; interrupted runs resume when called again."""
  options = vars(_parser().parse(argv))  # only those that were given
  workdir = options.pop("workdir", None)
  if workdir and remote.is_remote(workdir):
    raise InputError(
      f"--workdir={workdir}: the quick start writes to a folder of this machine; name one and copy "
      "it afterwards, or use `dlm-jax train` and `frontier`, which write to stores."
    )
  if "nfes" in options:
    options["nfes"] = tuple(options["nfes"])
  if options.pop("pretrained", False):
    _check_no_training(options)
    folder = pathlib.Path(workdir or "runs/pretrained")
    shipped.run(shipped.Options(workdir=folder, **options))
    return 0
  folder = pathlib.Path(workdir or "runs/quickstart")
  if "methods" in options:
    options["methods"] = tuple(options["methods"].split(","))
  if not distil.run(distil.Options(workdir=folder, **options)):
    print(f"interrupted; run `dlm-jax quickstart --workdir={folder}` again to resume.")
    return 130
  return 0


def _check_no_training(options: dict) -> None:
  """Refuse what only training would use; leave the options that --pretrained takes."""
  overrides = options.pop("overrides")
  given = [f"--{name}" for name in _OF_TRAINING if name in options]
  given += [f"--config.{field}" for field in overrides]
  if given:
    raise InputError(
      f"--pretrained trains nothing and does not combine with {', '.join(given)}; leave out either."
    )


def _parser() -> flags.Parser:
  parser = flags.Parser(
    "quickstart",
    "Distil a masked diffusion model of Python source into a few-step student on this machine,\n"
    "sample from both, measure both, write a report. Run it again to resume.",
    """
dlm-jax quickstart
dlm-jax quickstart --pretrained
dlm-jax quickstart --methods=idlm,didi --workdir=runs/both
""",
  )
  parser.free_overrides = True
  parser.argument_default = argparse.SUPPRESS
  parser.add_argument("--workdir", help="default: runs/quickstart, or runs/pretrained")
  parser.add_argument(
    "--pretrained",
    action="store_true",
    help="train nothing: compare the shipped teacher and student of English novels",
  )
  parser.add_argument(
    "--from_scratch",
    action="store_true",
    help="also train teacher and judge (two hours on two cores)",
  )
  parser.add_argument(
    "--methods", help="idlm (default), didi or both: a student each, about 5 minutes more"
  )
  parser.add_argument(
    "--nfes", type=flags.integers, help="evaluations; default: 1,2,4,…,128, or …,32"
  )
  parser.add_argument("--samples", type=int, help="per row; default: 64, or 32 pretrained")
  parser.add_argument("--teacher_steps", type=int, help="with --from_scratch; default: 3000")
  parser.add_argument("--judge_steps", type=int, help="with --from_scratch; default: 1200")
  return parser
