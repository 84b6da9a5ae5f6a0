# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax quickstart`: the main job with one command."""

import pathlib

from dlm_jax import quickstart
from dlm_jax.cli import flags


def main(argv: list[str]) -> int:
  """Parse flags and run; interrupted runs resume when called again."""
  parser = flags.Parser(
    "quickstart",
    "Distil a masked diffusion model of Python source into a few-step student on this machine,\n"
    "sample from both, measure both, write a report. Run it again to resume.",
    """
dlm-jax quickstart
dlm-jax quickstart --methods=idlm,didi --workdir=runs/both
dlm-jax quickstart --from_scratch --workdir=runs/scratch
""",
  )
  parser.free_overrides = True
  parser.add_argument("--workdir", default="runs/quickstart")
  parser.add_argument(
    "--from_scratch",
    action="store_true",
    help="also train teacher and judge (two hours on two cores)",
  )
  parser.add_argument(
    "--methods", default="idlm", help="idlm, didi or both: a student each, about 5 minutes more"
  )
  parser.add_argument("--nfes", type=flags.integers, default=list(quickstart.Options.nfes))
  parser.add_argument("--samples", type=int, default=64, help="per row of the table")
  parser.add_argument("--teacher_steps", type=int, default=3000, help="with --from_scratch")
  parser.add_argument("--judge_steps", type=int, default=1200, help="with --from_scratch")
  options = vars(parser.parse(argv))
  workdir = pathlib.Path(options.pop("workdir"))
  for name in ("nfes", "methods"):
    given = options[name]
    options[name] = tuple(given.split(",") if isinstance(given, str) else given)
  if not quickstart.run(quickstart.Options(workdir=workdir, **options)):
    print(f"interrupted; run `dlm-jax quickstart --workdir={workdir}` again to resume.")
    return 130
  return 0
