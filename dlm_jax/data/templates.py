# SPDX-License-Identifier: Apache-2.0
"""Sequences of given lengths to be generated: start, masks, end and padding, batch by batch."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from dlm_jax.data import dataset
from dlm_jax.data.tokenizers import Esm
from dlm_jax.errors import InputError


def bucket_of(residues: int, buckets: Sequence[int]) -> int:
  """Return the length that a sequence of so many residues was padded to in training.

  Raises:
    InputError: it is longer than any.
  """
  for length in buckets:
    if residues + 2 <= length:
      return length
  raise InputError(
    f"length={residues}: the longest sequence that this network was trained on has "
    f"{buckets[-1] - 2} residues; use that or less."
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Templates:
  """What a sampler fills in, cut into batches of one bucket each.

  Attributes:
    tokenizer: of proteins.
    residues: number of residues of every sample.
    buckets: lengths to pad to.
    batch_size: samples drawn at a time.
  """

  tokenizer: Esm
  residues: tuple[int, ...]
  buckets: tuple[int, ...]
  batch_size: int

  @property
  def lengths(self) -> tuple[int, ...]:
    """The buckets that are needed, rising."""
    return tuple(sorted({bucket_of(n, self.buckets) for n in self.residues}))

  def draw(
    self, run: Callable[[int, Int[np.ndarray, "B L"]], Int[np.ndarray, "B L"]]
  ) -> Int[np.ndarray, "N L"]:
    """Return the samples in their order, padded to the longest bucket.

    Args:
      run: (number of the batch, templates) -> tokens. All batches of a bucket have one shape: the
        last one is filled up with rows that are then left out.
    """
    lengths_N = np.array([bucket_of(n, self.buckets) for n in self.residues])
    tokens_NL = np.full((len(lengths_N), self.buckets[-1]), self.tokenizer.pad_id, np.int32)
    number = 0
    for length in self.lengths:
      rows_N = np.flatnonzero(lengths_N == length)
      for start in range(0, len(rows_N), self.batch_size):
        rows_B = rows_N[start : start + self.batch_size]
        filled_B = np.resize(rows_B, self.batch_size)
        templates = [self.tokenizer.template(self.residues[i], length) for i in filled_B]
        drawn_BL = np.asarray(run(number, np.stack(templates)))
        tokens_NL[rows_B, :length] = drawn_BL[: len(rows_B)]
        number += 1
    return tokens_NL


def like_validation(directory: dataset.Path, samples: int, batch_size: int) -> Templates:
  """Return templates with the lengths of a dataset's first validation records, again if too few.

  Raises:
    InputError: not a prepared directory, or not one of proteins.
  """
  opened = dataset.open_dataset(directory)
  if opened.info.packing != "documents":
    raise InputError(f"{directory} holds text, not sequences with lengths of their own.")
  residues_N = np.resize(opened.lengths("validation")[:samples] - 2, samples)
  return Templates(
    tokenizer=opened.tokenizer(),
    residues=tuple(residues_N.tolist()),
    buckets=opened.info.buckets,
    batch_size=batch_size,
  )
