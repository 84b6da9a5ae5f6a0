# SPDX-License-Identifier: Apache-2.0
"""Protein sequences from FASTA files, plain or compressed: one record is one document."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import ClassVar

from dlm_jax.data._files import (
  Chosen,
  check_split,
  fraction_of,
  reading,
)
from dlm_jax.errors import InputError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
RARE = "BOUXZ"  # ambiguous or unusual, but legal: B, Z, X stand for several; U and O are real


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fasta(Chosen):
  """The records of FASTA files chosen by a glob (`**` allowed), in the order of the files.

  A record is a line `>name anything` and lines of residues below it. Lower case becomes upper case
  and one `*` at the end, the stop, is dropped. The letters are the twenty amino acids and BOUXZ;
  any other character, such as an alignment gap, is an error. A sequence is never shortened: what
  is too short or too long is left out whole, as is a sequence that was there before.

  The split follows from a hash of the name, so it does not move when records are added. Of equal
  sequences the first decides; one that is in the validation files is no training sequence.

  Attributes:
    pattern: glob of the training files, or of all files if `validation` is None.
    validation: glob of the validation files; they are taken out of the training files.
    validation_fraction: without `validation`, the expected share of names in that split.
    min_length: residues that a sequence has at least.
    max_length: residues that it has at most; None: any number. Packing has a limit of its own.
  """

  kind: ClassVar[str] = "fasta"
  pattern: str
  validation: str | None = None
  validation_fraction: float = 0.08
  min_length: int = 1
  max_length: int | None = None

  def __post_init__(self):
    if self.min_length < 1 or (self.max_length or self.min_length) < self.min_length:
      raise InputError(
        f"min_length={self.min_length} and max_length={self.max_length} leave no sequence; use "
        "1 or more and at least min_length."
      )

  def documents(self, split: str) -> Iterator[str]:
    """Yield the sequences of a split; see `sifted` for what raises."""
    return (sequence for sequence, reason in self.sifted(split) if not reason)

  def sifted(self, split: str) -> Iterator[tuple[str, str]]:
    """Yield every sequence of a split with the reason to leave it out, empty if there is none.

    Raises:
      InputError: a file cannot be read or is no FASTA, or a record holds another character.
    """
    check_split(split)
    seen = set()
    if self.validation is not None and split == "train":
      for path in self.files("validation"):
        seen |= {_digest(sequence) for _, sequence in read(path)}
    for path in self.files(split):
      for name, sequence in read(path):
        held_out = fraction_of(name) < self.validation_fraction
        mine = self.validation is not None or held_out == (split == "validation")
        reason = self._reason(sequence, seen)
        if mine:
          yield sequence, reason

  def _reason(self, sequence: str, seen: set[bytes]) -> str:
    """Return why a sequence is left out; if it is not, remember it and return nothing."""
    if len(sequence) < self.min_length:
      return f"shorter than {self.min_length}"
    if self.max_length is not None and len(sequence) > self.max_length:
      return f"longer than {self.max_length}"
    before = len(seen)
    seen.add(_digest(sequence))
    return "" if len(seen) > before else "duplicates"


def _digest(sequence: str) -> bytes:
  return hashlib.blake2b(sequence.encode(), digest_size=12).digest()


def read(path: str) -> Iterator[tuple[str, str]]:
  """Yield (name, sequence) of every record of a FASTA file; the sequence may be empty.

  Raises:
    InputError: the file cannot be read, is no FASTA, or a record holds a character that is no
      amino acid.
  """
  name, pieces = None, []
  with reading(path) as file:
    for number, data in enumerate(file, start=1):
      line = data.decode("utf-8", errors="replace").strip().removeprefix("\ufeff")
      if line.startswith(">"):
        if name is not None:
          yield name, _checked(path, name, pieces)
        name, pieces = (line[1:].split() or [""])[0], []
        if not name:
          raise InputError(f"{path}:{number} is a header without a name; write >name.")
      elif line and name is None:
        raise InputError(f"{path}:{number} is not FASTA: expected a line that begins with '>'.")
      elif line:
        pieces += line.split()
  if name is not None:
    yield name, _checked(path, name, pieces)


_ALPHABET = frozenset(RESIDUES + RARE)


def _checked(path: str, name: str, pieces: list[str]) -> str:
  sequence = "".join(pieces).removesuffix("*")
  sequence = sequence.upper() if sequence.isascii() else sequence
  if wrong := set(sequence) - _ALPHABET:
    letter = next(letter for letter in sequence if letter in wrong)
    raise InputError(
      f"{path}: record {name!r} holds {letter!r} at residue {sequence.index(letter) + 1}, which is "
      f"no amino acid; allowed are {RESIDUES} and {RARE}: remove alignment gaps, or the record."
    )
  return sequence
