# SPDX-License-Identifier: Apache-2.0
"""Text ↔ token ids: plain bytes, byte-level BPE (trained here, GPT-2's, any tokenizer.json), or
the residues of proteins.

Conventions that the rest of the library relies on:

  vocab_size  counts the ordinary ids, the separator included and the diffusion mask excluded. The
              mask of an absorbing process is always the appended id `vocab_size`.
  eos_id      separates documents; it also opens every packed sequence (the role of BOS).
  encode      never turns text into a special token: a literal "<|endoftext|>" in a document is
              seven ordinary GPT-2 tokens, so a corpus cannot forge document boundaries. Hugging
              Face's GPT-2 tokenizer, with which OpenWebText is usually prepared, reads that
              literal as id 50256; `encode(text, specials=True)` does the same.
  decode      keeps the separator visible as its text and shows the mask as MASK_SYMBOL.
  fingerprint identifies what determines the ids: it tells whether a checkpoint fits a dataset.
  given_ids   are never noised, scored or drawn: they frame a sequence. Text has none.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from dlm_jax.errors import InputError

EOS = "<|endoftext|>"
MASK_SYMBOL = "▯"
_BYTES = {"eos_id": 256, "format": "dlm_jax.bytes", "vocab_size": 257}
_ESM = {
  "format": "dlm_jax.esm",
  "tokens": ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>"],
}
_KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "[SEP]")
_LAYOUTS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def _canonical(value) -> str:
  return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


class _Derived:
  """What follows from `vocab_size`, `eos_id`, `eos_text`, `serialised`, `_ids` and `_text`."""

  given_ids = ()
  cls_id = pad_id = None  # no record of one document each

  @property
  def mask_id(self) -> int:
    """The id that an absorbing process appends to this vocabulary."""
    return self.vocab_size

  @functools.cached_property
  def fingerprint(self) -> str:
    """The sha256 of the canonical serialisation and the separator, 64 hexadecimal digits."""
    return hashlib.sha256(f"{self.eos_id}\n{self.serialised}".encode()).hexdigest()

  def encode(self, text: str, *, specials: bool = False) -> list[int]:
    """Return the ids of one text, no separator added.

    Args:
      text: any string.
      specials: read the separator's literal text as `eos_id` instead of as ordinary text.
    """
    if not specials:
      return self._ids([text])[0]
    ids = []
    for position, part in enumerate(text.split(self.eos_text)):
      ids += [self.eos_id] if position else []
      ids += self._ids([part])[0]
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Return `encode` of every text; BPE uses all cores."""
    return self._ids(list(texts))

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of a one-dimensional list or array of ids.

    Byte sequences that are not UTF-8 (a model can emit them) show as U+FFFD, the separator as its
    text, and every mask as MASK_SYMBOL, which also ends an unfinished byte sequence.

    Raises:
      InputError: an id is negative or above the mask's.
    """
    ids = np.asarray(ids)
    if not ids.size:
      return ""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > self.mask_id:
      raise InputError(
        f"token id {low if low < 0 else high} is outside 0..{self.mask_id} (mask {self.mask_id}): "
        "these tokens come from a model with another tokenizer; load the tokenizer saved with it."
      )
    masks = np.flatnonzero(ids == self.mask_id)
    return MASK_SYMBOL.join(
      self._text(part[part != self.mask_id].tolist()) for part in np.split(ids, masks)
    )

  def save(self, directory: str | os.PathLike) -> None:
    """Write `tokenizer.json` (and `tokenizer_config.json` naming the separator) for `load`.

    Raises:
      InputError: the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    try:
      directory.mkdir(parents=True, exist_ok=True)
      (directory / "tokenizer.json").write_text(self.serialised, encoding="utf-8")
      start = getattr(self, "cls_text", self.eos_text)
      config = {"bos_token": start, "eos_token": self.eos_text}
      (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    except OSError as error:
      raise InputError(f"tokenizer: cannot write {directory}: {error.strerror}.") from error


@dataclasses.dataclass(frozen=True)
class Bytes(_Derived):
  """One id per UTF-8 byte, and 256 as the separator. Reversible for any text."""

  vocab_size: int = dataclasses.field(default=257, init=False)
  eos_id: int = dataclasses.field(default=256, init=False)
  eos_text: str = dataclasses.field(default=EOS, init=False)
  serialised: str = dataclasses.field(default=_canonical(_BYTES), init=False, repr=False)

  def _ids(self, texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]

  def _text(self, ids: list[int]) -> str:
    data = b"".join(EOS.encode() if i == self.eos_id else bytes((i,)) for i in ids)
    return data.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class BPE(_Derived):
  """A subword tokenizer described by the text of its tokenizer.json.

  Padding, truncation and automatic specials of that file are ignored. Added tokens that the file
  does not mark as special (Qwen's "<think>") are ordinary words and match in raw text.

  Attributes:
    serialised: canonical tokenizer.json: sorted keys, no white space.
    eos_text: the separator's text; must be in the vocabulary.
  """

  serialised: str = dataclasses.field(repr=False)
  eos_text: str = EOS

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

  def _ids(self, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

  def _text(self, ids: list[int]) -> str:
    return self._backend.decode(ids, skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class Esm(_Derived):
  """One id per residue, in the order of the public ESM-2 models, whose mask is 32 too.

  A record is `<cls>` + residues + `<eos>` + `<pad>` …; see `template`. `decode` leaves these three
  out, so a row of a model is a plain string of residues; `<unk>` and `<null_1>` stay visible.

  Reference: ESM-2, doi 10.1126/science.ade2574.
  """

  vocab_size: int = dataclasses.field(default=32, init=False)
  cls_id: int = dataclasses.field(default=0, init=False)
  pad_id: int = dataclasses.field(default=1, init=False)
  eos_id: int = dataclasses.field(default=2, init=False)
  given_ids: tuple[int, ...] = dataclasses.field(default=(0, 1, 2, 3, 29, 30, 31), init=False)
  cls_text: str = dataclasses.field(default="<cls>", init=False)
  eos_text: str = dataclasses.field(default="<eos>", init=False)
  serialised: str = dataclasses.field(default=_canonical(_ESM), init=False, repr=False)

  def template(self, residues: int, length: int) -> Int[np.ndarray, "L"]:
    """Return `<cls>`, as many masks as residues, `<eos>` and padding: what a sampler fills in.

    Raises:
      InputError: fewer than one residue, or it does not fit into `length`.
    """
    if not 1 <= residues <= length - 2:
      raise InputError(
        f"length={residues}: with its start and end a protein of {length} positions has 1 to "
        f"{length - 2} residues."
      )
    row_L = np.full(length, self.pad_id, np.int32)
    row_L[: residues + 2] = [self.cls_id, *[self.mask_id] * residues, self.eos_id]
    return row_L

  def _ids(self, texts: list[str]) -> list[list[int]]:
    try:
      return [[_RESIDUES[letter] for letter in text] for text in texts]
    except KeyError as error:
      letters = "".join(letter for letter in _RESIDUES if not letter.islower())
      raise InputError(f"{error.args[0]!r} is no residue; use the letters {letters}.") from None

  def _text(self, ids: list[int]) -> str:
    silent = (self.cls_id, self.pad_id, self.eos_id)
    return "".join(_ESM["tokens"][i] for i in ids if i not in silent)


_RESIDUES = {token: i for i, token in enumerate(_ESM["tokens"]) if len(token) == 1}
_RESIDUES |= {letter.lower(): i for letter, i in _RESIDUES.items()}
Tokenizer = Bytes | BPE | Esm


def _byte_level(vocab: dict[str, int], merges: list, eos: str) -> BPE:
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
  return BPE(_canonical(pipeline), eos)


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
  model = json.loads(backend.to_str())["model"]
  vocab = dict(model["vocab"])
  if len(vocab) < vocab_size - 1:
    raise InputError(
      f"tokenizer vocab_size={vocab_size} cannot be reached: the corpus yields "
      f"{len(vocab) + 1} tokens; use vocab_size <= {len(vocab) + 1} or more text."
    )
  vocab[EOS] = len(vocab)
  return _byte_level(vocab, model["merges"], EOS)


def _read_json(path: pathlib.Path) -> dict:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"tokenizer: {path} is not readable JSON: {error}.") from error
  if not isinstance(value, dict):
    raise InputError(f"tokenizer: {path} holds a {type(value).__name__}, not a JSON object.")
  return value


def _read_config(directory: pathlib.Path) -> dict:
  config = directory / "tokenizer_config.json"
  return _read_json(config) if config.exists() else {}


def _find_eos(directory: pathlib.Path, content: dict) -> str:
  """Return the separator: what tokenizer_config.json says, else the first usual name."""
  try:
    tokens = set(content["model"]["vocab"])
  except (KeyError, TypeError):
    tokens = set()
  tokens |= {token["content"] for token in content.get("added_tokens") or []}
  config = _read_config(directory)
  tokens |= {token["content"] for token in config.get("added_tokens_decoder", {}).values()}
  named = config.get("eos_token")
  named = named.get("content") if isinstance(named, dict) else named
  for eos in ([named] if named else []) + list(_KNOWN_EOS):
    if eos in tokens:
      return eos
  raise InputError(
    f"tokenizer: {directory} names no document separator: none of {', '.join(_KNOWN_EOS)} is in "
    'the vocabulary; put {"eos_token": "..."} into tokenizer_config.json beside it.'
  )


def _load_file(path: pathlib.Path) -> Tokenizer:
  from dlm_jax.data import chat

  content = _read_json(path)
  if content in (_BYTES, _ESM):
    return Bytes() if content == _BYTES else Esm()
  try:
    eos = _find_eos(path.parent, content)
    chats = chat.holds(_read_config(path.parent))
    tokenizer = chat.from_json(content, eos) if chats else BPE(_canonical(content), eos)
    tokenizer.encode("a")
  except InputError:
    raise
  except Exception as error:  # the parser raises bare Exceptions
    raise InputError(
      f"tokenizer: {path} is not a tokenizer.json of the tokenizers package: {error}."
    ) from error
  return tokenizer


def _load_merges(vocab_path: pathlib.Path, merges_path: pathlib.Path) -> BPE:
  from dlm_jax.data import chat

  vocab = _read_json(vocab_path)
  eos = _find_eos(vocab_path.parent, {"model": {"vocab": vocab}})
  try:
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    chats = chat.holds(config := _read_config(vocab_path.parent))
    tokenizer = (
      chat.from_merges(vocab, merges, config, eos) if chats else _byte_level(vocab, merges, eos)
    )
    tokenizer.encode("a")
  except Exception as error:
    raise InputError(
      f"tokenizer: {merges_path} does not belong to {vocab_path.name}: {error}."
    ) from error
  return tokenizer


def load(path: str | os.PathLike) -> Tokenizer:
  """Load a tokenizer.

  Args:
    path: "bytes"; "esm", for proteins; a tokenizer.json file; or a directory that holds
      tokenizer.json, or GPT-2's vocab.json + merges.txt, or encoder.json + vocab.bpe (byte-level
      BPE with GPT-2's word splitting; Qwen's, see `chat`, if tokenizer_config.json says so). One
      vocabulary read from tokenizer.json and from merges gives the same ids but not always the
      same fingerprint.

  Raises:
    InputError: nothing usable is there; the message names what was looked for.
  """
  if path in ("bytes", "esm"):
    return Bytes() if path == "bytes" else Esm()
  path = pathlib.Path(path).expanduser()
  if path.is_file():
    return _load_file(path)
  if (path / "tokenizer.json").is_file():
    return _load_file(path / "tokenizer.json")
  for names in _LAYOUTS:
    if all((path / name).is_file() for name in names):
      return _load_merges(*(path / name for name in names))
  state = "holds none of" if path.is_dir() else "does not exist; a directory may hold"
  raise InputError(
    f"tokenizer={str(path)!r} {state} tokenizer.json, vocab.json + merges.txt, or encoder.json + "
    'vocab.bpe; give such a directory, a tokenizer.json file, "bytes" or "esm".'
  )
