# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: documents (str) of a "train" and a "validation" split.

  stdlib                      the Python standard library's own source text on this machine
  files:GLOB                  text files, or .jsonl, each possibly .gz, .xz or .bz2
  fasta:GLOB                  protein sequences, one a document, see `fasta`
  chat:GLOB                   prompts and answers in .jsonl files, see `conversations`
  tfds:NAME/SPLIT:FEATURE     a prepared TFDS dataset, e.g. tfds:lm1b/train:text

What decides a split is a SHA-256 of a name or an index, so it is the same on every machine and in
every run, and adding text at the end moves no earlier document to the other side.
"""

import dataclasses
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import ClassVar, Protocol, runtime_checkable

from dlm_jax import fields
from dlm_jax.data._files import (
  COMPRESSED,
  Chosen,
  check_split,
  check_text,
  decode,
  digest,
  fraction_of,
  json_lines,
  reading,
  refuse_records,
)
from dlm_jax.data._files import SPLITS as SPLITS
from dlm_jax.data.conversations import Chat
from dlm_jax.data.fasta import Fasta
from dlm_jax.errors import InputError

_FORMS = "stdlib, files:GLOB, fasta:GLOB, chat:GLOB or tfds:NAME/SPLIT:FEATURE"


@runtime_checkable
class Source(Protocol):
  """A corpus in two splits."""

  def documents(self, split: str) -> Iterator[str]:
    """Yield the non-empty documents of "train" or "validation", always in the same order."""
    ...

  def describe(self) -> dict:
    """Return what identifies the corpus, JSON-able: datasets built from it carry it along."""
    ...


# Not source text in the sense of a language model's corpus: packages of others, tests, demos,
# things that some distributions leave out, and tables written by scripts.
_SKIPPED_FOLDERS = frozenset(
  {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
  }
)
_SKIPPED_FILES = ("_sysconfigdata*.py", "_sysconfig_vars*.py", "html/entities.py", "stringprep.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stdlib:
  """The .py files below `root`; one file is one document, in sorted order.

  Left out: installed packages, tests, idlelib, lib2to3, turtledemo, the codec tables of encodings,
  pydoc_data, other generated tables (build variables, HTML entities, stringprep), and files that
  are empty or not UTF-8. About 9 MB on Python 3.11. All files of a top-level module go to the same
  split, so validation text is never a sibling of training text; with the default fraction that is
  8 % of the modules and, on Python 3.11, 9.6 % of the bytes.

  Attributes:
    validation_fraction: expected share of top-level modules in the validation split.
    root: the folder; the running interpreter's standard library by default.
    tests: also take the library's own tests, 19 MB more where they are installed. A test goes to
      the split of the module that it tests: test/test_json.py to that of json.
  """

  validation_fraction: float = 0.08
  tests: bool = False
  root: str = dataclasses.field(default_factory=lambda: sysconfig.get_path("stdlib"))

  def files(self) -> list[pathlib.PurePosixPath]:
    """Return the selected files relative to `root`; some may still prove not to be UTF-8."""
    root, found = pathlib.Path(self.root), []
    skipped = _SKIPPED_FOLDERS - ({"test", "tests"} if self.tests else set())
    for folder, folders, names in os.walk(root):
      folders[:] = sorted(set(folders) - skipped)
      here = pathlib.Path(folder).relative_to(root)
      found += [pathlib.PurePosixPath((here / n).as_posix()) for n in names if n.endswith(".py")]
    found = [f for f in found if not any(f.match(pattern) for pattern in _SKIPPED_FILES)]
    if not found:
      raise InputError(
        f"stdlib: {root} holds no .py files (a zipped or stripped Python?); use files:GLOB."
      )
    return sorted(found, key=str)

  def documents(self, split: str) -> Iterator[str]:
    check_split(split)
    for file in self.files():
      parts = file.parts[1:] if file.parts[0] == "test" else file.parts
      module = parts[0].removesuffix(".py").removeprefix("test_")
      if (fraction_of(module) < self.validation_fraction) != (split == "validation"):
        continue
      try:
        text = (pathlib.Path(self.root) / file).read_bytes().decode("utf-8")
      except (UnicodeDecodeError, PermissionError):
        continue  # a handful of files in old Pythons; the user cannot repair the standard library
      if text.strip():
        yield text

  def describe(self) -> dict:
    sizes = [(str(f), (pathlib.Path(self.root) / f).stat().st_size) for f in self.files()]
    return {
      "spec": "stdlib",
      "python": platform.python_version(),
      "validation_fraction": self.validation_fraction,
      "tests": self.tests,
      "files": len(sizes),
      "bytes": sum(size for _, size in sizes),
      "listing": digest(sizes),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(Chosen):
  """Text files chosen by a glob (`**` allowed), in sorted order.

  A .jsonl or .ndjson file gives one document per line; any other file is plain text and one
  document, unless `document_separator` cuts it. Text is taken verbatim (line ends included; a
  byte-order mark is dropped); documents of white space only are skipped. A plain file is read
  whole, .jsonl line by line. A .json file of records is refused: it is to be called .jsonl.

  Attributes:
    pattern: glob of the training files, or of all files if `validation` is None.
    field: the .jsonl field that holds the text.
    document_separator: string between the documents of a plain file, e.g. three line ends.
    validation: glob of the validation files; they are taken out of the training files.
    validation_fraction: without `validation`, the expected share of documents in that split.
    validation_tail: of plain files instead the end of every document, this share of its characters
      and from the start of a line: for corpora of few documents, such as a single file.

  Raises:
    InputError: both a glob and a tail, or the tail is no share.
  """

  kind: ClassVar[str] = "files"
  pattern: str
  field: str = "text"
  document_separator: str | None = None
  validation: str | None = None
  validation_fraction: float = 0.08
  validation_tail: float | None = None

  def __post_init__(self):
    tail = self.validation_tail
    if tail is None:
      return
    if not (isinstance(tail, float) and 0 < tail < 1):
      raise InputError(f"validation_tail={tail!r} must be a share between 0 and 1, e.g. 0.05.")
    if self.validation is not None:
      raise InputError(
        f"validation_tail={tail} and validation={self.validation!r}: the ends of files or files of "
        "their own, not both."
      )

  def documents(self, split: str) -> Iterator[str]:
    index = 0
    for path in self.files(split):
      for document in self._read(path):
        if not document.strip():
          continue
        if self.validation_tail is not None and not _of_lines(path):
          part = _part(document, self.validation_tail, split)
          if part.strip():
            yield part
          continue
        held_out = fraction_of(str(index)) < self.validation_fraction
        index += 1
        if self.validation is not None or held_out == (split == "validation"):
          yield document

  def _read(self, path: str) -> Iterator[str]:
    with reading(path) as file:
      if _of_lines(path):
        yield from self._json_lines(file, path)
        return
      text = decode(file.read(), path)
    if _plain_name(path).endswith(".json"):
      refuse_records(text, self.field, path)
    yield from text.split(self.document_separator) if self.document_separator else [text]

  def _json_lines(self, file, path: str) -> Iterator[str]:
    for number, record in json_lines(file, path):
      document = record.get(self.field) if isinstance(record, dict) else None
      if not isinstance(document, str):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(
          f"{path}:{number} has no text in field {self.field!r}; the line holds: {fields}; "
          "set the field option."
        )
      check_text(document, f"{path}:{number}")
      yield document


def _of_lines(path):
  """Return whether each line of a file is a document."""
  return _plain_name(path).endswith((".jsonl", ".ndjson"))


def _plain_name(path):
  """Return a file's name without what says how it is compressed."""
  inner, extension = os.path.splitext(path)
  return inner if extension in COMPRESSED else path


