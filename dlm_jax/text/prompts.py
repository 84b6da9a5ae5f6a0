# SPDX-License-Identifier: Apache-2.0
"""What a decoder goes on behind: texts, token ids and conversations, checked and as ids."""

import dataclasses
import numbers
import os
import pathlib
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from dlm_jax import json_file
from dlm_jax.data import tokenizers
from dlm_jax.data.tokenizers import chat as chats
from dlm_jax.data.tokenizers.base import check_text
from dlm_jax.errors import InputError

_MOST_BYTES = 2**26  # of prompts: what no context holds
_FORMS = "a text, token ids, a conversation ({'role', 'content'} in order), or a list of such"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Talk:
  """How prompts are made conversations; fields as of `TextDecoder.plan`.

  Raises:
    InputError: one is of another type.
  """

  chat: bool = False
  system: str | None = None
  thinking: bool | None = None
  tools: Sequence[Any] | None = None

  @classmethod
  def make(cls, *, chat: Any, system: Any, thinking: Any, tools: Any) -> "Talk":
    """Return it from what is given, checked."""
    for name, given, kind in (
      ("chat", chat, bool),
      ("system", system, str),
      ("thinking", thinking, bool),
      ("tools", tools, (list, tuple)),
    ):
      if not (isinstance(given, kind) or (given is None and name != "chat")):
        what = {"system": "a text", "tools": "a list"}.get(name, "True or False")
        raise InputError(f"{name}={given!r} is a {type(given).__name__}; give {what}.")
    if system is not None:
      check_text(system, "system")
    return cls(chat=chat, system=system, thinking=thinking, tools=tools)

  @property
  def asked(self) -> str | None:
    """The first field that only a conversation has."""
    for name in ("system", "thinking", "tools"):
      if getattr(self, name) is not None:
        return name
    return None


def unwrapped(given: Any) -> Any:
  """Return the numbers of arrays, in lists; anything else as it is."""
  if hasattr(given, "tolist"):
    return given.tolist()
  if isinstance(given, (list, tuple)):
    return [one.tolist() if hasattr(one, "tolist") else one for one in given]
  return given


def is_whole(number: Any) -> bool:
  """Tell whether something is a whole number; True and 2.0 are none."""
  return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def each(prompts: Any) -> list[Any]:
  """Return the prompts in a list; one text, one row of ids or one conversation is one prompt.

  Raises:
    InputError: it is nothing of that.
  """
  prompts = unwrapped(prompts)
  if isinstance(prompts, str):
    return [prompts]
  if isinstance(prompts, Mapping):
    raise InputError("prompts is one message; a conversation is a list of messages: [message].")
  if not isinstance(prompts, (list, tuple)):
    raise InputError(f"prompts={_shown(prompts)} is a {type(prompts).__name__}; give {_FORMS}.")
  if not prompts:
    raise InputError("prompts is empty: give at least one, which may have no text.")
  one = all(map(is_whole, prompts)) or all(isinstance(part, Mapping) for part in prompts)
  return [list(prompts)] if one else list(prompts)


def _shown(value):
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:60]}…"


def _is_conversation(prompt):
  return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def encode(
  source: pathlib.Path,
  words: tokenizers.Tokenizer,
  prompts: Sequence[Any],
  talk: Talk,
  mask_id: int,
  rows_of_network: int,
) -> list[list[int]]:
  """Return the ids of every prompt.

  Args:
    source: of the network, for messages.
    words: its tokenizer.
    prompts: from `each`.
    talk: whether texts are what a user says, and how conversations are written.
    mask_id: of the network.
    rows_of_network: ids that it has.

  Raises:
    InputError: one is no prompt, holds the mask or an id that the network lacks, or turns cannot be
      framed.
  """
  found = []
  for number, prompt in enumerate(prompts, start=1):
    prompt = unwrapped(prompt)
    speaks = _is_conversation(prompt) or (talk.chat and isinstance(prompt, str))
    if (speaks or talk.chat) and not isinstance(words, chats.ChatBPE):
      raise InputError(f"{source} has no tokenizer of a chat model; leave chat out.")
    if talk.asked and not speaks:
      raise InputError(
        f"{talk.asked} is for conversations, and prompt {number} is none; add chat=True (--chat), "
        "or give messages."
      )
    row = _converse(words, number, prompt, talk) if speaks else _plain(words, number, prompt)
    _check_ids(number, prompt, row, mask_id, rows_of_network)
    found.append(row)
  return found


