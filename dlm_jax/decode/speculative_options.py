# SPDX-License-Identifier: Apache-2.0
"""How a draft is made and verified: what is chosen once for a program, and checked."""

import dataclasses

from dlm_jax.decode.accept import FILLS
from dlm_jax.decode.interfaces import COLD
from dlm_jax.decode.rule import BlockRule
from dlm_jax.errors import InputError, check_choice
from dlm_jax.models import masks

VERIFICATIONS = ("stacked", "simsd")
STACKED_MOST = 8  # tokens per block up to which stacked states are nearly free
_OF_SIMSD = ("layout", "fill", "eos_min_prob")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeOptions:
  """How a draft is made and verified; rows choose the rest, see `RowOptions`.

  Attributes:
    target: the target's rule; also gives block length and mask.
    draft: the draft's rule; None: the target's. Another one never changes the text of "stacked",
      but agreement needs the same order of the same tokens.
    draft_temperature: of the draft in all rows; None: each row's own.
    verify: "stacked" or "simsd", see `speculative`; None: "stacked" up to 8 tokens per block.
    layout: of "simsd": "unified" or, as released, "published"; see `models.masks.simsd`.
    fill: of "simsd": what becomes of the tokens after a rejection, see `accept`.
    eos_min_prob: of "simsd": where the target has less than this on the stop ids, a token of its
      own after a rejection is never one of them; 0 is off.

  Raises:
    InputError: an option is unknown, or options do not go together.
  """

  target: BlockRule
  draft: BlockRule | None = None
  draft_temperature: float | None = None
  verify: str | None = None
  layout: str = "unified"
  fill: str = "truncate"
  eos_min_prob: float = 0.0

  def __post_init__(self):
    if self.draft is None:
      object.__setattr__(self, "draft", self.target)
    if self.verify is None:
      exact = self.target.block_length <= STACKED_MOST
      object.__setattr__(self, "verify", "stacked" if exact else "simsd")
    check_choice("verify", self.verify, VERIFICATIONS)
    check_choice("layout", self.layout, masks.LAYOUTS)
    check_choice("fill", self.fill, FILLS)
    for name in ("block_length", "mask_id"):
      ours, theirs = getattr(self.target, name), getattr(self.draft, name)
      if ours != theirs:
        raise InputError(f"draft.{name}={theirs} must be target.{name}={ours}.")
    self._check_numbers()

  def _check_numbers(self):
    if not 0 <= self.eos_min_prob <= 1:
      raise InputError(f"eos_min_prob={self.eos_min_prob} must be in 0 … 1.")
    temperature = self.draft_temperature
    if temperature is not None and not temperature >= 0:
      raise InputError(f"draft_temperature={temperature} must be 0 or more.")
    if not self.exact:
      if temperature is not None and temperature < COLD:
        raise InputError(
          f"draft_temperature={temperature:g} with verify='simsd': rows above temperature 0 accept "
          "by rejection, which needs drawn tokens; take one above 0, or leave it out."
        )
      return
    for name in _OF_SIMSD:
      if getattr(self, name) != getattr(type(self), name):
        raise InputError(
          f"{name}={getattr(self, name)!r} is an option of verify='simsd'; "
          f"verify='stacked' accepts what the target alone would decide. Leave it out."
        )

  @property
  def exact(self) -> bool:
    """Whether the text is the target's own, token for token; up to float32 rounding."""
    return self.verify == "stacked"