def _part(document, tail, split):
  """Return the end of a document, or what is before it."""
  start = round(len(document) * (1 - tail))
  start = document.rfind("\n", 0, start) + 1 or start
  return document[start:] if split == "validation" else document[:start]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
  """A text feature of a dataset that TFDS has prepared as ArrayRecord; needs no TensorFlow.

  Attributes:
    name: dataset, with config and version if wanted: "lm1b", "wiki40b/en:1.3.0".
    split: TFDS split of the training text.
    feature: the string feature.
    validation: TFDS split of the validation text; None cuts it from `split` by record index.
    validation_fraction: without `validation`, the expected share of records in that split.
    data_dir: where TFDS keeps its datasets; its own default if None.
  """

  name: str
  split: str
  feature: str
  validation: str | None = None
  validation_fraction: float = 0.08
  data_dir: str | None = None

  def _open(self, split: str):
    import tensorflow_datasets as tfds

    try:
      return tfds.data_source(self.name, split=split, data_dir=self.data_dir, download=False)
    except Exception as error:  # TFDS raises a dozen kinds, all of them about this request
      line = (str(error).strip().splitlines() or [type(error).__name__])[0]
      raise InputError(
        f"tfds:{self.name}/{split} cannot be opened in data_dir={self.data_dir}: {line} Prepare it "
        f"first: tfds build {self.name} --file_format=array_record."
      ) from error

  def documents(self, split: str) -> Iterator[str]:
    check_split(split)
    own = split == "validation" and self.validation is not None
    for index, record in enumerate(self._open(self.validation if own else self.split)):
      held_out = fraction_of(str(index)) < self.validation_fraction
      if self.validation is None and held_out != (split == "validation"):
        continue
      if self.feature not in record:
        raise InputError(
          f"tfds:{self.name}/{self.split}:{self.feature}: there is no such feature; "
          f"it has {', '.join(sorted(record))}."
        )
      text = record[self.feature]
      text = decode(text, f"tfds:{self.name} record {index}") if isinstance(text, bytes) else text
      if not isinstance(text, str):
        raise InputError(f"tfds:{self.name}: feature {self.feature!r} is not text.")
      if text.strip():
        yield text

  def describe(self) -> dict:
    options = dataclasses.asdict(self)
    options.pop("data_dir")  # where it lies does not change what it is
    options["records"] = len(self._open(self.split))
    spec = f"tfds:{options.pop('name')}/{options.pop('split')}:{options.pop('feature')}"
    return {"spec": spec, **options}


