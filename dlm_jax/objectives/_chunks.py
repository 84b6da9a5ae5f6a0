# SPDX-License-Identifier: Apache-2.0
"""How many positions of a dense [B, L, V] array may be alive at a time."""

_ENTRIES = 2**22  # per sequence: 16 MiB in float32


def positions_per_chunk(chunk: int | None, length: int, vocab_size: int) -> int:
  """Return the chunk asked for, or the largest divisor of L with [chunk, V] ≤ 2²² entries.

  Raises:
    ValueError: the chunk does not divide the length.
  """
  if chunk is None:
    most = min(max(1, _ENTRIES // vocab_size), length)
    return max(k for k in range(1, most + 1) if length % k == 0)
  if chunk < 1 or length % chunk:
    raise ValueError(f"objective.chunk={chunk} does not divide the sequence length {length}.")
  return chunk
