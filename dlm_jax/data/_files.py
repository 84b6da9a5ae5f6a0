# SPDX-License-Identifier: Apache-2.0
"""What sources of files share: which files a split reads, how they are opened and identified."""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, ClassVar

from dlm_jax import json_file, remote
from dlm_jax.errors import InputError

_SPACE = re.compile(r"\s*")
SPLITS = ("train", "validation")
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_TO_LINES = "convert it to .jsonl (pandas: read, then to_json(…, orient='records', lines=True))"
_CORRUPT = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


# What is not read, by the end of the name and by the first bytes: what to do.
_UNREAD = {
  ".parquet": (b"PAR1", _TO_LINES),
  ".arrow": (b"ARROW1", _TO_LINES),
  ".zst": (b"\x28\xb5\x2f\xfd", "decompress it (zstd -d) and name what comes of it"),
  ".zip": (b"PK\x03\x04", "unpack it (unzip) and name what comes of it"),
}
_NAMED = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".bz2": b"BZh"}


def decode(data: bytes, path: str | os.PathLike, offset: int = 0) -> str:
  """Return UTF-8 text without a byte-order mark; say in one line where it is not UTF-8."""
  try:
    return data.decode("utf-8").removeprefix("\ufeff")
  except UnicodeDecodeError as error:
    if not offset:
      _refuse_by_content(data, path)
    raise InputError(
      f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
      "convert the file (iconv -t UTF-8) or leave it out of the glob."
    ) from error


def _refuse_by_content(data, path):
  """Raise InputError for a file of another kind than its name says."""
  for extension, (begins, advice) in _UNREAD.items():
    if data.startswith(begins):
      raise InputError(f"{path} is a {extension} file, which is not read; {advice}.")
  for extension, begins in _NAMED.items():
    if data.startswith(begins):
      raise InputError(f"{path} is a {extension} file; let its name end in {extension}.")


def refuse_records(text: str, field: str, path: str) -> None:
  """Raise InputError for a .json file of records, which as text would teach braces and names.

  Records are an array of objects, or objects a line, or one object that has the field. Any other
  JSON is text like other text.
  """
  begin = _SPACE.match(text).end()
  array = text.startswith("[", begin)
  decoder, begin = json.JSONDecoder(), _SPACE.match(text, begin + array).end()
  try:
    first, end = decoder.raw_decode(text, begin)
  except (ValueError, RecursionError):
    return
  more = not array and text.startswith("{", _SPACE.match(text, end).end())
  if not isinstance(first, dict) or not (array or more or isinstance(first.get(field), str)):
    return
  stem = os.path.basename(path).partition(".json")[0]
  how = f"write one a line (jq -c '.[]') to {stem}.jsonl" if array else f"name it {stem}.jsonl"
  raise InputError(
    f"{path} holds records ({', '.join(first)[:100]}) and no plain text; {how}, or {stem}.txt to "
    "train on the JSON itself."
  )


def json_lines(file: Iterable[bytes], path: str) -> Iterator[tuple[int, Any]]:
  """Yield number, from 1, and value of every line that is not empty.

  Raises:
    InputError: a line is not JSON or not UTF-8.
  """
  offset = 0
  for number, line in enumerate(file, start=1):
    text = decode(line, path, offset)
    offset += len(line)
    if not text.strip():
      continue
    try:
      yield number, json_file.parse(text, finite=False)
    except ValueError as error:
      raise InputError(f"{path}:{number} is not JSON: {error}.") from error


def check_text(text: str, where: str) -> None:
  """Raise InputError for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f"{where} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), "
      "which is not text; repair that line."
    ) from error


def fraction_of(name: str) -> float:
  """Return a number in [0, 1) that depends on nothing but the name."""
  # The prefix only chooses one of the equally lawful assignments; changing it changes every split.
  digest = hashlib.sha256(f"v1:{name}".encode()).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


def check_split(split: str) -> None:
  """Raise InputError for a split that is neither train nor validation."""
  if split not in SPLITS:
    raise InputError(f"split={split!r} is unknown; use train or validation.")


def digest(listing: list[tuple[str, int]]) -> str:
  """Return a short hash of files' names and sizes."""
  return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def describe_files(
  spec: str, files: Callable[[str], list[str]], options: dict[str, Any]
) -> dict[str, Any]:
  """Return what identifies a corpus of files: its options, and the files' names and sizes."""
  paths = {split: files(split) for split in SPLITS}
  sizes = [(os.path.basename(p), os.path.getsize(p)) for s in SPLITS for p in paths[s]]
  description = {"spec": spec, **options, "listing": digest(sizes)}
  every = set(paths["train"] + paths["validation"])
  if not any(path.endswith((*COMPRESSED, ".jsonl", ".ndjson")) for path in every):
    description["bytes"] = sum(map(os.path.getsize, every))  # for the progress bar
  return description


@contextlib.contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
  """Open a plain or compressed file; what goes wrong in the block, too, is told in one line.

  Raises:
    InputError: the file is absent, closed to us, of a kind that is not read, or no whole archive.
  """
  extension = os.path.splitext(path)[1]
  if extension in _UNREAD:
    raise InputError(f"{path}: {extension} files are not read; {_UNREAD[extension][1]}.")
  try:
    with COMPRESSED.get(extension, open)(path, "rb") as file:
      yield file
  except _CORRUPT as error:
    raise InputError(f"{path} is not a whole {extension} file: {error}; fetch it again.") from error
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


class Chosen:
  """Files chosen by a glob: what the sources that are dataclasses with these fields share."""

  kind: ClassVar[str]  # of the source: what precedes its glob
  pattern: str
  validation: str | None

  def files(self, split: str) -> list[str]:
    """Return the sorted paths that `split` reads.

    Raises:
      InputError: the glob matches no file.
    """
    return select_files(self.kind, self.pattern, self.validation, split)

  def describe(self) -> dict[str, Any]:
    """Return what identifies the corpus, JSON-able."""
    options = dataclasses.asdict(self)
    return describe_files(f"{self.kind}:{options.pop('pattern')}", self.files, options)


def select_files(kind: str, pattern: str, validation: str | None, split: str) -> list[str]:
  """Return the sorted paths that a split reads; validation files are taken out of training.

  Args:
    kind: of the source, for messages.
    pattern: glob of the training files, or of all files if `validation` is None.
    validation: glob of the validation files.
    split: "train" or "validation".

  Raises:
    InputError: a glob matches no file.
  """
  check_split(split)
  if validation is not None and split == "validation":
    return _expand(kind, validation)
  held_out = set() if validation is None else set(_expand(kind, validation))
  held_out = {os.path.realpath(path) for path in held_out}  # "./a.txt" is "a.txt"
  found = [path for path in _expand(kind, pattern) if os.path.realpath(path) not in held_out]
  if not found:
    raise InputError(
      f"{kind}:{pattern} leaves no training file: validation={validation} "
      "matches all of them; narrow one of the two."
    )
  return found


def _expand(kind: str, pattern: str) -> list[str]:
  if remote.is_remote(pattern):
    found = [str(path) for path in remote.glob(pattern)]
  else:
    paths = glob.iglob(os.path.expanduser(pattern), recursive=True)
    found = sorted(path for path in paths if os.path.isfile(path))
  if not found:
    raise InputError(
      f"{kind}:{pattern} matches no file (looked from {os.getcwd()}); check the path, and quote "
      "the glob against the shell."
    )
  return found