_GLOBS = {"files": Files, "fasta": Fasta, "chat": Chat}


def open_source(spec: str, **options) -> Source:
  """Open a corpus; reads nothing yet.

  Args:
    spec: "stdlib", "files:GLOB", "fasta:GLOB", "chat:GLOB" or "tfds:NAME/SPLIT:FEATURE".
    **options: fields of `Stdlib`, `Files`, `Fasta`, `Chat` or `Tfds`; an option that is None keeps
      its default.

  Raises:
    InputError: the spec or an option is not understood or out of range. Reading raises it for text
      that is missing, empty or not UTF-8.

  Example:
    >>> source = open_source("stdlib")
    >>> first = next(source.documents("train"))
  """
  kind, _, rest = spec.partition(":")
  if kind == "stdlib" and not rest:
    make, required = Stdlib, {}
  elif kind in _GLOBS and rest:
    make, required = _GLOBS[kind], {"pattern": rest}
  elif kind == "tfds":
    path, _, feature = rest.rpartition(":")
    name, _, split = path.rpartition("/")
    if not (name and split and feature):
      raise InputError(
        f"source={spec!r}: write tfds:NAME/SPLIT:FEATURE, e.g. tfds:lm1b/train:text."
      )
    make, required = Tfds, {"name": name, "split": split, "feature": feature}
  else:
    raise InputError(f"source={spec!r} is unknown; use {_FORMS}.")
  options = {key: value for key, value in options.items() if value is not None}
  allowed = {field.name for field in dataclasses.fields(make) if field.init} - set(required)
  if unknown := sorted(set(options) - allowed):
    raise InputError(
      f"source={spec!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(allowed))}."
    )
  source = fields.make(make, {**required, **options})
  if not 0 < source.validation_fraction < 1:
    raise InputError(
      f"validation_fraction={source.validation_fraction} is outside (0, 1); use e.g. 0.08."
    )
  return source
