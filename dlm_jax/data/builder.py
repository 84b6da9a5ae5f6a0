# SPDX-License-Identifier: Apache-2.0
"""Pack a corpus and keep it as a TFDS dataset (ArrayRecord), see `dataset`.

Text is concatenated and cut into sequences of one length. Proteins are packed as documents: one
record each, padded by the loader to the smallest bucket that holds it.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from dlm_jax.data.dataset import FORMAT, PACKINGS, Info, Path, SplitInfo, lengths_file, open_dataset
from dlm_jax.data.dataset import Dataset as Dataset
from dlm_jax.data.sources import SPLITS, Source
from dlm_jax.data.tokenizers import Tokenizer
from dlm_jax.errors import InputError

_DOCUMENTS = 64  # tokenised together: enough for all cores, small enough for a smooth progress bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """The outcome of `prepare`.

  Attributes:
    directory: where the dataset lies.
    info: what it holds.
    created: False if it was there already and nothing was done.
  """

  directory: str
  info: Info
  created: bool

  @property
  def message(self) -> str:
    """One line for the user."""
    splits = self.info.splits.items()
    counts = ", ".join(f"{n} {s.tokens:,} tokens" for n, s in splits)
    done = "prepared" if self.created else "already prepared with these settings, nothing to do"
    drops = [f"{n} {c:,} {why}" for n, s in splits for why, c in s.dropped.items()]
    left_out = f"; dropped: {', '.join(drops)}" if drops else ""
    return f"{self.directory}: {done} ({counts}, length {self.info.length}{left_out})."


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


class PackedTokens(tfds.core.GeneratorBasedBuilder):
  """The TFDS builder; `prepare` drives it. Records keep the order in which they were packed.

  The length is None where every record has its own.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, length: int | None, splits: dict[str, Iterator[np.ndarray]], **options):
    self._length, self._splits = length, splits
    super().__init__(**options)

  def _info(self):
    tokens = tfds.features.Tensor(shape=(self._length,), dtype=np.int32)
    return tfds.core.DatasetInfo(
      builder=self,
      description="Documents of token ids, packed into sequences of equal length."
      if self._length
      else "Documents of token ids, one a record.",
      features=tfds.features.FeaturesDict({"tokens": tokens}),
      disable_shuffling=True,  # the loader shuffles; evaluation wants the order of the text
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {name: self._generate_examples(name) for name in self._splits}

  def _generate_examples(self, name):
    for index, tokens in enumerate(self._splits[name]):
      yield index, {"tokens": tokens}

  def _log_download_bytes(self):
    """Stay silent where TFDS prints the path: it is temporary."""

  _log_download_done = _log_download_bytes


@dataclasses.dataclass
class _Count:
  documents: int = 0
  text_bytes: int = 0
  stream: int = 0  # tokens with separators, before cutting
  lengths: list[int] = dataclasses.field(default_factory=list)  # of the records
  too_long: int = 0

  def info(self, wanted: Info, dropped: dict[str, int]) -> SplitInfo:
    density, buckets = self.text_bytes / self.stream, ()
    if wanted.packing == "documents":
      density = self.text_bytes / (self.stream - self.documents)
      which_N = np.searchsorted(wanted.buckets, self.lengths)
      buckets = tuple(np.bincount(which_N, minlength=len(wanted.buckets)).tolist())
      if self.too_long:
        dropped = dropped | {f"longer than {wanted.length - 2}": self.too_long}
    elif wanted.wrap:
      # A record is charged with L − 2 tokens of the stream: the dropped tail takes its bytes along.
      density = density * (wanted.length - 2) / wanted.length
    return SplitInfo(
      records=len(self.lengths),
      tokens=sum(self.lengths),
      documents=self.documents,
      text_bytes=self.text_bytes,
      bytes_per_token=density,
      bucket_records=buckets,
      dropped=dropped,
    )


def _token_lists(source: Source, split: str, tokenizer: Tokenizer, count: _Count, bar):
  """Yield the token ids of every document of a split, keeping count; none at all is an error."""
  stream = iter(source.documents(split))
  while documents := list(itertools.islice(stream, _DOCUMENTS)):
    for document, tokens in zip(documents, tokenizer.encode_batch(documents), strict=True):
      size = len(document.encode())
      count.documents += 1
      count.text_bytes += size
      count.stream += len(tokens) + 1
      bar.update(size)
      yield tokens
  if not count.documents:
    raise InputError(
      f"the {split} split is empty: {source.describe()['spec']} holds no text for it; give more "
      "documents, cut them with document_separator, or name validation text with validation."
    )


def _documents(token_lists, split: str, wanted: Info, tokenizer: Tokenizer, count: _Count):
  """Yield a record for every document that fits into the last bucket; none at all is an error."""
  for tokens in token_lists:
    if len(tokens) > wanted.length - 2:
      count.too_long += 1
      continue
    count.lengths.append(len(tokens) + 2)
    yield np.array([tokenizer.cls_id, *tokens, tokenizer.eos_id], np.int32)
  if not count.lengths:
    raise InputError(
      f"none of the {count.documents} documents of the {split} split fits into data.length="
      f"{wanted.length} with its start and end; use a longer last bucket."
    )


def _rows(source: Source, split: str, tokenizer: Tokenizer, wanted: Info, count: _Count, bar):
  """Yield the packed rows of a split, keeping count; an empty split or no full row is an error."""
  bar.set_description(f"packing {split}")
  token_lists = _token_lists(source, split, tokenizer, count, bar)
  if wanted.packing == "documents":
    yield from _documents(token_lists, split, wanted, tokenizer, count)
    return
  for row in pack(token_lists, wanted.length, tokenizer.eos_id, wanted.wrap):
    count.lengths.append(wanted.length)
    yield row
  if not count.lengths:
    frame = 2 if wanted.wrap else 0
    raise InputError(
      f"length={wanted.length} is longer than the {split} split, which has only "
      f"{count.stream} tokens; use length <= {count.stream + frame} or give more text."
    )


def _build(source, tokenizer, wanted: Info, directory: pathlib.Path, progress: bool) -> Info:
  """Write everything into an empty directory; return `wanted` with its splits filled in."""
  counts = {split: _Count() for split in SPLITS}
  length = wanted.length if wanted.packing == "concatenate" else None
  with tqdm.tqdm(
    unit="B", unit_scale=True, total=wanted.source.get("bytes"), disable=None if progress else True
  ) as bar:
    rows = {s: _rows(source, s, tokenizer, wanted, counts[s], bar) for s in SPLITS}
    tfds.display_progress_bar(False)
    where = {"data_dir": directory, "file_format": "array_record"}
    try:
      builder = PackedTokens(length=length, splits=rows, **where)
      builder.download_and_prepare(download_dir=directory / "downloads")
    except RuntimeError as error:
      if "write() failed" in str(error):  # how the ArrayRecord writer reports a full disk
        raise OSError(0, str(error).partition("write() failed: ")[2].partition(";")[0]) from error
      raise
    finally:
      tfds.display_progress_bar(True)
  shutil.rmtree(directory / "downloads", ignore_errors=True)
  tokenizer.save(directory)
  left_out = getattr(source, "dropped", {})
  splits = {split: counts[split].info(wanted, left_out.get(split, {})) for split in SPLITS}
  info = dataclasses.replace(wanted, splits=splits)
  for split in SPLITS if wanted.packing == "documents" else ():
    lengths_file(directory, split).parent.mkdir(exist_ok=True)
    np.save(lengths_file(directory, split), np.array(counts[split].lengths, np.int32))
  paths = sorted(path for path in directory.rglob("*.*") if path.is_file())
  files = {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
  content = {"format": FORMAT, **info.content(), "files": files}
  text = json.dumps(content, indent=2, ensure_ascii=False)
  (directory / "dataset.json").write_text(text + "\n", encoding="utf-8")
  return info


def _version() -> str:
  try:
    return importlib.metadata.version("dlm_jax")
  except importlib.metadata.PackageNotFoundError:  # used from a source tree
    return "unknown"


def _existing(directory: pathlib.Path, wanted: Info) -> Info | None:
  """Return the dataset that is there already, None if there is nothing."""
  if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
    return None
  if not (directory / "dataset.json").is_file():
    raise InputError(f"{directory} exists and is not a prepared dataset; use a new directory.")
  info = open_dataset(directory).info
  # Through JSON, as the stored settings went: tuples become lists.
  wanted, found = json.loads(json.dumps(wanted.settings())), info.settings()
  if differing := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
    differences = ", ".join(f"{k}={found.get(k)!r} not {wanted.get(k)!r}" for k in differing)
    raise InputError(f"{directory} was prepared with {differences}; use another directory.")
  return info


def _checked_buckets(packing, buckets, length, tokenizer) -> tuple[int, ...]:
  """Return the buckets of a packing; complain about what does not fit together."""
  if packing not in PACKINGS:
    raise InputError(f"data.packing={packing!r} is unknown; use {' or '.join(PACKINGS)}.")
  framed = tokenizer.pad_id is not None
  if framed != (packing == "documents"):
    wanted = "documents" if framed else "concatenate"
    raise InputError(
      f"data.packing={packing!r} does not fit this tokenizer, which has "
      f"{'a' if framed else 'no'} start and padding; use data.packing={wanted!r}."
    )
  if packing == "concatenate":
    if buckets:
      raise InputError(f"data.buckets={buckets} are of data.packing='documents' only; leave it ().")
    return ()
  buckets = tuple(buckets) or (length,)
  rising = all(low < high for low, high in itertools.pairwise((2, *buckets)))
  if not rising or buckets[-1] != length:
    raise InputError(f"data.buckets={buckets} must rise, from 3 or more, to data.length={length}.")
  return buckets


def prepare(
  source: Source,
  tokenizer: Tokenizer,
  length: int,
  directory: Path,
  *,
  wrap: bool = True,
  packing: str = "concatenate",
  buckets: tuple[int, ...] = (),
  progress: bool = True,
) -> Prepared:
  """Tokenise, pack and write both splits of a corpus.

  Works in a hidden sibling directory and renames it at the end: `directory` is complete or absent,
  also after an error or an interrupt. Called again with the same settings it does nothing.

  Args:
    source: the corpus, see `sources.open_source`.
    tokenizer: see `tokenizers`.
    length: L, tokens per sequence.
    directory: where to write; must not exist, be empty, or hold the same dataset.
    wrap: frame every sequence by separators, see `pack`.
    packing: "concatenate", or "documents": one record each. Longer ones than `length` with start
      and end are dropped and counted.
    buckets: of documents: the lengths that they are padded to, rising to `length`; none: `length`.
    progress: show a progress bar on a terminal.

  Raises:
    InputError: packing and tokenizer do not fit together, buckets do not rise to `length`, the
      source cannot be read, a split is empty or shorter than `length`, the directory
      holds something else (the message tells what differs) or cannot be written.

  Example:
    >>> prepared = prepare(open_source("stdlib"), tokenizers.Bytes(), 256, "runs/data")
  """
  directory = pathlib.Path(os.path.abspath(directory))
  buckets = _checked_buckets(packing, buckets, length, tokenizer)
  pack((), length, tokenizer.eos_id, wrap)  # complain about the length before touching the disk
  wanted = Info(
    source=source.describe(),
    length=length,
    wrap=wrap and packing == "concatenate",
    vocab_size=tokenizer.vocab_size,
    eos_id=tokenizer.eos_id,
    tokenizer_fingerprint=tokenizer.fingerprint,
    splits={},
    package_version=_version(),
    packing=packing,
    buckets=buckets,
    given_ids=tokenizer.given_ids,
    pad_id=tokenizer.pad_id if packing == "documents" else None,
  )
  temporary = None
  try:
    if info := _existing(directory, wanted):
      return Prepared(directory=str(directory), info=info, created=False)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    info = _build(source, tokenizer, wanted, temporary, progress)
    os.replace(temporary, directory)  # over nothing or over an empty directory
  except OSError as error:
    reason = error.strerror or error
    raise InputError(
      f"{directory} cannot be written: {reason}; free space or use another."
    ) from error
  finally:
    if temporary is not None:
      shutil.rmtree(temporary, ignore_errors=True)
  return Prepared(directory=str(directory), info=info, created=True)
