# SPDX-License-Identifier: Apache-2.0
"""What a host does between rounds: it tells text as it is decided, and ends rows at stop texts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from dlm_jax import sample
from dlm_jax.text import stops
from dlm_jax.text.requests import Plan

_STOP = 1  # the reason of `sample.Info`
_UNFINISHED = "\ufffd"  # a character of which not all bytes are there


def rows_of(tokens_BL: ArrayLike, prompt_B: ArrayLike, lengths_B: ArrayLike) -> list[list[int]]:
  """Return the ids behind each prompt."""
  return [
    tokens_L[start:stop].tolist()
    for tokens_L, start, stop in zip(
      *map(np.asarray, (tokens_BL, prompt_B, lengths_B)), strict=True
    )
  ]


class Follow:
  """Watches decided text for stop texts, and reports it piece by piece.

  What may turn out otherwise waits: an unfinished character, the beginning of a stop text.

  Args:
    text: of decided ids and stop ids.
    plan: what is decoded.
    on_text: see `TextDecoder.generate`; None: nothing is reported.
  """

  def __init__(
    self,
    text: Callable[[Sequence[int], Sequence[int]], str],
    plan: Plan,
    on_text: Callable[[int, str, bool], None] | None,
  ):
    self._text, self._plan, self._on_text = text, plan, on_text
    rows = len(plan.lengths_B)
    self._told, self._ended = [""] * rows, np.zeros(rows, bool)
    self._stop_texts = plan.stop_texts or ((),) * rows
    self._fewest = np.asarray(plan.options.minimum_B).tolist()

  def done(self, done: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what tells which rows are done, those that a stop text has ended among them."""
    return lambda state: np.asarray(done(state)) | self._ended

  def __call__(self, tokens_BL, lengths_B) -> None:
    limits_B = np.asarray(self._plan.limits_B)
    rows = rows_of(tokens_BL, self._plan.lengths_B, lengths_B)
    for number, (row, stop_ids) in enumerate(zip(rows, self._plan.stop_ids, strict=True)):
      kept, text = self._cut(number, row)
      ended = lengths_B[number] >= limits_B[number] or bool(row and row[-1] in stop_ids)
      self._tell(number, text, bool(ended) or kept is not None)

  def finish(self, rows: list[list[int]], info: sample.Info):
    """Report what is left; return rows and texts up to their stop texts, and what is known."""
    cuts = [self._cut(number, row) for number, row in enumerate(rows)]
    for number, (_, text) in enumerate(cuts):
      self._tell(number, text, True)
    rows = [row if kept is None else row[:kept] for row, (kept, _) in zip(rows, cuts, strict=True)]
    stopped_B = np.asarray([kept is not None for kept, _ in cuts])
    lengths_B = np.asarray(info.prompt_B) + [len(row) for row in rows]
    if stopped_B.any():
      kept_BL = np.arange(np.shape(info.step_BL)[1])[None, :] < lengths_B[:, None]
      info = info.replace(
        lengths_B=lengths_B.astype(np.int32),
        step_BL=np.where(kept_BL, info.step_BL, -1),
        log_prob_BL=np.where(kept_BL, info.log_prob_BL, 0.0),
        reason_B=np.where(stopped_B, _STOP, info.reason_B),
      )
    return rows, [text for _, text in cuts], info

  def _cut(self, number, row):
    """Return up to where a stop text keeps a row, None: there is none, and the row's text."""
    stop_ids = self._plan.stop_ids[number]
    decode = lambda ids: self._text(ids, stop_ids)  # noqa: E731
    found = stops.cut(decode, row, self._stop_texts[number], self._fewest[number])
    return (None, decode(row)) if found is None else found

  def _tell(self, number, text, ended):
    if self._ended[number]:
      return
    self._ended[number] = ended
    if self._on_text is None:
      return
    if not ended:
      text = stops.certain(text.rstrip(_UNFINISHED), self._stop_texts[number])
    told = self._told[number]
    piece = text[len(told) :] if text.startswith(told) else ""
    if piece or ended:
      self._told[number] = told + piece
      self._on_text(number, piece, ended)
