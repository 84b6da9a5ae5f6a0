# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of chat models: byte-level BPE, added tokens, turns of a conversation.

A directory says by its `tokenizer_class` (that of Qwen3, SDAR and I-DLM), or by a chat template,
that it holds one. Two things differ from `BPE`:

  mask   <|MASK|>, where there is one, is the mask of the process; text never turns into it, though
         the public files do not mark it as special.
  chat   a conversation is written as the directory's own template says, without one as Qwen3 does.
         Turns are framed by tokens that text cannot forge: what a message holds stays text.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dlm_jax import json_file
from dlm_jax.data.tokenizers import qwen3
from dlm_jax.data.tokenizers.base import EOS, canonical, check_text
from dlm_jax.data.tokenizers.bpe import BPE, splitting
from dlm_jax.data.tokenizers.chat_template import Template
from dlm_jax.data.tokenizers.directory import Directory, vocabulary
from dlm_jax.data.tokenizers.qwen3 import END, START
from dlm_jax.errors import InputError

MASK = "<|MASK|>"
ROLES = ("system", "user", "assistant", "tool")
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# English contractions, words with one leading other character, single digits, runs of symbols with
# the newlines that follow, newlines, white space.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ANSWER = "an answer to look for"
_SILENT = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # characters that Unicode gives to nobody
Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ChatBPE(BPE):
  """A byte-level BPE with added tokens that frame the turns of a conversation.

  Attributes:
    template: how it writes one; None: as Qwen3 does.
  """

  template: Template | None = None

  @functools.cached_property
  def _markers(self):
    """A second back end: here special tokens in the text are read as such."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(self.serialised)
    backend.no_padding()
    backend.no_truncation()
    return backend

  @functools.cached_property
  def _added(self) -> dict[str, dict[str, Any]]:
    """Added tokens by their text."""
    listed = json_file.parse(self.serialised).get("added_tokens") or []
    return {token["content"]: token for token in listed}

  @functools.cached_property
  def _specials(self) -> dict[str, int]:
    """Ids of the special tokens."""
    texts = [text for text, token in self._added.items() if token.get("special")]
    return {text: self._backend.token_to_id(text) for text in texts}

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
    """What ends an answer: the end of a turn, the separator, and what the files name besides."""
    usual = self._specials.get(EOS)
    found = (self._end_of_turn(), self.eos_id, *self.stops, usual)
    return tuple(dict.fromkeys(i for i in found if i is not None))

  def _end_of_turn(self) -> int | None:
    """Return the id behind an answer; None: none is known."""
    if self.template is None or self.template.names(END):
      return self._backend.token_to_id(END)
    asked = {"role": "user", "content": "2+2"}, {"role": "assistant", "content": _ANSWER}
    try:
      pieces = list(self._pieces(asked, start=False))
    except InputError:  # no jinja2, or no conversation to its liking
      return None
    places = [n for n, piece in enumerate(pieces) if isinstance(piece, str) and _ANSWER in piece]
    ids = [piece for piece in pieces[places[-1] :] if isinstance(piece, int)] if places else []
    return ids[0] if ids else None

  def encode(self, text: str, *, specials: bool = False) -> list[int]:
    """Return the ids of one text.

    Args:
      text: any string.
      specials: read the text of every added token, the mask's too, as that token.

    Raises:
      InputError: it is no text that UTF-8 can hold.
    """
    if not specials:
      return super().encode(text)
    check_text(text)
    with splitting():
      return self._markers.encode(text, add_special_tokens=False).ids

  def encode_chat(
    self,
    messages: Messages,
    *,
    start: bool = True,
    thinking: bool | None = None,
    tools: Sequence[Any] | None = None,
  ) -> list[int]:
    """Return the ids of a conversation; contents are text, whatever they spell.

    Args:
      messages: as for `qwen3.render`; other fields are for a template that knows them.
      start: open the turn of the assistant.
      thinking: False: open it with an empty thought; None: as the template does by itself.
      tools: JSON schemas of functions that may be called.

    Raises:
      InputError: these are no messages, the template refuses them, or the tokenizer has neither a
        template nor tokens for turns.
    """
    pieces = self._pieces(messages, start=start, thinking=thinking, tools=tools)
    return [i for one in pieces for i in ([one] if isinstance(one, int) else self.encode(one))]

  @property
  def has_turns(self) -> bool:
    """Whether it has a template, or the tokens that frame turns."""
    return self.template is not None or None not in map(self._backend.token_to_id, (START, END))

  def encode_turns(self, messages: Messages) -> list[tuple[list[int], bool]]:
    """Return the ids of a whole conversation in pieces, and whether each is learnt.

    Learnt is what the assistant writes, its thoughts and the end of its turn; the frame before it
    and the line end behind are given, as when it is asked. A turn's frame is encoded by itself.

    Raises:
      InputError: see `encode_chat`; or the template frames turns by other tokens.
    """
    begin, end = (self._backend.token_to_id(token) for token in (START, END))
    found, role, ids = [], None, []
    for piece in self._pieces(messages, start=False):
      if piece == begin:
        role, ids = "", [begin]
      elif role == "" and isinstance(piece, str):
        role, line_end, content = piece.partition("\n")
        found.append(([*ids, *self.encode(role + line_end)], False))
        ids = self.encode(content)
      else:
        ids += [piece] if isinstance(piece, int) else self.encode(piece)
        if role is None or piece == end:
          found.append((ids, role == "assistant"))
          role, ids = None, []
    if ids:
      found.append((ids, role == "assistant"))
    asked = any(message["role"] == "assistant" for message in messages)
    if asked and not any(learnt for _, learnt in found):
      raise InputError(
        "no answer can be told apart: the chat template frames no turn of the assistant by "
        f"{START} and {END}."
      )
    return found

  def save(self, directory: str | os.PathLike) -> None:
    """Write what `tokenizers.load` reads, the chat template among it."""
    super().save(directory)
    file = pathlib.Path(directory) / "tokenizer_config.json"
    config = json_file.read_object(file)
    config |= {"bos_token": None, "tokenizer_class": _CLASSES[0]}
    if self.template is not None:
      config |= dict(self.template.tokens)
      listed = [{"name": name, "template": text} for name, text in self.template.sources]
      config["chat_template"] = listed
    file.write_text(json.dumps(config), encoding="utf-8")

  def _pieces(self, messages, **options) -> Iterator[str | int]:
    """Yield a conversation as texts and, between them, ids of special tokens.

    Where a message spells a special token, or a "|" that might become part of one, a character that
    nobody uses stands before it while the template works, and tells its words from the template's.
    """
    messages, tools = checked(messages), _as_json(options.pop("tools", None) or None, "tools")
    if not self.has_turns:
      raise InputError(f"tokenizer: it has no {START} and {END}; use a chat model's.")
    spelt = canonical([messages, tools])
    silent = next((one for one in _SILENT if one not in spelt), None)
    if silent is None:
      raise InputError("messages hold all characters from U+FDD0 to U+FDEF, which are no text.")
    special = sorted(self._specials, key=len, reverse=True)
    told = re.compile("|".join([r"\|", *(re.escape(one) for one in special if "|" not in one)]))
    mark = lambda text: told.sub(lambda found: silent + found[0], text)  # noqa: E731
    render = qwen3.render if self.template is None else self.template.render
    text = render(_each(messages, mark), tools=_each(tools, mark), **options)
    framing = "|".join(map(self._as_read, special)) or "(?!)"
    position = 0
    for found in re.finditer(f"(?<!{silent})(?:{framing})", text):
      if before := text[position : found.start()].replace(silent, ""):
        yield before
      yield self._specials[found[found.lastindex]]
      position = found.end()
    if rest := text[position:].replace(silent, ""):
      yield rest

  def _as_read(self, token):
    """Return the expression of a special token, with the white space that it takes along."""
    left, right = (r"\s*" if self._added[token].get(side) else "" for side in ("lstrip", "rstrip"))
    return f"{left}({re.escape(token)}){right}"


def checked(messages: Any) -> list[dict[str, Any]]:
  """Return a conversation as dictionaries whose contents are texts.

  Args:
    messages: {"role", "content", …} in order; content may be None where the assistant calls tools.

  Raises:
    InputError: it is empty, a role is unknown, a content is no text, or UTF-8 cannot hold it.
  """
  if not isinstance(messages, (list, tuple)):
    raise InputError(f"a conversation is a list of messages, not a {type(messages).__name__}.")
  if not messages:
    raise InputError("a conversation has no messages; give at least one.")
  found = []
  for number, message in enumerate(messages):
    where = f"message {number}"
    if not isinstance(message, Mapping):
      raise InputError(f"{where} is a {type(message).__name__}; write {{'role': …, 'content': …}}.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
      raise InputError(f"{where} has the role {role!r}; use {', '.join(ROLES)}.")
    if content is None and message.get("tool_calls"):
      content = ""
    if not isinstance(content, str):
      raise InputError(
        f"{where}, of the {role}, has a {type(content).__name__} as its content; use a text."
      )
    found.append(_as_json({**message, "content": content}, where))
  return found


def _as_json(value, where):
  """Return what a JSON file would hold."""
  try:
    copy = json_file.plain(value)
  except (TypeError, ValueError, RecursionError):
    raise InputError(f"{where} holds something that is no JSON: {str(value)[:100]}.") from None
  _each(copy, lambda text: check_text(text, where) or text)
  return copy


def _each(value, change):
  """Return JSON in which every text but the roles is changed, keys too."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {_each(k, change): v if k == "role" else _each(v, change) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_each(one, change) for one in value]
  return value


