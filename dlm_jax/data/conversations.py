# SPDX-License-Identifier: Apache-2.0
"""Conversations: prompts that are given and answers that are learnt, from files of JSON lines."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from dlm_jax.data._files import (
  Chosen,
  check_split,
  check_text,
  fraction_of,
  json_lines,
  reading,
)
from dlm_jax.data.tokenizers import ChatBPE, Tokenizer
from dlm_jax.errors import InputError

Messages = Sequence[Mapping[str, str]]  # {"role": "system", "user" or "assistant", "content": text}
_ROLES = ("system", "user", "assistant")


@runtime_checkable
class Conversations(Protocol):
  """A corpus that can be packed as conversations."""

  def conversations(self, split: str) -> Iterator[Messages]:
    """Yield the conversations of "train" or "validation", always in the same order."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Chosen):
  """Conversations from JSON-lines files chosen by a glob (`**` allowed), in sorted order.

  A line holds {"messages": [{"role": …, "content": …}, …]}, or a prompt and its answer in two named
  fields. Every conversation has an answer of the assistant.

  Attributes:
    pattern: glob of the training files, or of all files if `validation` is None.
    prompt: the field of the prompt; None: lines hold messages.
    answer: the field of its answer.
    validation: glob of the validation files; they are taken out of the training files.
    validation_fraction: without `validation`, the expected share of lines in that split.
  """

  kind: ClassVar[str] = "chat"
  pattern: str
  prompt: str | None = None
  answer: str | None = None
  validation: str | None = None
  validation_fraction: float = 0.08

  def __post_init__(self):
    if (self.prompt is None) != (self.answer is None):
      raise InputError(
        f"chat:{self.pattern}: prompt={self.prompt!r} and answer={self.answer!r} name fields "
        "together; give both, or neither for lines of messages."
      )

  def conversations(self, split: str) -> Iterator[Messages]:
    """Yield the messages of every conversation of a split.

    Raises:
      InputError: a file cannot be read, or a line holds no conversation.
    """
    check_split(split)
    index = 0
    for path in self.files(split):
      with reading(path) as file:
        for number, record in json_lines(file, path):
          held_out = fraction_of(str(index)) < self.validation_fraction
          index += 1
          if self.validation is not None or held_out == (split == "validation"):
            yield self._messages(record, f"{path}:{number}")

  def documents(self, split: str) -> Iterator[str]:
    """Yield every conversation as text, its messages one after the other: to train a BPE on."""
    for messages in self.conversations(split):
      yield "\n".join(message["content"] for message in messages)

  def _messages(self, record: Any, where: str) -> Messages:
    fields = ("messages",) if self.prompt is None else (self.prompt, self.answer)
    if not isinstance(record, dict) or any(field not in record for field in fields):
      found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
      raise InputError(
        f"{where} has no {' and '.join(fields)}; the line holds: {found}; set the options prompt "
        "and answer to its fields."
      )
    messages = record["messages"] if self.prompt is None else _pair(record, *fields)
    good = isinstance(messages, list) and all(map(_is_message, messages))
    if not good or not any(message["role"] == "assistant" for message in messages):
      raise InputError(
        f"{where} is no conversation: messages are {{'role': {', '.join(_ROLES)}; 'content': text}}"
        ", one of the assistant at least."
      )
    for message in messages:
      check_text(message["content"], where)
    return messages


def _pair(record, prompt, answer):
  return [
    {"role": "user", "content": record[prompt]},
    {"role": "assistant", "content": record[answer]},
  ]


def _is_message(message) -> bool:
  return (
    isinstance(message, dict)
    and message.get("role") in _ROLES
    and isinstance(message.get("content"), str)
  )


def encode(messages: Messages, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
  """Return a conversation's ids, and which of them are learnt: answers with what ends them.

  A tokenizer of chat models frames turns as these do, see `ChatBPE.encode_turns`. Any other writes
  the separator, every prompt and a line end, every answer and the separator:

    <|endoftext|> prompt ⏎ answer <|endoftext|> prompt ⏎ answer <|endoftext|>

  Args:
    messages: in order; the roles are system, user and assistant.
    tokenizer: of text.

  Example:
    >>> from dlm_jax.data import tokenizers
    >>> asked = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    >>> encode(asked, tokenizers.Bytes())
    ([256, 50, 43, 50, 10, 52, 256], [False, False, False, False, False, True, True])
  """
  if isinstance(tokenizer, ChatBPE) and tokenizer.has_turns:
    pieces = tokenizer.encode_turns(messages)
  else:
    pieces = [([tokenizer.eos_id], False)]
    for message in messages:
      if message["role"] == "assistant":
        pieces.append(([*tokenizer.encode(message["content"]), tokenizer.eos_id], True))
      else:
        pieces.append((tokenizer.encode(message["content"] + "\n"), False))
  ids = [i for piece, _ in pieces for i in piece]
  return ids, [learnt for piece, learnt in pieces for _ in piece]


def answer_bytes(messages: Messages) -> int:
  """Return the UTF-8 bytes of the answers."""
  return sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
