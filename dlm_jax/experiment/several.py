# SPDX-License-Identifier: Apache-2.0
"""Which evaluators a config names, and several of them as one."""

from typing import Any

from dlm_jax.errors import InputError, check_choice
from dlm_jax.objectives import TrainState

MEASURES = ("samples", "likelihood")


def names(config: Any) -> tuple[str, ...]:
  """Return the evaluators of a run: those of `config.evaluate.measure`, else what suits the method.

  Raises:
    InputError: an unknown name, one twice, or samples where there is no teacher to compare with.
  """
  asked = tuple(config.evaluate.measure)
  if not asked:
    return ("samples",) if config.teacher.path else ("likelihood",)
  for name in asked:
    check_choice("evaluate.measure", name, MEASURES)
  if len(set(asked)) < len(asked):
    raise InputError(f"evaluate.measure={asked} names one twice; name each once.")
  if "samples" in asked and not config.teacher.path:
    raise InputError(
      "evaluate.measure: samples are compared with a teacher's, and teacher.path is empty; use "
      "likelihood."
    )
  return asked


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
