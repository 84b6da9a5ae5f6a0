# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of Qwen3, SDAR and I-DLM: byte-level BPE, added tokens, chat turns.

A directory says by its `tokenizer_class` that it holds one. Two things differ from `BPE`:

  mask   <|MASK|>, where there is one, is the mask of the process; text never turns into it, though
         the public files do not mark it as special.
  chat   turns are framed by tokens that text cannot forge: what a user writes stays text.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from dlm_jax import json_file
from dlm_jax.data.tokenizers.base import canonical
from dlm_jax.data.tokenizers.bpe import BPE
from dlm_jax.errors import InputError

MASK, START, END = "<|MASK|>", "<|im_start|>", "<|im_end|>"
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# English contractions, words with one leading other character, single digits, runs of symbols with
# the newlines that follow, newlines, white space.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_THINK, _THOUGHT = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class ChatBPE(BPE):
  """A byte-level BPE with added tokens that frame the turns of a conversation."""

  @functools.cached_property
  def _markers(self):
    """A second back end: here special tokens in the text are read as such."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(self.serialised)
    backend.no_padding()
    backend.no_truncation()
    return backend

  @functools.cached_property
  def vocab_size(self) -> int:
    """One above the highest id that is not the mask's; a network may have more rows, unused."""
    vocab = self._backend.get_vocab(with_added_tokens=True)
    return 1 + max(i for token, i in vocab.items() if token != MASK)

  @functools.cached_property
  def mask_id(self) -> int:
    """The id of <|MASK|>; without one, what an absorbing process appends."""
    found = self._backend.token_to_id(MASK)
    return self.vocab_size if found is None else found

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """What ends an answer: the end of a turn, and the separator."""
    end = self._backend.token_to_id(END)
    return (self.eos_id,) if end is None else (end, self.eos_id)

  def encode(self, text: str, *, specials: bool = False) -> list[int]:
    """Return the ids of one text.

    Args:
      text: any string.
      specials: read the text of every added token, the mask's too, as that token.
    """
    if not specials:
      return super().encode(text)
    return self._markers.encode(text, add_special_tokens=False).ids

  def encode_chat(
    self, messages: Sequence[Mapping[str, str]], *, start: bool = True, thinking: bool = True
  ) -> list[int]:
    """Return the ids of a conversation; contents are text, whatever they spell.

    Args:
      messages: as for `render`.
      start: open the turn of the assistant.
      thinking: False: open it with an empty thought.

    Raises:
      InputError: a role is unknown, or the tokenizer has no tokens for turns.
    """
    begin, end = (self._backend.token_to_id(token) for token in (START, END))
    if begin is None or end is None:
      raise InputError(f"tokenizer: it has no {START} and {END}; use a chat model's.")
    ids = []
    for turn in _turns(messages):
      ids += [begin, *self.encode(turn), end, *self.encode("\n")]
    return [*ids, begin, *self.encode(_opening(thinking))] if start else ids

  @property
  def has_turns(self) -> bool:
    """Whether the vocabulary has the tokens that frame turns."""
    return None not in map(self._backend.token_to_id, (START, END))

  def encode_turns(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[list[int], bool]]:
    """Return the ids of a whole conversation in pieces, and whether each is learnt.

    Learnt is what the assistant writes, its thoughts and the end of its turn; the frame before it
    and the line end behind are given, as when it is asked. A turn's frame is encoded by itself.

    Raises:
      InputError: a role is unknown.
    """
    begin, end = (self._backend.token_to_id(token) for token in (START, END))
    pieces = []
    for turn, message in zip(_turns(messages), messages, strict=True):
      frame, _, content = turn.partition("\n")
      pieces.append(([begin, *self.encode(f"{frame}\n")], False))
      pieces.append(([*self.encode(content), end], message["role"] == "assistant"))
      pieces.append((self.encode("\n"), False))
    return pieces

  def save(self, directory: str | os.PathLike) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for `tokenizers.load`."""
    super().save(directory)
    file = pathlib.Path(directory) / "tokenizer_config.json"
    config = json_file.read_object(file)
    config |= {"bos_token": None, "tokenizer_class": _CLASSES[0]}
    file.write_text(json.dumps(config), encoding="utf-8")


def render(
  messages: Sequence[Mapping[str, str]], *, start: bool = True, thinking: bool = True
) -> str:
  """Return a conversation as the text that chat models of this family were trained on.

  Thoughts of the assistant (<think> … </think>) are left out of turns before the last question.

  Args:
    messages: {"role": "system", "user" or "assistant", "content": text} in order. Tools are not
      rendered.
    start: open the turn of the assistant.
    thinking: False: open it with an empty thought.

  Raises:
    InputError: a role is unknown.

  Example:
    >>> print(render([{"role": "user", "content": "2+2?"}]))
    <|im_start|>user
    2+2?<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>
  """
  text = "".join(f"{START}{turn}{END}\n" for turn in _turns(messages))
  return text + (START + _opening(thinking) if start else "")


def _opening(thinking: bool) -> str:
  return "assistant\n" if thinking else f"assistant\n{_THINK}\n\n{_THOUGHT}\n\n"


def _turns(messages) -> list[str]:
  """Return what stands between the frames of each turn."""
  questions = [i for i, message in enumerate(messages) if message.get("role") == "user"]
  last = questions[-1] if questions else len(messages) - 1
  turns = []
  for number, message in enumerate(messages):
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
      raise InputError(
        f"message {number} has the role {role!r}; use system, user or assistant, with a text as "
        "its content."
      )
    if role == "assistant":
      content = _answer(content, number > last, number == len(messages) - 1)
    turns.append(f"{role}\n{content}")
  return turns


def _answer(content: str, after_question: bool, final: bool) -> str:
  """Return an assistant's turn with its thought, or without where it is history."""
  thought = ""
  if _THOUGHT in content:
    thought = content.split(_THOUGHT)[0].rstrip("\n").split(_THINK)[-1].strip("\n")
    content = content.split(_THOUGHT)[-1].lstrip("\n")
  if after_question and (final or thought):
    return f"{_THINK}\n{thought}\n{_THOUGHT}\n\n" + content.lstrip("\n")
  return content


