# SPDX-License-Identifier: Apache-2.0
"""How much faster a draft makes decoding, from the time of a pass and how often tokens agree.

The model: each of a block's positions is confirmed with probability a when it is tested, from left
to right; a round that fails emits one token of the target's and goes on in the same block.

Reference: SimSD, arXiv 2606.02544, truncated commits.
"""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
  """Decoding with a draft against static decoding of the target alone, batch 1.

  Attributes:
    acceptance: a.
    block_length: tokens per block.
    rounds: R, verifications per block.
    steps: S, draft passes per block.
    folded: True: encoding a finished block is part of another pass; False: it is one of its own.
    alone: tokens per second of the target alone, one token per pass.
    drafted: tokens per second with the draft.
  """

  acceptance: float
  block_length: int
  rounds: float
  steps: float
  folded: bool
  alone: float
  drafted: float

  @property
  def ratio(self) -> float:
    """Drafted over alone."""
    return self.drafted / self.alone


def rounds(size: int, acceptance: float) -> float:
  """Return the verifications that a block of so many tokens takes: 1 + (n − 1)(1 − a)."""
  return 1 + (size - 1) * (1 - acceptance)


@functools.cache
def draft_steps(size: int, acceptance: float) -> float:
  """Return the draft passes: what is left after a failed round is drafted again."""
  if not size:
    return 0.0
  again = sum(
    acceptance**kept * (1 - acceptance) * draft_steps(size - kept - 1, acceptance)
    for kept in range(size)
  )
  return size + again


def predict(
  acceptance: float, size: int, *, target: float, verify: float, draft: float, folded: bool = True
) -> Speedup:
  """Return what follows from times of passes.

  Args:
    acceptance: a, of a tested position.
    size: tokens per block.
    target: seconds of a pass of the target over a block.
    verify: seconds of a pass of the target that verifies one.
    draft: seconds of a pass of the draft over a block.
    folded: see `Speedup`.
  """
  times, steps = rounds(size, acceptance), draft_steps(size, acceptance)
  extra = 0 if folded else 1
  return Speedup(
    acceptance=acceptance,
    block_length=size,
    rounds=times,
    steps=steps,
    folded=folded,
    alone=size / ((size + extra) * target),
    drafted=size / ((steps + extra) * draft + times * verify + extra * target),
  )
