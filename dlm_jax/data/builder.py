# SPDX-License-Identifier: Apache-2.0
"""Pack a corpus into fixed-length sequences and keep them as a TFDS dataset (ArrayRecord).

A prepared directory holds

  packed_tokens/1.0.0/  the TFDS dataset, feature `tokens` int32 [L], splits train and validation;
                        `tfds.builder_from_directory` opens it without us
  tokenizer.json        the tokenizer that made the ids, see `tokenizers.load`
  dataset.json          what it was made from and how much there is, see `Info`

TensorFlow is not needed, neither to write nor to read.
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
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from dlm_jax.data import tokenizers
from dlm_jax.data.sources import SPLITS, Source
from dlm_jax.data.tokenizers import Tokenizer
from dlm_jax.errors import InputError

_FORMAT = "dlm_jax.packed_tokens/1"
_DOCUMENTS = 64  # tokenised together: enough for all cores, small enough for a smooth progress bar
Path = str | os.PathLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitInfo:
  """What one split holds.

  Attributes:
    records: sequences.
    tokens: records · length, separators and framing included.
    documents: documents read.
    text_bytes: UTF-8 bytes of those documents, the dropped tail included.
    bytes_per_token: text bytes per position of a record. With an average loss in nats over all L
      positions, bits per byte = loss / ln 2 / bytes_per_token.
  """

  records: int
  tokens: int
  documents: int
  text_bytes: int
  bytes_per_token: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
  """The content of dataset.json.

  Attributes:
    source: `Source.describe()` of the corpus.
    length: L, tokens per record.
    wrap: every record begins and ends with the separator.
    vocab_size: ordinary ids, the diffusion mask excluded.
    eos_id: the separator.
    tokenizer_fingerprint: `Tokenizer.fingerprint`.
    splits: name → SplitInfo.
    package_version: version of dlm_jax that wrote it.
  """

  source: dict[str, Any]
  length: int
  wrap: bool
  vocab_size: int
  eos_id: int
  tokenizer_fingerprint: str
  splits: dict[str, SplitInfo]
  package_version: str

  def settings(self) -> dict[str, Any]:
    """Return what has to agree for two datasets to be the same, flat."""
    names = ("length", "wrap", "vocab_size", "eos_id", "tokenizer_fingerprint")
    source = {f"source.{key}": value for key, value in self.source.items()}
    return {name: getattr(self, name) for name in names} | source


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
    counts = ", ".join(f"{n} {s.tokens:,} tokens" for n, s in self.info.splits.items())
    done = "prepared" if self.created else "already prepared with these settings, nothing to do"
    return f"{self.directory}: {done} ({counts}, length {self.info.length})."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
  """An opened prepared directory.

  Attributes:
    directory: where it lies.
    info: the content of dataset.json.
    splits: name → TFDS data source; `splits["train"][i]["tokens"]` is int32 [L].
  """

  directory: str
  info: Info
  splits: dict[str, Any]

  def tokenizer(self) -> Tokenizer:
    """Load the tokenizer that made the ids."""
    return tokenizers.load(pathlib.Path(self.directory) / "tokenizer.json")


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
  """The TFDS builder; `prepare` drives it. Records keep the order in which they were packed."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, length: int, splits: dict[str, Iterator[np.ndarray]], **options):
    self._length, self._splits = length, splits
    super().__init__(**options)

  def _info(self):
    tokens = tfds.features.Tensor(shape=(self._length,), dtype=np.int32)
    return tfds.core.DatasetInfo(
      builder=self,
      description="Documents of token ids, packed into sequences of equal length.",
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
  records: int = 0

  def info(self, length: int, size: int) -> SplitInfo:
    counts = dataclasses.asdict(self)
    # A record is charged with `size` tokens of the stream: the dropped tail takes its bytes along.
    density = self.text_bytes / counts.pop("stream")
    return SplitInfo(
      **counts, tokens=self.records * length, bytes_per_token=density * size / length
    )


def _rows(source: Source, split: str, tokenizer: Tokenizer, pack_options: dict, count: _Count, bar):
  """Yield the packed rows of a split, keeping count; an empty split or no full row is an error."""

  def token_lists():
    stream = iter(source.documents(split))
    while documents := list(itertools.islice(stream, _DOCUMENTS)):
      for document, tokens in zip(documents, tokenizer.encode_batch(documents), strict=True):
        size = len(document.encode())
        count.documents += 1
        count.text_bytes += size
        count.stream += len(tokens) + 1
        bar.update(size)
        yield tokens

  bar.set_description(f"packing {split}")
  for row in pack(token_lists(), **pack_options):
    count.records += 1
    yield row
  if not count.documents:
    raise InputError(
      f"the {split} split is empty: {source.describe()['spec']} holds no text for it; give more "
      "documents, cut them with document_separator, or name validation text with validation."
    )
  if not count.records:
    frame = 2 if pack_options["wrap"] else 0
    raise InputError(
      f"length={pack_options['length']} is longer than the {split} split, which has only "
      f"{count.stream} tokens; use length <= {count.stream + frame} or give more text."
    )


def _build(source, tokenizer, wanted: Info, directory: pathlib.Path, progress: bool) -> Info:
  """Write everything into an empty directory; return `wanted` with its splits filled in."""
  length, wrap = wanted.length, wanted.wrap
  counts = {split: _Count() for split in SPLITS}
  options = {"length": length, "eos_id": tokenizer.eos_id, "wrap": wrap}
  size = length - 2 if wrap else length
  with tqdm.tqdm(
    unit="B", unit_scale=True, total=wanted.source.get("bytes"), disable=None if progress else True
  ) as bar:
    rows = {s: _rows(source, s, tokenizer, options, counts[s], bar) for s in SPLITS}
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
  splits = {split: counts[split].info(length, size) for split in SPLITS}
  info = dataclasses.replace(wanted, splits=splits)
  paths = sorted(path for path in directory.rglob("*.*") if path.is_file())
  files = {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
  content = {"format": _FORMAT, **dataclasses.asdict(info), "files": files}
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


def prepare(
  source: Source,
  tokenizer: Tokenizer,
  length: int,
  directory: Path,
  *,
  wrap: bool = True,
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
    progress: show a progress bar on a terminal.

  Raises:
    InputError: the source cannot be read, a split is empty or shorter than `length`, the directory
      holds something else (the message tells what differs) or cannot be written.

  Example:
    >>> prepared = prepare(open_source("stdlib"), tokenizers.Bytes(), 256, "runs/data")
  """
  directory = pathlib.Path(os.path.abspath(directory))
  pack((), length, tokenizer.eos_id, wrap)  # complain about the length before touching the disk
  wanted = Info(
    source=source.describe(),
    length=length,
    wrap=wrap,
    vocab_size=tokenizer.vocab_size,
    eos_id=tokenizer.eos_id,
    tokenizer_fingerprint=tokenizer.fingerprint,
    splits={},
    package_version=_version(),
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


def open_dataset(directory: Path) -> Dataset:
  """Open a directory made by `prepare`.

  Raises:
    InputError: it is not one, or files are missing or have another size than when written.
  """
  directory = pathlib.Path(directory)
  advice = "prepare it again into a new directory."
  try:
    content = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
    if content.pop("format") != _FORMAT:
      raise ValueError("its format is not " + _FORMAT)
    files = content.pop("files")
    splits = {name: SplitInfo(**split) for name, split in content.pop("splits").items()}
    info = Info(**content, splits=splits)
  except OSError as error:
    raise InputError(
      f"{directory} is not a prepared dataset: dataset.json: {error.strerror}; {advice}"
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f"{directory} is not a prepared dataset: dataset.json is not ours ({error}); {advice}"
    ) from error
  for name, size in files.items():
    path = directory / name
    found = path.stat().st_size if path.is_file() else None
    if found != size:
      state = "is missing" if found is None else f"has {found} bytes instead of {size}"
      raise InputError(f"{directory} is truncated or changed: {name} {state}; {advice}")
  try:
    tfds_builder = tfds.builder_from_directory(directory / "packed_tokens" / "1.0.0")
    sources = {name: tfds_builder.as_data_source(split=name) for name in info.splits}
  except Exception as error:  # sizes agree: only a foreign or edited dataset comes here
    raise InputError(f"{directory} cannot be opened by TFDS: {error}; {advice}") from error
  return Dataset(directory=str(directory), info=info, splits=sources)
