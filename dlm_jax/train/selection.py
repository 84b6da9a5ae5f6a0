# SPDX-License-Identifier: Apache-2.0
"""Which state of a distillation to keep, and when to stop.

A student that is trained past its useful point keeps lowering its generative perplexity by
repeating itself; the entropy of its samples shows it. So the best state is the one of lowest
GenPPL among those whose entropy is within `max_entropy_drop` nats of the teacher's, and training
stops when the entropy has left that band for good.
"""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class Selection:
  """Follow evaluations and decide.

  Attributes:
    max_entropy_drop: allowed drop below the teacher's entropy, nats.
    patience: consecutive evaluations outside the band after which training stops.
    best: (step, GenPPL, entropy drop) so far, or None.
    outside: consecutive evaluations outside the band so far.
  """

  max_entropy_drop: float = 0.25
  patience: int = 3
  best: tuple[int, float, float] | None = None
  outside: int = 0

  def update(self, step: int, genppl: float, entropy_drop: float) -> bool:
    """Take in an evaluation; return whether it is the best so far."""
    inside = entropy_drop <= self.max_entropy_drop
    self.outside = 0 if inside else self.outside + 1
    better = inside and (self.best is None or genppl < self.best[1])
    if better:
      self.best = (step, genppl, entropy_drop)
    return better

  @property
  def stop(self) -> bool:
    """Whether the entropy has collapsed."""
    return self.outside >= self.patience

  def to_json(self) -> dict:
    """Return what a checkpoint must keep."""
    return {"best": list(self.best) if self.best else None, "outside": self.outside}

  def from_json(self, state: dict) -> None:
    """Take back what `to_json` returned."""
    self.best = tuple(state["best"]) if state["best"] else None
    self.outside = state["outside"]