def holds(config: Mapping) -> bool:
  """Return whether a tokenizer_config.json describes a tokenizer of this family."""
  return config.get("tokenizer_class") in _CLASSES


def from_json(content: Mapping, eos: str) -> ChatBPE:
  """Return the tokenizer of a parsed tokenizer.json; its mask, if any, is made special."""
  added = [
    {**token, "special": token.get("special", False) or token.get("content") == MASK}
    for token in content.get("added_tokens") or []
  ]
  return ChatBPE(canonical({**content, "added_tokens": added}), eos)


def from_merges(vocab: Mapping[str, int], merges: Sequence, config: Mapping, eos: str) -> ChatBPE:
  """Return the tokenizer of vocab.json, merges.txt and the added tokens of tokenizer_config.json.

  Raises:
    KeyError, TypeError, ValueError: these are not such files.
  """
  added = []
  for number, token in sorted((config.get("added_tokens_decoder") or {}).items(), key=_by_id):
    flags = {flag: bool(token.get(flag, False)) for flag in _FLAGS}
    added.append({"id": int(number), "content": token["content"], **flags})
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
  byte_level["use_regex"] = False
  split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
  model = {"type": "BPE", "vocab": dict(vocab), "merges": [list(pair) for pair in merges]}
  model |= dict.fromkeys(("dropout", "unk_token")) | {"byte_fallback": False, "fuse_unk": False}
  model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
  pipeline = {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"}}
  pipeline |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}
  pipeline |= {"decoder": byte_level, "model": model}
  pipeline |= dict.fromkeys(("truncation", "padding", "post_processor"))
  return from_json(pipeline, eos)


def _by_id(entry) -> int:
  return int(entry[0])
