# SPDX-License-Identifier: Apache-2.0
"""Options of training methods: one frozen dataclass each, so that a default exists once.

A method's module calls its own `Options`; the fields are those of the config's `objective` group.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dlm_jax import fields
from dlm_jax.errors import InputError, hint


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOptions:
  """What every method can be told.

  Attributes:
    accumulate: micro-batches per update.
    ema_decay: of the moving average of every trained copy of the network, in [0, 1); 0 or None
      keeps none.

  Raises:
    InputError: a number out of range.
  """

  accumulate: int = 1
  ema_decay: float | None = 0.9999

  def __post_init__(self):
    decay = self.ema_decay
    if decay is not None and not 0 <= decay < 1:
      raise InputError(f"objective.ema_decay={decay} must be in [0, 1); 0: no average.")
    if not self.accumulate >= 1:
      raise InputError(f"objective.accumulate={self.accumulate} must be at least 1.")
    object.__setattr__(self, "ema_decay", decay or None)

  @classmethod
  def of(cls, given: Mapping[str, Any]) -> "MethodOptions":
    """Build the options from a config's fields.

    Raises:
      InputError: a field that the method does not have, or a value that does not fit.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in given:
      if name not in known:
        raise InputError(
          f"objective.{name} is no option of this method{hint(name, known)}; it has "
          f"{', '.join(known)}."
        )
    return fields.make(cls, given, "objective.", most=fields.MOST)

  @property
  def updates(self) -> dict[str, Any]:
    """What `update` is told: how many micro-batches, and the average's decay."""
    return {"accumulate": self.accumulate, "decay": self.ema_decay}

  def averaged(self, *trees: str) -> tuple[str, ...]:
    """Return these names of trees, or none where no average is kept."""
    return trees if self.ema_decay else ()

  def check_batch(self, size: int) -> None:
    """Raise InputError unless a global batch of so many sequences suits the method; any does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedOptions(MethodOptions):
  """What a method can be told whose loss makes dense arrays [B, L, V].

  Attributes:
    chunk: positions whose [B, chunk, V] arrays are alive at a time, recomputed in the backward
      pass; must divide L. 0 or None takes the most that stay below 2²² entries per sequence.
  """

  chunk: int | None = None

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "chunk", self.chunk or None)
