# SPDX-License-Identifier: Apache-2.0
"""Pack a corpus and keep it as a TFDS dataset (ArrayRecord), see `dataset`.

Text is concatenated and cut into sequences of one length. Proteins are packed as documents: one
record each, padded by the loader to the smallest bucket that holds it. Conversations are rows of
one length in which prompts and padding are given and answers are learnt.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from dlm_jax import disk, json_file, remote
from dlm_jax.arrays import Record
from dlm_jax.data import conversations, intact
from dlm_jax.data.dataset import (
  FEATURES,
  FORMAT,
  PACKINGS,
  Info,
  Path,
  features_of,
  lengths_file,
  open_dataset,
)
from dlm_jax.data.dataset import Dataset as Dataset
from dlm_jax.data.packing import pack, pack_blocks
from dlm_jax.data.rows import Count, rows_of
from dlm_jax.data.sources import SPLITS, Source
from dlm_jax.data.tokenizers import Tokenizer
from dlm_jax.errors import InputError


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


class PackedTokens(tfds.core.GeneratorBasedBuilder):
  """The TFDS builder; `prepare` drives it. Records keep the order in which they were packed.

  The length is None where every record has its own; features are named as in `arrays.Record`.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    *,
    length: int | None,
    features: tuple[str, ...],
    splits: dict[str, Iterator[Record]],
    **options,
  ):
    self._length, self._features, self._splits = length, features, splits
    super().__init__(**options)

  def _info(self):
    tensors = {
      name: tfds.features.Tensor(shape=(self._length,), dtype=FEATURES[name])
      for name in self._features
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="Documents of token ids, packed into sequences of equal length."
      if self._length
      else "Documents of token ids, one a record.",
      features=tfds.features.FeaturesDict(tensors),
      disable_shuffling=True,  # the loader shuffles; evaluation wants the order of the text
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {name: self._generate_examples(name) for name in self._splits}

  def _generate_examples(self, name):
    for index, record in enumerate(self._splits[name]):
      yield index, {feature: record[feature] for feature in self._features}

  def _log_download_bytes(self):
    """Stay silent where TFDS prints the path: it is temporary."""

  _log_download_done = _log_download_bytes


def _build(source, tokenizer, wanted: Info, directory: pathlib.Path, progress: bool) -> Info:
  """Write everything into an empty directory; return `wanted` with its splits filled in."""
  counts = {split: Count() for split in SPLITS}
  length = None if wanted.packing == "documents" else wanted.length
  with tqdm.tqdm(
    unit="B", unit_scale=True, total=wanted.source.get("bytes"), disable=None if progress else True
  ) as bar:
    rows = {s: rows_of(source, s, tokenizer, wanted, counts[s], bar) for s in SPLITS}
    tfds.display_progress_bar(False)
    where = {"data_dir": directory, "file_format": "array_record"}
    try:
      builder = PackedTokens(length=length, features=wanted.features, splits=rows, **where)
      builder.download_and_prepare(download_dir=directory / "downloads")
    except RuntimeError as error:
      if "write() failed" in str(error):  # how the ArrayRecord writer reports a full disk
        raise OSError(0, str(error).partition("write() failed: ")[2].partition(";")[0]) from error
      raise
    finally:
      tfds.display_progress_bar(True)
  shutil.rmtree(directory / "downloads", ignore_errors=True)
  tokenizer.save(directory)
  splits = {split: counts[split].info(wanted) for split in SPLITS}
  info = dataclasses.replace(wanted, splits=splits)
  for split in SPLITS if wanted.packing == "documents" else ():
    lengths_file(directory, split).parent.mkdir(exist_ok=True)
    np.save(lengths_file(directory, split), np.array(counts[split].lengths, np.int32))
  paths = sorted(path for path in directory.rglob("*.*") if path.is_file())
  paths.append(intact.write(directory, paths))
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


def _existing(directory: pathlib.Path, wanted: Info, there: Path | None) -> Info | None:
  """Return the dataset that is there already, None if there is nothing."""
  if there is not None and not remote.exists(there):
    return None  # what was there once may have left a copy
  if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
    return None
  if not (directory / "dataset.json").is_file():
    raise InputError(f"{directory} exists and is not a prepared dataset; use a new directory.")
  info = open_dataset(directory).info
  # Through JSON, as the stored settings went: tuples become lists.
  wanted, found = json_file.plain(wanted.settings()), info.settings()
  if differing := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
    differences = ", ".join(f"{k}={found.get(k)!r} not {wanted.get(k)!r}" for k in differing)
    raise InputError(f"{directory} was prepared with {differences}; use another directory.")
  return info


def _check_conversations(source, packing, block_length, length):
  """Complain unless a corpus can be packed as is asked."""
  if packing != "conversations" and block_length:
    raise InputError(
      f"data.block_length={block_length} is of data.packing='conversations' only; leave it 0."
    )
  if packing == "conversations" and not isinstance(source, conversations.Conversations):
    raise InputError(
      f"data.packing='conversations' needs prompts and answers, and data.source="
      f"{source.describe()['spec']} holds text; use chat:GLOB."
    )
  if block_length:
    pack_blocks((), length, block_length, 0)  # complains about lengths that do not fit


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
  if packing != "documents":
    if buckets:
      raise InputError(f"data.buckets={buckets} are of data.packing='documents' only; leave it ().")
    return ()
  buckets = tuple(buckets) or (length,)
  rising = all(low < high for low, high in itertools.pairwise((2, *buckets)))
  if not rising or buckets[-1] != length:
    raise InputError(f"data.buckets={buckets} must rise, from 3 or more, to data.length={length}.")
  return buckets


def _local(directory: Path) -> pathlib.Path:
  """Return where a dataset is or will be on this machine: of a remote one, its copy."""
  if not remote.is_remote(directory):
    return pathlib.Path(os.path.abspath(directory))
  if remote.exists(directory):
    return remote.fetch(directory)
  return remote.copy_of(directory)


def prepare(
  source: Source,
  tokenizer: Tokenizer,
  length: int,
  directory: Path,
  *,
  wrap: bool = True,
  packing: str = "concatenate",
  buckets: tuple[int, ...] = (),
  block_length: int = 0,
  progress: bool = True,
) -> Prepared:
  """Tokenise, pack and write both splits of a corpus.

  Works in a hidden sibling directory and renames it at the end: `directory` is complete or absent,
  also after an error, an interrupt or a kill, of which the next call removes what is left. Called
  again with the same settings it does nothing.

  Args:
    source: the corpus, see `sources.open_source`.
    tokenizer: see `tokenizers`.
    length: L, tokens per sequence.
    directory: where to write, gs:// and the like too; must not exist, be empty, or hold the same
      dataset.
    wrap: frame every sequence by separators, see `pack`.
    packing: "concatenate"; "documents": one record each; or "conversations", of `chat:GLOB`, see
      `conversations.encode`. Longer ones than `length` with what frames them are dropped and
      counted.
    buckets: of documents: the lengths that they are padded to, rising to `length`; none: `length`.
    block_length: of conversations: several share a training row, each padded to whole blocks of so
      many tokens, for decoders, which keep them apart; 0: one a row.
    progress: show a progress bar on a terminal.

  Raises:
    InputError: packing and tokenizer do not fit together, buckets do not rise to `length`, the
      source cannot be read, a split is empty or shorter than `length`, the directory
      holds something else (the message tells what differs) or cannot be written.

  Example:
    >>> import pathlib, tempfile
    >>> from dlm_jax.data import sources, tokenizers
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("one", "two"):
    ...   size = (folder / f"{name}.txt").write_text("to be or not to be, " * 20)
    >>> source = sources.open_source(f"files:{folder}/*.txt", validation=f"{folder}/two.txt")
    >>> made = prepare(source, tokenizers.Bytes(), 64, folder / "data", progress=False)
    >>> made.info.splits["train"].records
    6
  """
  there = directory if remote.is_remote(directory) else None
  directory = _local(directory)
  buckets = _checked_buckets(packing, buckets, length, tokenizer)
  _check_conversations(source, packing, block_length, length)
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
    block_length=block_length,
    features=features_of(packing, block_length),
    pad_id=tokenizer.pad_id if packing == "documents" else None,
  )
  try:
    if info := _existing(directory, wanted, there):
      return Prepared(directory=str(there or directory), info=info, created=False)
    with disk.fresh(directory) as temporary:
      info = _build(source, tokenizer, wanted, temporary, progress)
      if there is not None:
        remote.upload(temporary, there)
      elif faster := _existing(directory, wanted, there):  # of another process
        return Prepared(directory=str(directory), info=faster, created=False)
      else:
        os.replace(temporary, directory)  # over nothing or over an empty directory
  except OSError as error:
    reason = error.strerror or error
    raise InputError(
      f"{directory} cannot be written: {reason}; free space or use another."
    ) from error
  return Prepared(directory=str(there or directory), info=info, created=True)
