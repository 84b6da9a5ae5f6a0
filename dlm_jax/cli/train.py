# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax train`: teachers, judges and students alike; the config names the objective."""

from etils import epath

from dlm_jax import mesh
from dlm_jax.cli import flags
from dlm_jax.experiment import build, plan
from dlm_jax.experiment.run import train


def main(argv: list[str]) -> None:
  """Parse flags and train, or show what would be trained."""
  parser = flags.Parser(
    "train",
    "Train what a config describes. Run it again on the same workdir to resume.\n\n"
    "The log shows the loss of every trained tree. IDLM's `fake/loss` is the fake network's own,\n"
    "on samples of a student that changes: it may rise, and large values are no fault. What tells\n"
    "of progress is GenPPL with entropy of samples, measured every evaluate.every steps.",
    """
dlm-jax train --config=novels_teacher --workdir=runs/novels_teacher
dlm-jax train --config=novels_idlm --workdir=runs/novels_idlm --config.optim.lr=3e-6
dlm-jax train --config=owt_teacher --dry_run
""",
  )
  flags.add_config(parser)
  parser.add_argument("--workdir", help="where checkpoints and metrics go")
  parser.add_argument(
    "--dry_run", action="store_true", help="show shapes, parameters, shardings, memory; no data"
  )
  parser.add_argument("--distributed", action="store_true", help="one of several hosts")
  parser.add_argument("--wandb_project", default="", help="also log to Weights & Biases")
  namespace = parser.parse(argv)
  config = flags.load_config(namespace)
  if config is None:
    return
  if namespace.distributed:
    mesh.start_distributed()
  if namespace.dry_run:
    from dlm_jax.experiment import dry_run

    read = plan.read(config)
    print(dry_run.describe(read, vocab_size=build.vocabulary(read)))
    return
  if not namespace.workdir:
    parser.error("--workdir is required")
  result = train(config, namespace.workdir, wandb=namespace.wandb_project)
  where = epath.Path(namespace.workdir)
  if result.reason == "interrupted":
    print(f"interrupted at step {result.step}; run the same command to resume.")
  else:
    kept = where / "best" if (where / "best").exists() else where / "final"
    print(f"{result.reason} at step {result.step}; the network is in {kept}")
