# SPDX-License-Identifier: Apache-2.0
"""The quick start without training: the shipped novels pair, sampled, measured and reported."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from dlm_jax import assets
from dlm_jax.data import builder
from dlm_jax.experiment.config import load_config
from dlm_jax.experiment.run import make_workdir
from dlm_jax.quickstart import comparison
from dlm_jax.text.denoiser import Pipeline

TEACHER, STUDENT, JUDGE = "novels-teacher", "novels-student", "novels-judge"
_CONFIG = "novels_small_idlm"  # of the student
_BETWEEN_BOOKS = "\n\n\n\n"
_TOLD = (
  "Here a teacher of English novels is compared with the student that was distilled from it "
  "{made}. Teacher, student and judge: shipped with the package."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What to do.

  Attributes:
    workdir: everything goes there; finished rows are not measured again.
    nfes: numbers of network evaluations of the frontier.
    samples: per row of the frontier; as many tokens as the quick start's 64.
    shown: samples of each model in the report.
    shown_nfe: at this number of evaluations.
  """

  workdir: pathlib.Path
  nfes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
  samples: int = 32
  shown: int = 8
  shown_nfe: int = 8


def run(options: Options, say: Callable[[str], None] = print) -> None:
  """Compare the shipped student with its teacher; write what the quick start writes.

  Raises:
    InputError: a bad option, an unwritable workdir, or a damaged network.
  """
  comparison.check_sizes(options.nfes, options.samples, options.shown)
  compared = comparison.Comparison(
    teacher=f"shipped:{TEACHER}",
    students={"student": f"shipped:{STUDENT}"},
    methods={"student": comparison.METHODS["idlm"]},
    judge=f"shipped:{JUDGE}",
    told=_TOLD,
    max_entropy_drop=load_config(_CONFIG).evaluate.max_entropy_drop,
    nfes=options.nfes,
    exact=False,
    samples=options.samples,
    shown=options.shown,
    shown_nfe=options.shown_nfe,
    command=comparison.command(options, "--pretrained"),
  )
  say("1/2  Networks: the shipped teacher and student of English novels, and their judge")
  for name in (TEACHER, STUDENT, JUDGE):
    assets.path(name)
  make_workdir(options.workdir)
  say("2/2  Frontier: quality of teacher and student against network evaluations")
  clock = comparison.Clock(options.workdir / "seconds.json")
  comparison.write(options.workdir, compared, held_out, clock)
  say(f"\n{(options.workdir / 'summary.txt').read_text()}")


def held_out(pipe: Pipeline) -> Int[np.ndarray, "N L"]:
  """Return the shipped validation novels in a model's tokens, as long as its samples.

  Args:
    pipe: a model with the judge's tokenizer.
  """
  words, books = pipe.tokenizer, assets.held_out(JUDGE).split(_BETWEEN_BOOKS)
  return np.stack(list(builder.pack(map(words.encode, books), pipe.length, words.eos_id)))