def holds(directory: Directory) -> bool:
  """Return whether a directory describes a tokenizer of a chat model."""
  return of_qwen(directory) or bool(directory.templates)


def of_qwen(directory: Directory) -> bool:
  """Return whether its vocab.json and merges.txt are split into words as Qwen does."""
  return directory.config.get("tokenizer_class") in _CLASSES


def from_json(content: Mapping, directory: Directory) -> ChatBPE:
  """Return the tokenizer of a parsed tokenizer.json and the files beside it.

  Its mask, if any, is made special. Added tokens that only the other files list are added.

  Raises:
    InputError: a file names a token that is missing, or an id that cannot be given.
  """
  listed = list(content.get("added_tokens") or [])
  texts, ids = ({token[key] for token in listed} for key in ("content", "id"))
  missing = [
    token for token in directory.added if token["content"] not in texts and token["id"] not in ids
  ]
  if missing:
    listed = sorted([*listed, *missing], key=lambda token: token["id"])
  return _made({**content, "added_tokens": listed}, directory, missing)


def from_merges(vocab: Mapping[str, int], merges: Sequence, directory: Directory) -> ChatBPE:
  """Return the tokenizer of vocab.json, merges.txt and the added tokens of the files beside them.

  Raises:
    InputError: a file names a token that is missing, or an id that cannot be given.
    KeyError, TypeError, ValueError: these are not such files.
  """
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
  byte_level["use_regex"] = False
  split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
  model = {"type": "BPE", "vocab": dict(vocab), "merges": [list(pair) for pair in merges]}
  model |= dict.fromkeys(("dropout", "unk_token")) | {"byte_fallback": False, "fuse_unk": False}
  model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
  pipeline = {"version": "1.0", "added_tokens": directory.added, "normalizer": {"type": "NFC"}}
  pipeline |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}
  pipeline |= {"decoder": byte_level, "model": model}
  pipeline |= dict.fromkeys(("truncation", "padding", "post_processor"))
  return _made(pipeline, directory, directory.added)


def _made(content, directory, added):
  """Return a tokenizer whose mask is special; refuse added tokens that do not get their ids."""
  for_mask = lambda token: token.get("special", False) or token.get("content") == MASK  # noqa: E731
  listed = [{**token, "special": for_mask(token)} for token in content["added_tokens"]]
  words = vocabulary(content)
  eos, sources = directory.eos(words), directory.templates
  template = Template(
    sources=sources, tokens=tuple(directory.named.items()), origin=str(directory.path)
  )
  tokenizer = ChatBPE(
    canonical({**content, "added_tokens": listed}),
    eos,
    directory.stops(words, eos),
    template if sources else None,
  )
  for token in added:
    if (found := tokenizer._backend.token_to_id(token["content"])) != token["id"]:
      raise InputError(
        f"tokenizer: {directory.path} gives the added token {token['content']!r} the id "
        f"{token['id']}, which here is {found}: ids of added tokens follow the vocabulary without "
        "a gap; fetch its tokenizer.json."
      )
  return tokenizer
