# SPDX-License-Identifier: Apache-2.0
"""What a sampler fills in, batch by batch: proteins of given lengths, answers to given prompts."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from dlm_jax.data import dataset
from dlm_jax.data.tokenizers import Esm, Tokenizer
from dlm_jax.errors import InputError
from dlm_jax.mesh import check_room


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

  @property
  def valid_NL(self) -> Bool[np.ndarray, "N L"]:
    """Where the residues of every sample are, in rows of the longest bucket."""
    position_L = np.arange(self.buckets[-1])[None]
    return (position_L > 0) & (position_L <= np.array(self.residues)[:, None])

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
  """Conversations whose answers are to be drawn, each as long as the one that it had.

  Attributes:
    tokenizer: of the data.
    tokens_NL: prompts, answers and padding.
    valid_NL: where the answers are.
    batch_size: samples drawn at a time.
  """

  tokenizer: Tokenizer
  tokens_NL: Int[np.ndarray, "N L"]
  valid_NL: Bool[np.ndarray, "N L"]
  batch_size: int

  @property
  def lengths(self) -> tuple[int, ...]:
    """The one length of all rows."""
    return (self.tokens_NL.shape[1],)

  def draw(
    self, run: Callable[[int, Int[np.ndarray, "B L"]], Int[np.ndarray, "B L"]]
  ) -> Int[np.ndarray, "N L"]:
    """Return the samples in their order; `run` as for `Templates.draw`."""
    open_NL = np.where(self.valid_NL, self.tokenizer.mask_id, self.tokens_NL).astype(np.int32)
    drawn_NL, count = np.empty_like(open_NL), len(open_NL)
    for number, start in enumerate(range(0, count, self.batch_size)):
      rows_B = np.arange(start, min(start + self.batch_size, count))
      drawn_BL = np.asarray(run(number, open_NL[np.resize(rows_B, self.batch_size)]))
      drawn_NL[rows_B] = drawn_BL[: len(rows_B)]
    return drawn_NL


def like_validation(
  data: dataset.Dataset | dataset.Path, samples: int, batch_size: int
) -> Templates | Answers:
  """Return templates like a dataset's first validation records, again if too few.

  Proteins get their lengths, answers their prompts and lengths.

  Args:
    data: the dataset, opened, or its directory.
    samples: number of them.
    batch_size: samples drawn at a time.

  Raises:
    InputError: not a prepared directory, one of running text, or more samples than memory holds.
  """
  opened = dataset.open_dataset(data)
  length = opened.info.length
  check_room(f"samples={samples} × length={length} tokens", 4 * samples * length)
  if opened.info.packing == "conversations":
    source = opened.splits["validation"]
    rows = [source[i] for i in np.resize(np.arange(len(source))[:samples], samples)]
    return Answers(
      tokenizer=opened.tokenizer(),
      tokens_NL=np.stack([row["tokens"] for row in rows]),
      valid_NL=np.stack([row["valid"] for row in rows]),
      batch_size=batch_size,
    )
  if opened.info.packing != "documents":
    raise InputError(
      f"{opened.directory} holds running text, not records with lengths or prompts of their own."
    )
  residues_N = np.resize(opened.lengths("validation")[:samples] - 2, samples)
  return Templates(
    tokenizer=opened.tokenizer(),
    residues=tuple(residues_N.tolist()),
    buckets=opened.info.buckets,
    batch_size=batch_size,
  )
