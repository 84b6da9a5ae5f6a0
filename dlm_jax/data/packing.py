# SPDX-License-Identifier: Apache-2.0
"""Rows of several whole documents for block diffusion, each padded to whole blocks."""

from collections.abc import Sequence

import numpy as np

from dlm_jax.errors import InputError


def pack_blocks(
  documents: Sequence[Sequence[int]],
  length: int,
  block_length: int,
  pad_id: int,
  prompts: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
  """Pack documents in order into rows, as batches of `objectives.block_diffusion` hold them.

  A document is padded to a multiple of the block length with pads that are scored like its tokens:
  so a network learns what follows an end. What is left of a row is padding that is not scored, and
  a document of its own.

  Args:
    documents: ids of each; never cut.
    length: tokens per row, a multiple of the block length.
    block_length: tokens per block.
    pad_id: what pads are.
    prompts: leading tokens of each document that are given; None: none.

  Returns:
    "tokens" and "position" int32 [rows, length], "valid" bool [rows, length].

  Raises:
    InputError: the lengths do not fit.

  Reference: SDAR, arXiv 2510.06303; released code.
  """
  if block_length < 1 or length % block_length:
    raise InputError(f"length={length} must be a multiple of block_length={block_length}.")
  prompts = [0] * len(documents) if prompts is None else prompts
  rows: list[list[tuple[list[int], int]]] = []
  room = 0
  for ids, prompt in zip(documents, prompts, strict=True):
    padded = [*ids, *[pad_id] * (-len(ids) % block_length)]
    if not ids or len(padded) > length or not 0 <= prompt <= len(ids):
      raise InputError(
        f"a document of {len(ids)} tokens, {prompt} of them given, does not fit rows of {length}."
      )
    if len(padded) > room:
      rows.append([])
      room = length
    rows[-1].append((padded, prompt))
    room -= len(padded)
  tokens = np.full((len(rows), length), pad_id, np.int32)
  position, valid = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
  for row, parts in enumerate(rows):
    start = 0
    for ids, prompt in parts:
      now = slice(start, start + len(ids))
      tokens[row, now], position[row, now] = ids, np.arange(len(ids))
      valid[row, now] = np.arange(len(ids)) >= prompt
      start += len(ids)
    position[row, start:] = np.arange(length - start)
  return {"tokens": tokens, "position": position, "valid": valid}
