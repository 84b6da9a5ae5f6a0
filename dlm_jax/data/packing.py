# SPDX-License-Identifier: Apache-2.0
"""From token ids to rows of one length: text end to end, conversations whole; and what is given.

The mask of what is given is made here and nowhere else, once: it travels with the tokens.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool

from dlm_jax.arrays import Record
from dlm_jax.errors import InputError


def learnt(tokens, tokenizer) -> Bool[np.ndarray, "..."]:
  """Return the feature "valid" of framed documents: False on the tokenizer's `given_ids`."""
  return ~np.isin(tokens, tokenizer.given_ids)


def pack(
  token_lists: Iterable[list[int]], length: int, eos_id: int, wrap: bool = True
) -> Iterator[np.ndarray]:
  """Cut a stream of documents into int32 [length] sequences, GPT-2 style.

  Every document gets the separator appended, all are concatenated, the stream is cut into pieces of
  length − 2 and each piece is framed by separators: [eos] + piece + [eos]. The tail that fills no
  piece is dropped, once per split; the public MDLM and Duo code drops one per 1000 documents.

  Args:
    token_lists: token ids per document, without separators.
    length: L.
    eos_id: the separator.
    wrap: False cuts pieces of `length` and adds no frame.

  Raises:
    InputError: no token of a document fits into `length`.

  Example:
    >>> [row.tolist() for row in pack([[1, 2], [3, 4, 5]], 5, 0)]
    [[0, 1, 2, 0, 0], [0, 3, 4, 5, 0]]
  """
  size = length - 2 if wrap else length
  if size < 1:
    raise InputError(
      f"length={length} leaves no room for text; use {3 if wrap else 1} or more (wrap={wrap})."
    )
  return _pack(token_lists, size, eos_id, wrap)


def _pack(token_lists, size, eos_id, wrap):
  pending = np.empty(0, np.int32)
  for tokens in token_lists:
    pending = np.concatenate([pending, np.asarray(tokens, np.int32), np.int32([eos_id])])
    whole = len(pending) // size * size
    rows = pending[:whole].reshape(-1, size)
    yield from np.pad(rows, ((0, 0), (1, 1)), constant_values=eos_id) if wrap else rows
    pending = pending[whole:]


def pack_blocks(
  documents: Iterable[tuple[Sequence[int], Sequence[bool]]],
  length: int,
  block_length: int,
  pad_id: int,
) -> Iterator[Record]:
  """Pack documents in order into rows that they share, each padded to whole blocks.

  A document is padded to a multiple of the block length with pads that are scored like its tokens:
  so a network learns what follows an end. What is left of a row is padding that is not scored, and
  a document of its own.

  Args:
    documents: ids of each, never cut, and which of them are learnt; the others are given.
    length: tokens per row, a multiple of the block length.
    block_length: tokens per block.
    pad_id: what pads are.

  Returns:
    Rows of "tokens", "position" and "segment" int32 [length], "valid" bool [length].

  Raises:
    InputError: the lengths do not fit.

  Reference: SDAR, arXiv 2510.06303; released code.

  Example:
    >>> row, = pack_blocks([([5, 6, 7], [False, True, True]), ([8], [True])], 6, 2, 0)
    >>> row["tokens"].tolist(), row["segment"].tolist()
    ([5, 6, 7, 0, 8, 0], [1, 1, 1, 1, 2, 2])
  """
  if block_length < 1 or length % block_length:
    raise InputError(
      f"data.length={length} must be a multiple of data.block_length={block_length}, 1 or more."
    )
  return _pack_blocks(documents, length, block_length, pad_id)


def _pack_blocks(documents, length, block_length, pad_id):
  parts, used = [], 0
  for ids, valid in documents:
    pads = -len(ids) % block_length
    if not ids or len(ids) + pads > length or len(valid) != len(ids):
      raise InputError(
        f"a document of {len(ids)} tokens, {len(valid)} of them marked, does not fit rows of "
        f"{length}."
      )
    if used + len(ids) + pads > length:
      yield _shared_row(parts, length, pad_id)
      parts, used = [], 0
    parts.append(([*ids, *[pad_id] * pads], [*valid, *[True] * pads]))
    used += len(ids) + pads
  if parts:
    yield _shared_row(parts, length, pad_id)


def _shared_row(parts, length, pad_id) -> Record:
  ids = [i for piece, _ in parts for i in piece]
  valid = [v for _, piece in parts for v in piece]
  row = padded_row(ids, valid, length, pad_id)
  position_L, segment_L, start = np.zeros(length, np.int32), np.zeros(length, np.int32), 0
  for number, (ids, _) in enumerate(parts, start=1):
    now = slice(start, start + len(ids))
    position_L[now], segment_L[now] = np.arange(len(ids)), number
    start += len(ids)
  position_L[start:] = np.arange(length - start)
  return {**row, "position": position_L, "segment": segment_L}


def padded_row(ids: Sequence[int], valid: Sequence[bool], length: int, pad_id: int) -> Record:
  """Return "tokens" and "valid" of one document, filled up with padding that is not scored."""
  tokens_L, valid_L = np.full(length, pad_id, np.int32), np.zeros(length, bool)
  tokens_L[: len(ids)], valid_L[: len(ids)] = ids, valid
  return {"tokens": tokens_L, "valid": valid_L}
