# SPDX-License-Identifier: Apache-2.0
"""Several evaluators as one."""

from typing import Any

from dlm_jax.objectives import TrainState


def export_nothing(*what: Any) -> None:
  """Keep nothing: for every evaluator but the first, which alone decides what is best."""


class Several:
  """Measure several things at once.

  Args:
    evaluators: by name; each one's scores have names of their own.
  """

  def __init__(self, evaluators: dict[str, Any]):
    self._evaluators = evaluators

  @property
  def stop(self) -> bool:
    """Whether one of them asks to stop."""
    return any(evaluator.stop for evaluator in self._evaluators.values())

  def to_json(self) -> dict:
    """Return what a checkpoint must keep."""
    return {name: evaluator.to_json() for name, evaluator in self._evaluators.items()}

  def from_json(self, state: dict) -> None:
    """Take back what `to_json` returned."""
    for name, evaluator in self._evaluators.items():
      evaluator.from_json(state.get(name, {}))

  def __call__(self, step: int, state: TrainState) -> tuple[dict[str, float], bool]:
    """Return all scores, and whether one of them asks to stop."""
    scores = {}
    for evaluator in self._evaluators.values():
      scores |= evaluator(step, state)[0]
    return scores, self.stop
