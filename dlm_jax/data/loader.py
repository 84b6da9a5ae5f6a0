# SPDX-License-Identifier: Apache-2.0
"""Batches for training (endless, shuffled, resumable) and for evaluation (finite, in order).

A batch is a `Record`: the dataset's features by name, each [B, L].

Training reads one endless global stream of records: epoch after epoch, each in a pseudo-random
order of its own that is computed, not stored. The global batch of step n is records [n·B, (n+1)·B)
of that stream, and host h of H reads rows [h·B/H, (h+1)·B/H) of it. Hence batch n depends on the
dataset, the seed and B alone: not on the number of hosts, threads or restarts, and any step can be
reached at once.

A dataset of documents is one such stream per bucket. `buckets` says whose turn it is; a batch is
padded to its bucket's length and no further.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from dlm_jax import draw, fields
from dlm_jax.arrays import Record
from dlm_jax.data import buckets, intact
from dlm_jax.data.dataset import FEATURES, Dataset, Info, Path, open_dataset
from dlm_jax.errors import InputError

# Decoding is Python under the interpreter lock: a second thread only hides the wait for the disk.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


_CACHE_BYTES = 2**31  # splits up to this size are kept in memory once they were read
_ENDLESS = 2**60  # batches


class _Records:
  """Records of a TFDS data source as features of [L], for grain.

  Decoding a record costs 65 µs of Python, so a small split is remembered: from the second epoch on
  the loader is ten times faster.

  Args:
    source: of the records.
    info: of the dataset.
    length: L.
    chosen_N: indices of the records; None: all.
  """

  def __init__(self, source, info: Info, length: int, chosen_N=None):
    self._source, self._info, self._length = source, info, length
    self._chosen_N = range(len(source)) if chosen_N is None else chosen_N
    size, dtypes = len(self._chosen_N), {name: FEATURES[name] for name in info.features}
    small = sum(np.dtype(d).itemsize for d in dtypes.values()) * length * size <= _CACHE_BYTES
    self._cache = {n: np.empty((size, length), d) for n, d in dtypes.items()} if small else None
    self._known_N = np.zeros(size, bool)

  def __len__(self) -> int:
    return len(self._chosen_N)

  def stored(self, index: int) -> int:
    """Return the place of a record in the whole split."""
    return int(self._chosen_N[index])

  def __getitem__(self, index: int) -> Record:
    if self._known_N[index]:
      return {name: cache_NL[index] for name, cache_NL in self._cache.items()}
    stored = self._source[self.stored(index)]
    if lacking := [name for name in self._info.features if name not in stored]:
      raise InputError(
        f"dataset.json says that records hold {lacking[0]!r}, and record {self.stored(index)} does "
        f"not; {intact.ADVICE}"
      )
    record = {name: self._padded(name, stored[name]) for name in self._info.features}
    if self._cache is not None:  # the flag last: another thread may be reading
      for name, feature_L in record.items():
        self._cache[name][index] = feature_L
      self._known_N[index] = True
    return record

  def _padded(self, name: str, feature_L: np.ndarray) -> np.ndarray:
    """Fill a shorter record up; padding is never valid."""
    missing = self._length - len(feature_L)
    if not missing:
      return feature_L
    if missing < 0 or self._info.pad_id is None:
      raise InputError(
        f"a record holds {len(feature_L)} {name} where dataset.json says {self._length}; "
        f"{intact.ADVICE}"
      )
    fill = self._info.pad_id if name == "tokens" else 0
    return np.pad(feature_L, (0, missing), constant_values=fill)


class _Mixed:
  """The batches of several buckets as one sequence, for grain.

  Args:
    parts: batches by bucket, endless; None for a bucket without records.
    schedule: of groups of batches.
    together: batches per group.
    groups: number of groups.
  """

  def __init__(self, parts, schedule: buckets.Schedule, together: int, groups: int):
    self._parts, self._schedule = parts, schedule
    self._together, self._groups = together, groups

  def __len__(self) -> int:
    return self._groups * self._together

  def __getitem__(self, number: int) -> Record:
    group, within = divmod(int(number), self._together)
    bucket, place = self._schedule(group)
    return self._parts[bucket][place * self._together + within]


class Loader:
  """An iterator over records of [B / hosts, L] with an exact, constant-time resume.

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

  def __iter__(self) -> Iterator[Record]:
    return self

  def __next__(self) -> Record:
    record = next(self._iterator)
    self._step += 1
    return record

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


def _split(dataset: Dataset, split: str) -> list[_Records]:
  """Return the records of a split by bucket; one bucket unless it is packed as documents."""
  if split not in dataset.splits:
    raise InputError(
      f"split={split!r} is not in {dataset.directory}; it has {', '.join(dataset.splits)}."
    )
  info, source = dataset.info, dataset.splits[split]
  if info.packing != "documents":
    return [_Records(source, info, info.length)]
  which_N = np.searchsorted(info.buckets, dataset.lengths(split))
  return [
    _Records(source, info, length, np.flatnonzero(which_N == bucket))
    for bucket, length in enumerate(info.buckets)
  ]


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise InputError(f"batch_size={batch_size} is not positive; use 1 or more.")


