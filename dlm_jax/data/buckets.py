# SPDX-License-Identifier: Apache-2.0
"""From which bucket each batch of a stream comes: in proportion to the records, at no cost to seek.

Sequences of one batch have one length, so a stream over several lengths is one endless stream of
batches per bucket, and a schedule that says which of them is next. With n_b records in bucket b and
batches of B sequences

  when epoch e begins, bucket b has given ⌊e n_b / B⌋ batches

and within an epoch the batches of all buckets come in a pseudo-random order of their own. So after
e epochs every bucket's records were read e times, but for less than one batch, whatever their
numbers are; and the bucket of any batch and its place in that bucket's stream are computed, not
remembered.
"""

import functools

import numpy as np
from jaxtyping import Int


class Schedule:
  """Map the number of a batch to (bucket, number of the batch within that bucket's stream).

  Args:
    records: records by bucket; some may be 0, not all.
    batch_size: sequences in a batch.
    seed: of the order within an epoch.
    shuffle: False takes the buckets of an epoch one after the other.

  Example:
    >>> schedule = Schedule((8, 4), batch_size=4, seed=0, shuffle=False)
    >>> [schedule(n) for n in range(6)]
    [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1)]
  """

  def __init__(self, records: tuple[int, ...], batch_size: int, seed: int, shuffle: bool = True):
    self._records, self._size = tuple(records), batch_size
    self._seed, self._shuffle = seed, shuffle
    self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)

  def __call__(self, number: int) -> tuple[int, int]:
    # Never too high; too low by less than one batch per bucket.
    epoch = number * self._size // sum(self._records)
    while self.batches_before(epoch + 1) <= number:
      epoch += 1
    which_N, place_N = self._epoch(epoch)
    within = number - self.batches_before(epoch)
    return int(which_N[within]), int(place_N[within])

  def batches_before(self, epoch: int) -> int:
    """Return how many batches the epochs before this one hold."""
    return sum(self._given(epoch))

  def _given(self, epoch: int) -> list[int]:
    return [epoch * records // self._size for records in self._records]

  def _make_epoch(self, epoch: int) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Return bucket and place in its stream of every batch of an epoch."""
    first, end = self._given(epoch), self._given(epoch + 1)
    counts = [high - low for low, high in zip(first, end, strict=True)]
    which_N = np.repeat(np.arange(len(counts)), counts)
    place_N = np.concatenate([np.arange(*span) for span in zip(first, end, strict=True)])
    if self._shuffle:
      # The raw stream of a bit generator is the same in every version of numpy; a shuffle is not.
      raw_N = np.random.Philox(key=[self._seed, epoch]).random_raw(len(which_N))
      order_N = np.argsort(raw_N, kind="stable")
      # Only the buckets change places: within one the batches stay in order.
      which_N = which_N[order_N]
      place_N = place_N[np.argsort(np.argsort(which_N, kind="stable"), kind="stable")]
    return which_N, place_N
