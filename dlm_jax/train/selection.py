# SPDX-License-Identifier: Apache-2.0
"""Which state of a distillation to keep, and when to stop.

A student that is trained past its useful point keeps lowering its generative perplexity by
repeating itself; the entropy of its samples shows it. So the best state is the one of lowest score
among those whose entropy is within `max_entropy_drop` nats of the teacher's, and training stops
when the entropy has left that band for good.

The score is GenPPL itself ("genppl"), or what is left of it at one entropy ("matched"): log GenPPL
minus that of the teacher, at the temperature that gives it the student's entropy. Then a student
that has only narrowed has the score 0, and none is kept that is not below 0 by two standard errors:
until there is one, the start is the best.
"""

import dataclasses

from dlm_jax.errors import check_choice

RULES = ("matched", "genppl")


@dataclasses.dataclass(kw_only=True)
class Selection:
  """Follow evaluations and decide.

  Attributes:
    select: what the score is: "matched" or "genppl".
    max_entropy_drop: allowed drop below the teacher's entropy, nats.
    patience: consecutive evaluations outside the band after which training stops.
    best: (step, score, entropy drop) so far, or None.
    outside: consecutive evaluations outside the band so far.
  """

  select: str = "genppl"
  max_entropy_drop: float = 0.25
  patience: int = 3
  best: tuple[int, float, float] | None = None
  outside: int = 0

  def __post_init__(self):
    check_choice("evaluate.select", self.select, RULES)

  def update(self, step: int, score: float, entropy_drop: float, error: float = 0.0) -> bool:
    """Take in an evaluation; return whether it is the best so far.

    Args:
      step: of training.
      score: lower is better; NaN never is the best.
      entropy_drop: nats below the teacher.
      error: standard error of a "matched" score.
    """
    inside = entropy_drop <= self.max_entropy_drop
    self.outside = 0 if inside else self.outside + 1
    if self.best is None:
      better = inside and score == score
    else:
      real = self.select == "genppl" or score < -2 * error
      better = inside and real and score < self.best[1]
    if better:
      self.best = (step, score, entropy_drop)
    return better

  @property
  def stop(self) -> bool:
    """Whether the entropy has collapsed."""
    return self.outside >= self.patience

  def to_json(self) -> dict:
    """Return what a checkpoint must keep."""
    best = list(self.best) if self.best else None
    return {"best": best, "outside": self.outside, "select": self.select}

  def from_json(self, state: dict) -> None:
    """Take back what `to_json` returned; a best one by another rule is none."""
    same = state.get("select", "genppl") == self.select
    self.best = tuple(state["best"]) if state["best"] and same else None
    self.outside = state["outside"]