def make(
  dataset: Dataset | Path,
  split: str,
  *,
  batch_size: int,
  seed: int,
  shuffle: bool = True,
  repeat: bool = True,
  host: int = 0,
  hosts: int = 1,
  together: int = 1,
) -> Loader:
  """Open the training stream of one host.

  Of a dataset packed as documents every batch holds records of one bucket, padded to its length;
  buckets are drawn in proportion to their records, see `buckets`.

  Args:
    dataset: opened, or its directory.
    split: "train" or "validation".
    batch_size: B, sequences in the global batch.
    seed: of the order, a whole number of 64 bits, negative or not; each epoch gets an order of its
      own.
    shuffle: False reads in stored order.
    repeat: True never ends: the tail of an epoch is completed from the next one. False ends after
      the last whole global batch of one epoch; the rest of the records is not read.
    host: index of this host.
    hosts: number of hosts; each yields B / hosts rows of every global batch.
    together: so many batches in a row come from one bucket: what one training step takes.

  Raises:
    InputError: not a prepared directory, no such split, batch_size not divisible by hosts, host
      out of range, a seed of more than 64 bits, or, without repeat, fewer than B records.

  Example:
    >>> import pathlib, tempfile
    >>> from dlm_jax.data import builder, sources, tokenizers
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("one", "two"):
    ...   size = (folder / f"{name}.txt").write_text("to be or not to be, " * 20)
    >>> source = sources.open_source(f"files:{folder}/*.txt", validation=f"{folder}/two.txt")
    >>> made = builder.prepare(source, tokenizers.Bytes(), 64, folder / "data", progress=False)
    >>> record = next(make(made.directory, "train", batch_size=4, seed=0))
    >>> record["tokens"].shape
    (4, 64)
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
  seed = fields.SEED.check("loader.seed", seed)
  order = draw.fold_32(seed)  # grain takes no more
  dataset = open_dataset(dataset)
  info, parts = dataset.info, _split(dataset, split)
  count, most = sum(map(len, parts)), max(map(len, parts))
  if not repeat and most < batch_size:
    raise InputError(
      f"loader.batch_size={batch_size} is larger than split {split!r} with {most} records; "
      f"use {most} or less, or repeat=True."
    )

  def batches(records, repeat):
    stream = grain.MapDataset.source(records).seed(order)
    stream = stream.shuffle() if shuffle else stream
    stream = stream.repeat() if repeat else stream[: len(records) // batch_size * batch_size]
    # Local batch k is rows k·B/H... of the stream, so host h's are k = h, h + H, h + 2H, ...
    return stream.batch(batch_size // hosts, drop_remainder=True)[host::hosts]

  identity = {
    "split": split,
    "batch_size": batch_size,
    "seed": seed,
    "shuffle": shuffle,
    "repeat": repeat,
    "records": count,
    "length": info.length,
    "tokenizer_fingerprint": info.tokenizer_fingerprint,
  }
  if info.packing != "documents":
    return Loader(batches(parts[0], repeat), identity)
  records = [len(part) for part in parts]
  schedule = buckets.Schedule(tuple(records), batch_size * together, order, shuffle)
  streams = [batches(part, True) if len(part) else None for part in parts]
  groups = _ENDLESS // together if repeat else schedule.batches_before(1)
  identity |= {"buckets": list(info.buckets), "bucket_records": records, "together": together}
  mixed = grain.MapDataset.source(_Mixed(streams, schedule, together, groups))
  return Loader(mixed, identity)


def evaluation_groups(
  dataset: Dataset | Path, split: str, limit: int | None = None
) -> list[Record]:
  """Return the first records of a split, [N, L]: of documents one group per bucket, else one.

  Buckets without a record among the first `limit` are left out; within a bucket the order is the
  stored one. No record is dropped and none is padded beyond its bucket.

  Args:
    dataset: opened, or its directory.
    split: "train" or "validation".
    limit: at most so many records; None for all.

  Raises:
    InputError: not a prepared directory, or no such split.
  """
  if limit is not None and limit < 1:
    raise InputError(f"limit={limit} records is not positive; use 1 or more, or None for all.")
  dataset = open_dataset(dataset)
  groups = []
  for records in _split(dataset, split):
    asked = itertools.takewhile(
      lambda i, records=records: limit is None or records.stored(i) < limit, range(len(records))
    )
    if chosen := [records[i] for i in asked]:
      groups.append({name: np.stack([r[name] for r in chosen]) for name in dataset.info.features})
  return groups


def features(groups: list[Record], *names: str) -> list[Any]:
  """Return features as the measures of `evaluate` take them: an array, or of several groups a list.

  Absent ones are None.
  """
  found = []
  for name in names:
    arrays = [group[name] for group in groups] if name in groups[0] else None
    found.append(arrays[0] if arrays is not None and len(arrays) == 1 else arrays)
  return found


def evaluation_batches(
  dataset: Dataset | Path, split: str, batch_size: int, limit: int | None = None
) -> Iterator[Record]:
  """Return the whole batches of a split in stored order, [batch_size, L].

  The records that fill no batch are dropped: every batch has the one shape that was compiled, and
  no padding enters an average. Hosts all get the same batches.

  Args:
    dataset: opened, or its directory.
    split: "train" or "validation".
    batch_size: sequences per batch.
    limit: at most so many batches; None for all.

  Raises:
    InputError: not a prepared directory, no such split, not one whole batch in it, or a dataset of
      documents: see `evaluation_groups`.
  """
  _check_batch_size(batch_size)
  if limit is not None and limit < 1:
    raise InputError(f"limit={limit} batches is not positive; use 1 or more, or None for all.")
  dataset = open_dataset(dataset)
  if dataset.info.packing == "documents":
    raise InputError(
      f"{dataset.directory} holds documents of several lengths, not batches of one length."
    )
  (records,) = _split(dataset, split)
  batches = len(records) // batch_size
  if not batches:
    raise InputError(
      f"batch_size={batch_size} is larger than split {split!r} with {len(records)} records; use "
      f"{len(records)} or less."
    )
  stream = grain.MapDataset.source(records).batch(batch_size, drop_remainder=True)
  return itertools.islice(iter(stream.to_iter_dataset(_READ)), limit)