def _plain(words, number, prompt):
  if isinstance(prompt, str):
    check_text(prompt, f"prompt {number}")
    start = [] if isinstance(words, chats.ChatBPE) else [words.eos_id]
    return [*start, *words.encode(prompt)]
  if not isinstance(prompt, (list, tuple)):
    raise InputError(
      f"prompt {number}, {_shown(prompt)}, is a {type(prompt).__name__}; give {_FORMS}."
    )
  for one in prompt:
    if not is_whole(one):
      raise InputError(
        f"prompt {number} holds {_shown(one)}, a {type(one).__name__}; a list is of token ids, "
        "which are whole numbers, or of messages."
      )
  return [int(one) for one in prompt]


def _converse(words, number, prompt, talk):
  if isinstance(prompt, str):
    prompt = [{"role": "user", "content": prompt}]
  if not all(isinstance(message, Mapping) for message in prompt):
    raise InputError(f"prompt {number} holds messages and other things; a conversation has none.")
  if talk.system is not None:
    if prompt[0].get("role") == "system":
      raise InputError(f"prompt {number} has a system message of its own; leave system out.")
    prompt = [{"role": "system", "content": talk.system}, *prompt]
  try:
    return words.encode_chat(prompt, thinking=talk.thinking, tools=talk.tools)
  except InputError as error:
    raise InputError(f"prompt {number}: {error}") from None


def _check_ids(number, prompt, row, mask_id, rows_of_network):
  if isinstance(prompt, str):
    spelt = chats.MASK in prompt
  else:
    spelt = _is_conversation(prompt) and any(chats.MASK in str(one) for one in prompt)
  if mask_id in row or spelt:
    what = chats.MASK if spelt else f"id {mask_id}"
    raise InputError(
      f"prompt {number} contains the mask ({what}), which stands for what is to be generated; take "
      "it out: text goes on behind the prompt."
    )
  for i in row:
    if not 0 <= i < rows_of_network:
      raise InputError(
        f"prompt {number} has the id {i}; the network has 0 … {rows_of_network - 1}."
      )


def read_text(path: str, flag: str) -> str:
  """Return the text of a file of prompts, without a byte-order mark.

  Args:
    path: of the file; a pipe that is being written, as <(…) of a shell is, or /dev/stdin will do.
    flag: how it was named, for the message.

  Raises:
    InputError: it cannot be read, is too long or is not UTF-8; or a pipe held nothing.
  """
  try:
    return _read(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
  except (OSError, ValueError) as error:
    if isinstance(error, UnicodeDecodeError):
      raise InputError(f"{flag} is not UTF-8 text.") from None
    raise InputError(f"{flag} cannot be read: {getattr(error, 'strerror', error)}.") from None


def _read(path: str) -> bytes:
  """Return the bytes of a file; of what may be none, so many, and nothing is waited for."""
  no_wait = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer would wait to be opened
  with open(path, "rb", opener=lambda name, flags: os.open(name, flags | no_wait)) as file:
    if no_wait:
      os.set_blocking(file.fileno(), True)
    content = file.read(_MOST_BYTES + 1)
    if not content and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
      raise OSError(0, "a pipe that nobody writes to")
  if len(content) > _MOST_BYTES:
    raise OSError(0, f"it has more than {_MOST_BYTES} bytes")
  return content


def read_messages(path: str, flag: str) -> tuple[list[Any], list[Any] | None]:
  """Return the conversations in a JSON file, and the tools that they may use.

  Args:
    path: of a file with a conversation, a list of them, or {"messages": either, "tools": […]}.
    flag: how it was named, for the message.

  Raises:
    InputError: it cannot be read, or holds something else.
  """
  try:
    content = json_file.parse(read_text(path, flag))
  except ValueError as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"{flag} is not JSON: {str(error)[:100]}.") from None
  tools = None
  if isinstance(content, dict) and set(content) <= {"messages", "tools"}:
    content, tools = content.get("messages"), content.get("tools")
  several = each(content) if isinstance(content, list) and content else []
  if not several or not all(map(_is_conversation, several)):
    raise InputError(
      f'{flag} holds no conversation; write [{{"role": "user", "content": "…"}}, …], or a list of '
      "such lists."
    )
  return several, tools
