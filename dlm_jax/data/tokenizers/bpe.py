# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE: any tokenizer.json, GPT-2's two files, or trained here."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

from dlm_jax import json_file
from dlm_jax.data.tokenizers.base import EOS, Base, canonical
from dlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class BPE(Base):
  """A subword tokenizer described by the text of its tokenizer.json.

  Padding, truncation and automatic specials of that file are ignored. Added tokens that the file
  does not mark as special (Qwen's "<think>") are ordinary words and match in raw text.

  Attributes:
    serialised: canonical tokenizer.json: sorted keys, no white space.
    eos_text: the separator's text; must be in the vocabulary.
    stops: ids that end a text besides the separator.
  """

  serialised: str = dataclasses.field(repr=False)
  eos_text: str = EOS
  stops: tuple[int, ...] = ()

  @functools.cached_property
  def _backend(self):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(self.serialised)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # specials in raw text are ordinary text
    return backend

  @functools.cached_property
  def vocab_size(self) -> int:
    """One above the highest id; ids without a token decode to nothing."""
    return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

  @functools.cached_property
  def eos_id(self) -> int:
    """The id of `eos_text`."""
    return self._backend.token_to_id(self.eos_text)

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """What ends a text: the separator, and what the files name besides."""
    return tuple(dict.fromkeys((self.eos_id, *self.stops)))

  def save(self, directory: str | os.PathLike) -> None:
    """Write what `tokenizers.load` reads: besides `Base.save` the stops, if there are any."""
    super().save(directory)
    if self.stops:
      file = pathlib.Path(directory) / "generation_config.json"
      file.write_text(json.dumps({"eos_token_id": list(self.stop_ids)}), encoding="utf-8")

  def _ids(self, texts: list[str]) -> list[list[int]]:
    with splitting():
      return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

  def _text(self, ids: list[int]) -> str:
    return self._backend.decode(ids, skip_special_tokens=False)


@contextlib.contextmanager
def splitting() -> Iterator[None]:
  """Say in one line that a tokenizer's own regular expression gave up."""
  try:
    yield
  except BaseException as error:  # a panic of the library is no Exception
    if type(error).__name__ != "PanicException":
      raise
    raise InputError(
      f"tokenizer: its regular expression cannot split this text: {str(error)[:200]!r}; take the "
      "tokenizer.json that the network was trained with."
    ) from None


def byte_level(vocab: dict[str, int], merges: list, eos: str) -> BPE:
  """Write GPT-2's pipeline by hand: its fingerprint must not depend on a library version."""
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
  byte_level["use_regex"] = True
  special = {"id": vocab[eos], "content": eos, "special": True}
  special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  nothing = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
  model = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]}
  model |= dict.fromkeys(nothing) | dict.fromkeys(("fuse_unk", "byte_fallback"), False)
  pipeline = {"version": "1.0", "added_tokens": [special], "pre_tokenizer": byte_level}
  pipeline |= {"decoder": byte_level, "model": model}
  pipeline |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
  return BPE(canonical(pipeline), eos)


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
  empty = True
  for text in texts:
    empty = empty and not text
    yield text
  if empty:
    raise InputError("tokenizer: the corpus to train on is empty; give at least one text.")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPE:
  """Train a byte-level BPE with GPT-2's word splitting. Deterministic.

  Args:
    texts: the corpus, one string per document; read once.
    vocab_size: all ordinary ids: 256 bytes, merges, and the separator, which comes last.

  Raises:
    InputError: vocab_size < 257, the corpus is empty, or it is too small for that many merges.

  Example:
    >>> tokenizer = train_bpe(["the cat, the hat, the bat"], 260)
    >>> tokenizer.decode(tokenizer.encode(" the bat"))
    ' the bat'
  """
  import tokenizers

  if vocab_size < 257:
    raise InputError(
      f"tokenizer vocab_size={vocab_size} is too small: 256 bytes and the separator need 257; "
      "use 257 or more."
    )
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size - 1,
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(_nonempty(texts), trainer)
  model = json_file.parse(backend.to_str())["model"]
  vocab = dict(model["vocab"])
  if len(vocab) < vocab_size - 1:
    raise InputError(
      f"tokenizer vocab_size={vocab_size} cannot be reached: the corpus yields "
      f"{len(vocab) + 1} tokens; use vocab_size <= {len(vocab) + 1} or more text."
    )
  vocab[EOS] = len(vocab)
  return byte_level(vocab, model["merges"], EOS)
