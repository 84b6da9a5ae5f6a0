# SPDX-License-Identifier: Apache-2.0
"""What all tokenizers share: the separator, the shown mask, encoding, decoding, saving."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from dlm_jax.errors import InputError

EOS = "<|endoftext|>"
MASK_SYMBOL = "▯"


def canonical(value) -> str:
  """Return JSON with sorted keys and no white space: equal values give equal text."""
  return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def check_text(text: str, what: str = "the text") -> None:
  """Refuse text that UTF-8 cannot hold: half a surrogate pair, or a byte that was no UTF-8.

  Args:
    text: any string.
    what: it is, for the message.

  Raises:
    InputError: it is no such text.
  """
  if not isinstance(text, str):
    raise InputError(f"a tokenizer reads text, got a {type(text).__name__}.")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    code = ord(text[error.start])
    # Command lines and file names hand undecodable bytes over as U+DC80 … U+DCFF.
    kind = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
    why = "which is not UTF-8" if "byte" in kind else "half a surrogate pair, which is not text"
    raise InputError(
      f"{what} holds {kind} at character {error.start + 1}, {why}; take it out or convert it."
    ) from None


class Base:
  """What follows from `vocab_size`, `eos_id`, `eos_text`, `serialised`, `_ids` and `_text`."""

  given_ids = ()
  cls_id = pad_id = None  # no record of one document each

  @property
  def framed(self) -> bool:
    """Whether a record is one document in a frame of `given_ids`: proteins, never text."""
    return bool(self.given_ids)

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

    Raises:
      InputError: it is no text that UTF-8 can hold.
    """
    check_text(text)
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
