# SPDX-License-Identifier: Apache-2.0
"""Batches for training (endless, shuffled, resumable) and for evaluation (finite, in order).

Training reads one endless global stream of records: epoch after epoch, each in a pseudo-random
order of its own that is computed, not stored. The global batch of step n is records [n·B, (n+1)·B)
of that stream, and host h of H reads rows [h·B/H, (h+1)·B/H) of it. Hence batch n depends on the
dataset, the seed and B alone: not on the number of hosts, threads or restarts, and any step can be
reached at once.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from dlm_jax.data import builder
from dlm_jax.errors import InputError

# Decoding is Python under the interpreter lock: a second thread only hides the wait for the disk.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


_CACHE_BYTES = 2**31  # splits up to this size are kept in memory once they were read


class _Tokens:
  """The records of a TFDS data source as bare int32 [L], for grain.

  Decoding a record costs 65 µs of Python, so a small split is remembered: from the second epoch on
  the loader is ten times faster.
  """

  def __init__(self, source, length: int):
    self._source = source
    small = 4 * length * len(source) <= _CACHE_BYTES
    self._cache_NL = np.empty((len(source), length), np.int32) if small else None
    self._known_N = np.zeros(len(source), bool)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> np.ndarray:
    if self._known_N[index]:
      return self._cache_NL[index]
    tokens_L = self._source[index]["tokens"]
    if self._cache_NL is not None:  # the flag last: another thread may be reading
      self._cache_NL[index] = tokens_L
      self._known_N[index] = True
    return tokens_L


class Loader:
  """An iterator over int32 [B / hosts, L] with an exact, constant-time resume.

  The state counts the batches that the consumer has taken, whatever was prefetched beyond, and is
  the same on every host. It also names the stream, so that a state cannot silently be continued on
  other data.
  """

  def __init__(self, batches: grain.MapDataset, stream: dict[str, Any]):
    self._batches, self._stream = batches, stream
    self._start(0)

  def _start(self, step: int) -> None:
    # A slice of computed indices, so nothing before `step` is read.
    self._step = step
    self._iterator = iter(self._batches[step:].to_iter_dataset(_READ))

  def __iter__(self) -> Iterator[Int[np.ndarray, "B L"]]:
    return self

  def __next__(self) -> Int[np.ndarray, "B L"]:
    batch_BL = next(self._iterator)
    self._step += 1
    return batch_BL

  def position(self) -> dict[str, Any]:
    """Return a JSON-able state from which `seek` continues with the next batch."""
    return {"step": self._step, **self._stream}

  def seek(self, state: dict[str, Any]) -> None:
    """Continue behind the batch after which `state` was taken, on any number of hosts.

    Raises:
      InputError: the state belongs to other data, another seed or another batch size.
    """
    differing = [
      f"{key}={state.get(key)!r} (saved), {value!r} (now)"
      for key, value in self._stream.items()
      if state.get(key) != value
    ]
    step = state.get("step")
    if not isinstance(step, int) or step < 0:
      differing.append(f"step={step!r} (saved)")
    if differing:
      raise InputError(
        f"loader: the saved position belongs to another stream: {'; '.join(differing)}; restore "
        "these settings or start a new run."
      )
    self.close()
    self._start(step)

  def close(self) -> None:
    """Stop the reading threads."""
    self._iterator.close()


def _split(dataset: builder.Dataset, split: str):
  if split not in dataset.splits:
    raise InputError(
      f"split={split!r} is not in {dataset.directory}; it has {', '.join(dataset.splits)}."
    )
  return _Tokens(dataset.splits[split], dataset.info.length)


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise InputError(f"batch_size={batch_size} is not positive; use 1 or more.")


def make(
  directory: builder.Path,
  split: str,
  *,
  batch_size: int,
  seed: int,
  shuffle: bool = True,
  repeat: bool = True,
  host: int = 0,
  hosts: int = 1,
) -> Loader:
  """Open the training stream of one host.

  Args:
    directory: made by `builder.prepare`.
    split: "train" or "validation".
    batch_size: B, sequences in the global batch.
    seed: of the order; each epoch gets an order of its own.
    shuffle: False reads in stored order.
    repeat: True never ends: the tail of an epoch is completed from the next one. False ends after
      the last whole global batch of one epoch; the rest of the records is not read.
    host: index of this host.
    hosts: number of hosts; each yields B / hosts rows of every global batch.

  Raises:
    InputError: not a prepared directory, no such split, batch_size not divisible by hosts, host
      out of range, a seed outside 0..2³²−1, or, without repeat, fewer than B records.

  Example:
    >>> loader = make("runs/data", "train", batch_size=64, seed=0)
    >>> batch_BL = next(loader)
  """
  _check_batch_size(batch_size)
  if hosts < 1 or not 0 <= host < hosts:
    raise InputError(f"loader.host={host} is outside 0..hosts-1 with hosts={hosts}.")
  if batch_size % hosts:
    below = batch_size // hosts * hosts
    allowed = f"{below} or {below + hosts}" if below else f"{hosts}"
    raise InputError(
      f"loader.batch_size={batch_size} is not divisible by {hosts} hosts; use {allowed}."
    )
  if not 0 <= seed < 2**32:
    raise InputError(f"loader.seed={seed} is outside 0..2**32-1.")
  dataset = builder.open_dataset(directory)
  records = _split(dataset, split)
  if not repeat and len(records) < batch_size:
    raise InputError(
      f"loader.batch_size={batch_size} is larger than split {split!r} with {len(records)} records; "
      f"use {len(records)} or less, or repeat=True."
    )
  stream = grain.MapDataset.source(records).seed(seed)
  stream = stream.shuffle() if shuffle else stream
  stream = stream.repeat() if repeat else stream[: len(records) // batch_size * batch_size]
  # Local batch k is rows k·B/H... of the stream, so host h's are k = h, h + H, h + 2H, ...
  batches = stream.batch(batch_size // hosts, drop_remainder=True)[host::hosts]
  info = dataset.info
  return Loader(
    batches,
    {
      "split": split,
      "batch_size": batch_size,
      "seed": seed,
      "shuffle": shuffle,
      "repeat": repeat,
      "records": len(records),
      "length": info.length,
      "tokenizer_fingerprint": info.tokenizer_fingerprint,
    },
  )


def evaluation_batches(
  directory: builder.Path, split: str, batch_size: int, limit: int | None = None
) -> Iterator[Int[np.ndarray, "B L"]]:
  """Return the whole batches of a split in stored order, int32 [batch_size, L].

  The records that fill no batch are dropped: every batch has the one shape that was compiled, and
  no padding enters an average. Hosts all get the same batches.

  Args:
    directory: made by `builder.prepare`.
    split: "train" or "validation".
    batch_size: sequences per batch.
    limit: at most so many batches; None for all.

  Raises:
    InputError: not a prepared directory, no such split, or not one whole batch in it.
  """
  _check_batch_size(batch_size)
  if limit is not None and limit < 1:
    raise InputError(f"limit={limit} batches is not positive; use 1 or more, or None for all.")
  records = _split(builder.open_dataset(directory), split)
  batches = len(records) // batch_size
  if not batches:
    raise InputError(
      f"batch_size={batch_size} is larger than split {split!r} with {len(records)} records; use "
      f"{len(records)} or less."
    )
  stream = grain.MapDataset.source(records).batch(batch_size, drop_remainder=True)
  return itertools.islice(iter(stream.to_iter_dataset(_READ)), limit)
