# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a distillation to keep, and when to stop.

A student that is trained past its useful point keeps lowering its generative perplexity by
repeating itself; the entropy of its samples shows it. So the best checkpoint is the one of lowest
GenPPL among those whose entropy is within `max_entropy_drop` nats of the reference (the teacher),
and training stops when the entropy has left that band for good.
"""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class Selection:
  """Follow evaluations and decide.

  Attributes:
    reference_entropy: of the teacher's samples at the same number of evaluations, nats.
    max_entropy_drop: allowed drop below it, nats.
    patience: consecutive evaluations outside the band after which training stops.
    best: (step, GenPPL, entropy) so far, or None.
    outside: consecutive evaluations outside the band so far.
  """

  reference_entropy: float
  max_entropy_drop: float = 0.25
  patience: int = 3
  best: tuple[int, float, float] | None = None
  outside: int = 0

  def update(self, step: int, genppl: float, entropy: float) -> bool:
    """Take in an evaluation; return whether it is the best so far."""
    inside = entropy >= self.reference_entropy - self.max_entropy_drop
    self.outside = 0 if inside else self.outside + 1
    better = inside and (self.best is None or genppl < self.best[1])
    if better:
      self.best = (step, genppl, entropy)
    return better

  @property
  def stop(self) -> bool:
    """Whether the entropy has collapsed."""
    return self.outside >= self.patience

  def state(self) -> dict:
    """Return what a checkpoint must keep."""
    return {"best": list(self.best) if self.best else None, "outside": self.outside}

  def restore(self, state: dict) -> None:
    """Take back what `state` returned."""
    self.best = tuple(state["best"]) if state["best"] else None
    self.outside = state["outside"]
