# SPDX-License-Identifier: Apache-2.0
"""A prepared dataset as it lies on disk: what it holds, and how it is opened.

A prepared directory holds

  packed_tokens/1.0.0/  the TFDS dataset, splits train and validation: the features of `Record`
                        that say anything; `tfds.builder_from_directory` opens it without us
  tokenizer.json        the tokenizer that made the ids, see `tokenizers.load`
  dataset.json          what it was made from and how much there is, see `Info`
  checksums.json        of all other files, see `intact`
  lengths/*.npy         of a dataset of documents: every record's number of tokens, by split

TensorFlow is not needed, neither to write nor to read.
"""

import dataclasses
import os
import pathlib
import shlex
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from dlm_jax import fields, json_file, remote
from dlm_jax.data import intact, tokenizers
from dlm_jax.data.tokenizers import Tokenizer
from dlm_jax.errors import InputError

FORMAT, _BARE = "dlm_jax.packed_tokens/2", "dlm_jax.packed_tokens/1"  # the first held ids alone
PACKINGS = ("concatenate", "documents", "conversations")
FEATURES = {"tokens": np.int32, "valid": np.bool_, "position": np.int32, "segment": np.int32}
Path = str | os.PathLike


def features_of(packing: str, block_length: int = 0) -> tuple[str, ...]:
  """Return the names of the features that records of a packing hold."""
  if packing == "concatenate":
    return ("tokens",)
  return tuple(FEATURES) if block_length else ("tokens", "valid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitInfo:
  """What one split holds.

  Attributes:
    records: sequences.
    tokens: in all records, separators and framing included; padding that is not scored is not.
    documents: documents, or conversations, read.
    text_bytes: UTF-8 bytes of those documents, the dropped tail included; of conversations, of
      their answers.
    bytes_per_token: text bytes per position of a record. With an average loss in nats over all L
      positions, bits per byte = loss / ln 2 / bytes_per_token. Packed as documents or as
      conversations: text bytes per valid token, and the loss is over these.
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
    packing: "concatenate"; "documents": one record each, of the tokenizer's start, the tokens and
      the end, stored without padding; or "conversations".
    buckets: packed as documents: the lengths that records are padded to; the last one is `length`.
    block_length: of conversations that share rows of the training split: each is padded to whole
      blocks of so many tokens; 0: one a row. Validation rows hold one each.
    features: what records hold, see `arrays.Record`.
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
  block_length: int = 0
  features: tuple[str, ...] = ("tokens",)
  pad_id: int | None = None

  def settings(self) -> dict[str, Any]:
    """Return what has to agree for two datasets to be the same, flat."""
    names = ("length", "wrap", "vocab_size", "eos_id", "tokenizer_fingerprint", "packing")
    source = {f"source.{key}": value for key, value in self.source.items()}
    settings = {name: getattr(self, name) for name in names} | source
    return settings | {"buckets": list(self.buckets), "block_length": self.block_length}

  def content(self) -> dict[str, Any]:
    """Return what is written: every field but those of documents where they say nothing."""
    content = _without_defaults(self)
    return content | {"splits": {name: _without_defaults(s) for name, s in self.splits.items()}}


def _without_defaults(record) -> dict[str, Any]:
  empty = {"packing": "concatenate", "buckets": (), "block_length": 0, "features": ("tokens",)}
  empty |= {"pad_id": None, "bucket_records": (), "dropped": {}}
  content = dataclasses.asdict(record)
  return {k: v for k, v in content.items() if k not in empty or v != empty[k]}


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


def open_dataset(dataset: Dataset | Path) -> Dataset:
  """Open a directory made by `prepare`; what is open already is returned as it is.

  Opening a remote one asks its store for every file: open it once and pass it on.

  Raises:
    InputError: it is not one, or files are missing or are not as they were written.
  """
  if isinstance(dataset, Dataset):
    return dataset
  directory = remote.fetch(dataset)
  advice = "prepare it again into a new directory."
  info, files = _read_info(directory, advice)
  for name, size in files.items():
    path = directory / name
    found = path.stat().st_size if path.is_file() else None
    if found != size:
      state = "is missing" if found is None else f"has {found} bytes instead of {size}"
      raise InputError(f"{directory} is truncated or changed: {name} {state}; {advice}")
  folder = directory / "packed_tokens" / "1.0.0"
  intact.check_features(folder / "features.json")
  try:
    tfds_builder = tfds.builder_from_directory(folder)
    sources = {name: tfds_builder.as_data_source(split=name) for name in info.splits}
  except Exception as error:  # sizes agree: only a damaged, foreign or edited dataset comes here
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    raise InputError(f"{directory} cannot be opened by TFDS: {why}; {advice}") from error
  intact.check(directory)
  splits = {name: intact.Split(directory, name, source) for name, source in sources.items()}
  return Dataset(directory=str(directory), info=info, splits=splits)


def _read_info(directory: pathlib.Path, advice: str) -> tuple[Info, dict[str, int]]:
  """Return what dataset.json holds: the description, and the sizes of the files."""
  try:
    content = json_file.read_object(directory / "dataset.json")
    form = content.pop("format", None)
    if form == FORMAT:
      return _parsed(content)
    if form != _BARE:
      raise ValueError("its format is not " + FORMAT)
    command = _command(directory, content)
  except OSError as error:
    raise InputError(
      f"{directory} is not a prepared dataset: dataset.json: {error.strerror}; {advice}"
    ) from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f"{directory} is not a prepared dataset: dataset.json is not ours ({error}); {advice}"
    ) from error
  raise InputError(
    f"{directory} was prepared by an earlier version, without masks; make a new one: {command} "
    "(NAME: the config of your run)."
  )


def _parsed(content: dict[str, Any]) -> tuple[Info, dict[str, int]]:
  files = fields.part("", content, "files")
  fields.read("", files, dict.fromkeys(files, fields.Whole(0, fields.WORD)))
  splits = {
    name: fields.build(SplitInfo, f"splits.{name}", one)
    for name, one in fields.part("", content, "splits").items()
  }
  rest = {name: value for name, value in content.items() if name not in ("files", "splits")}
  info = fields.build(Info, "", rest, splits=splits)
  _check_ranges(info)
  return info, files


def _check_ranges(info: Info) -> None:
  """Refuse a description that says what no dataset has."""
  length, id_ = fields.Whole(1), fields.Whole(0, max(info.vocab_size - 1, 0))
  kinds = {
    "length": length,
    "vocab_size": length,
    "eos_id": id_,
    "pad_id": fields.Optional(id_),
    "packing": fields.Text(PACKINGS),
    "buckets": fields.Items(fields.Whole(1, max(info.length, 1))),
    "block_length": fields.Whole(0),
    "features": fields.Items(fields.Text(tuple(FEATURES))),
  }
  for name, kind in kinds.items():
    kind.check(name, getattr(info, name))
  for name, split in info.splits.items():
    fields.Whole(0).check(f"splits.{name}.records", split.records)
    fields.Number("[0, ∞)").check(f"splits.{name}.bytes_per_token", split.bytes_per_token)


def _command(directory: pathlib.Path, content: dict[str, Any]) -> str:
  """Return the command that prepares the same corpus again, beside an old dataset."""
  source = dict(content["source"])
  asked = {"source": source.pop("spec"), "tokenizer": directory, "length": content["length"]}
  asked["packing"] = content.get("packing", "concatenate")
  if buckets := content.get("buckets"):
    asked["buckets"] = ",".join(map(str, buckets))
  known = ("field", "document_separator", "validation", "validation_fraction", "tests")
  known += ("validation_tail", "min_length", "max_length")
  asked |= {f"options.{k}": source[k] for k in known if source.get(k) is not None}
  asked["directory"] = directory.with_name(f"{directory.name}_2")
  given = " ".join(shlex.quote(f"--config.data.{key}={value}") for key, value in asked.items())
  return f"dlm-jax prepare --config=NAME {given}"
