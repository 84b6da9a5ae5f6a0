# SPDX-License-Identifier: Apache-2.0
"""A prepared dataset as it lies on disk: what it holds, and how it is opened.

A prepared directory holds

  packed_tokens/1.0.0/  the TFDS dataset, feature `tokens` int32 [L], splits train and validation;
                        `tfds.builder_from_directory` opens it without us
  tokenizer.json        the tokenizer that made the ids, see `tokenizers.load`
  dataset.json          what it was made from and how much there is, see `Info`
  lengths/*.npy         of a dataset of documents: every record's number of tokens, by split

TensorFlow is not needed, neither to write nor to read.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from dlm_jax.data import tokenizers
from dlm_jax.data.tokenizers import Tokenizer
from dlm_jax.errors import InputError

FORMAT = "dlm_jax.packed_tokens/1"
PACKINGS = ("concatenate", "documents")
Path = str | os.PathLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitInfo:
  """What one split holds.

  Attributes:
    records: sequences.
    tokens: records · length, separators and framing included; padding is not.
    documents: documents read.
    text_bytes: UTF-8 bytes of those documents, the dropped tail included.
    bytes_per_token: text bytes per position of a record. With an average loss in nats over all L
      positions, bits per byte = loss / ln 2 / bytes_per_token. Packed as documents: text bytes per
      token between start and end, and the loss is over these.
    bucket_records: packed as documents: records by bucket.
    dropped: reason → documents left out. Empty is not written.
  """

  records: int
  tokens: int
  documents: int
  text_bytes: int
  bytes_per_token: float
  bucket_records: tuple[int, ...] = ()
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
  """The content of dataset.json.

  Attributes:
    source: `Source.describe()` of the corpus.
    length: L, tokens per record, or of the longest one.
    wrap: every record begins and ends with the separator.
    vocab_size: ordinary ids, the diffusion mask excluded.
    eos_id: the separator.
    tokenizer_fingerprint: `Tokenizer.fingerprint`.
    splits: name → SplitInfo.
    package_version: version of dlm_jax that wrote it.
    packing: "concatenate", or "documents": one record each, of the tokenizer's start, the tokens
      and the end; stored without padding.
    buckets: packed as documents: the lengths that records are padded to; the last one is `length`.
    given_ids: ids that are never noised, scored or predicted.
    pad_id: what fills a record up to its bucket.
  """

  source: dict[str, Any]
  length: int
  wrap: bool
  vocab_size: int
  eos_id: int
  tokenizer_fingerprint: str
  splits: dict[str, SplitInfo]
  package_version: str
  packing: str = "concatenate"
  buckets: tuple[int, ...] = ()
  given_ids: tuple[int, ...] = ()
  pad_id: int | None = None

  def settings(self) -> dict[str, Any]:
    """Return what has to agree for two datasets to be the same, flat."""
    names = ("length", "wrap", "vocab_size", "eos_id", "tokenizer_fingerprint", "packing")
    source = {f"source.{key}": value for key, value in self.source.items()}
    settings = {name: getattr(self, name) for name in names} | source
    return settings | {"buckets": list(self.buckets)}

  def content(self) -> dict[str, Any]:
    """Return what is written: every field but those of documents where they say nothing."""
    content = _without_defaults(self)
    return content | {"splits": {name: _without_defaults(s) for name, s in self.splits.items()}}


def _without_defaults(record) -> dict[str, Any]:
  empty = {"packing": "concatenate", "buckets": (), "given_ids": (), "pad_id": None}
  empty |= {"bucket_records": (), "dropped": {}}
  content = dataclasses.asdict(record)
  return {k: v for k, v in content.items() if k not in empty or v != empty[k]}


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
  """Return parsed JSON with the lists of a dataclass as tuples again."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
  """An opened prepared directory.

  Attributes:
    directory: where it lies.
    info: the content of dataset.json.
    splits: name → TFDS data source; `splits["train"][i]["tokens"]` is int32 [L], or of the
      document's own length.
  """

  directory: str
  info: Info
  splits: dict[str, Any]

  def tokenizer(self) -> Tokenizer:
    """Load the tokenizer that made the ids."""
    return tokenizers.load(pathlib.Path(self.directory) / "tokenizer.json")

  def lengths(self, split: str) -> Int[np.ndarray, "N"]:
    """Return every record's number of tokens; of a dataset packed as documents."""
    return np.load(lengths_file(self.directory, split))


def lengths_file(directory: Path, split: str) -> pathlib.Path:
  """Return where the lengths of a split's documents are kept."""
  return pathlib.Path(directory) / "lengths" / f"{split}.npy"


def open_dataset(directory: Path) -> Dataset:
  """Open a directory made by `prepare`.

  Raises:
    InputError: it is not one, or files are missing or have another size than when written.
  """
  directory = pathlib.Path(directory)
  advice = "prepare it again into a new directory."
  try:
    content = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
    if content.pop("format") != FORMAT:
      raise ValueError("its format is not " + FORMAT)
    files = content.pop("files")
    splits = {name: SplitInfo(**_tuples(s)) for name, s in content.pop("splits").items()}
    info = Info(**_tuples(content), splits=splits)
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
