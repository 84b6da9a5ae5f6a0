# SPDX-License-Identifier: Apache-2.0
"""Denoising made visible: one text per step, newly revealed tokens highlighted."""

import numpy as np
from jaxtyping import Int

_NEW, _DIM, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def terminal(
  trace_KL: Int[np.ndarray, "K L"], tokenizer, *, colour: bool = True, mask: str = "·"
) -> str:
  """Return the states of one sequence, one paragraph per step, as text for a terminal.

  Args:
    trace_KL: ids after every step of one sequence; tokens only, never logits.
    tokenizer: turns ids into text; its `mask_id` marks what is still hidden.
    colour: highlight what a step revealed, with ANSI codes.
    mask: shown for a hidden token.
  """
  paragraphs, before_L = [], np.full(trace_KL.shape[1], tokenizer.mask_id)
  for step, row_L in enumerate(np.asarray(trace_KL), start=1):
    hidden = int(np.sum(row_L == tokenizer.mask_id))
    head = f"step {step}: {len(row_L) - hidden} of {len(row_L)} tokens"
    if colour:
      head = f"{_DIM}{head}{_RESET}"
    paragraphs.append(f"{head}\n{_paint(row_L, before_L, tokenizer, colour, mask)}")
    before_L = row_L
  return "\n\n".join(paragraphs)


def _paint(row_L, before_L, tokenizer, colour, mask):
  """Decode runs of equal state; a run, not a token: characters may span several tokens."""
  hidden_L, new_L = row_L == tokenizer.mask_id, row_L != before_L
  kind_L = np.where(hidden_L, 0, np.where(new_L, 2, 1))
  pieces, start = [], 0
  for end in range(1, len(row_L) + 1):
    if end < len(row_L) and kind_L[end] == kind_L[start]:
      continue
    text = mask * (end - start) if hidden_L[start] else tokenizer.decode(row_L[start:end])
    pieces.append(f"{_NEW}{text}{_RESET}" if colour and kind_L[start] == 2 else text)
    start = end
  return "".join(pieces)
