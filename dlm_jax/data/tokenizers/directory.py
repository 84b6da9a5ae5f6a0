# SPDX-License-Identifier: Apache-2.0
"""What the files of a directory say about a tokenizer besides its words and merges.

Hugging Face's layout says some things in several places: which tokens were added, which of them end
a text, how a conversation is written. All are read; what they name must be in the vocabulary.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Container, Mapping
from typing import Any

from dlm_jax import fields, json_file
from dlm_jax.data.tokenizers.base import EOS
from dlm_jax.errors import InputError

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "[SEP]")
_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_GENERATION, _TEMPLATE = "generation_config.json", "chat_template.jinja"
_TOKEN = fields.Object({"content": fields.Text()})
_NAMED = fields.Optional(fields.Either((fields.Text(), _TOKEN)))
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
# What is read here of each file, where it is there.
_KINDS = {
  _CONFIG: {"added_tokens_decoder": fields.Optional(fields.Objects(_TOKEN))},
  _MAP: {},
  _ADDED: {},
  _GENERATION: {},
}
for _file in (_CONFIG, _MAP):
  _KINDS[_file] |= dict.fromkeys(_NAMES, _NAMED)
  _KINDS[_file]["additional_special_tokens"] = fields.Optional(fields.Items(_NAMED))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Return the object in a JSON file.

  Raises:
    InputError: it is unreadable, or holds something else.
  """
  try:
    return json_file.read_object(path)
  except (OSError, ValueError) as error:
    problem = getattr(error, "strerror", None) or error
    raise InputError(f"tokenizer: {path} is not readable JSON: {problem}.") from error


def vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
  """Return the ids of all tokens of a parsed tokenizer.json; of another file none."""
  try:
    words = content["model"]["vocab"]
    if isinstance(words, list):  # of [token, score]
      words = {token: number for number, (token, _) in enumerate(words)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return {**words, **added}
  except (AttributeError, KeyError, TypeError, ValueError):
    return {}


@dataclasses.dataclass(frozen=True)
class Directory:
  """The files beside a vocabulary; those that are not there say nothing.

  Attributes:
    path: of the directory.
  """

  path: pathlib.Path

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """tokenizer_config.json."""
    return self._read(_CONFIG)

  @functools.cached_property
  def named(self) -> dict[str, str]:
    """Texts of bos_token, eos_token and others; tokenizer_config.json goes first."""
    found = {}
    for file in (_CONFIG, _MAP):
      for name in _NAMES:
        if (text := self._text(file, name)) is not None:
          found.setdefault(name, text)
    return found

  @functools.cached_property
  def added(self) -> list[dict[str, Any]]:
    """Added tokens with id, content and flags, by id; tokenizer_config.json goes first.

    Those of added_tokens.json alone are special if one of the other files names them so.

    Raises:
      InputError: a list has another form.
    """
    listed, found = self.config.get("added_tokens_decoder") or {}, {}
    for number, token in listed.items():
      if not number.isdecimal():
        raise InputError(
          f"tokenizer: {self.path / _CONFIG}: added_tokens_decoder has {number!r}, which is no id."
        )
      flags = {flag: bool(token.get(flag, False)) for flag in FLAGS}
      found[int(number)] = {"id": int(number), "content": token["content"], **flags}
    for content, number in self._read(_ADDED).items():
      if isinstance(number, bool) or not isinstance(number, int):
        raise InputError(
          f"tokenizer: {self.path / _ADDED} gives {content!r} the id {number!r}; ids are whole "
          "numbers."
        )
      flags = dict.fromkeys(FLAGS, False) | {"special": content in self._specials}
      if content not in {token["content"] for token in found.values()}:
        found.setdefault(number, {"id": number, "content": content, **flags})
    return [found[number] for number in sorted(found)]

  @functools.cached_property
  def _specials(self) -> set[str]:
    """Texts that one of the files calls special."""
    found = set(self.named.values())
    for content in (self.config, self._read(_MAP)):
      for token in content.get("additional_special_tokens") or []:
        found.add(token["content"] if isinstance(token, dict) else token)
    return found

  def eos(self, words: Mapping[str, int]) -> str:
    """Return the separator of documents.

    That is eos_token, else the token that generation_config.json names; where neither is there, the
    first usual name that is in the vocabulary.

    Args:
      words: ids of all tokens.

    Raises:
      InputError: a named token is missing from the vocabulary, or nothing is named or usual.
    """
    for file in (_CONFIG, _MAP):
      if (text := self._text(file, "eos_token")) is not None and text not in words:
        raise InputError(
          f"tokenizer: {self.path / file} names the eos_token {text!r}, which is missing from the "
          "vocabulary; fetch added_tokens.json or tokenizer.json too, or correct the name."
        )
    if "eos_token" in self.named:
      return self.named["eos_token"]
    by_id = {number: text for text, number in words.items()}
    for number in self.generation_ids(by_id):
      return by_id[number]
    for eos in _KNOWN_EOS:
      if eos in words:
        return eos
    raise InputError(
      f"tokenizer: {self.path} names no document separator: none of {', '.join(_KNOWN_EOS)} is in "
      'the vocabulary; put {"eos_token": "..."} into tokenizer_config.json beside it.'
    )

  def stops(self, words: Mapping[str, int], eos: str) -> tuple[int, ...]:
    """Return the ids that end a text besides the separator; arguments as for `eos`.

    Raises:
      InputError: generation_config.json names an id that the vocabulary lacks.
    """
    found = [self._text(file, "eos_token") for file in (_CONFIG, _MAP)]
    ids = [words[text] for text in found if text is not None]
    ids += self.generation_ids(words.values())
    return tuple(number for number in dict.fromkeys(ids) if number != words[eos])

  def generation_ids(self, known: Container[int]) -> list[int]:
    """Return the ids that generation_config.json lets end a text.

    Args:
      known: ids of the vocabulary.

    Raises:
      InputError: one is none of these.
    """
    given = self._read(_GENERATION).get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    for number in ids:
      if isinstance(number, bool) or not isinstance(number, int) or number not in known:
        raise InputError(
          f"tokenizer: {self.path / _GENERATION} names the eos_token_id {number!r}, which is no id "
          "of the vocabulary; correct one of the two."
        )
    return ids

  @functools.cached_property
  def templates(self) -> tuple[tuple[str, str], ...]:
    """Names and sources of the chat templates; chat_template.jinja goes first.

    Raises:
      InputError: one is not UTF-8, or no text.
    """
    file, given = self.path / _TEMPLATE, self.config.get("chat_template")
    if file.is_file():
      try:
        given = file.read_text(encoding="utf-8-sig")
      except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"tokenizer: {file} is not readable UTF-8 text: {error}.") from None
    if given is None:
      return ()
    listed = [{"name": "default", "template": given}] if isinstance(given, str) else given
    try:
      return tuple((_checked(one["name"]), _checked(one["template"])) for one in listed)
    except (KeyError, TypeError):
      raise InputError(
        f"tokenizer: chat_template in {self.path / _CONFIG} must be a text, or a list of "
        '{"name": …, "template": …}.'
      ) from None

  def _read(self, name):
    file = self.path / name
    if not file.is_file():
      return {}
    content = read_json(file)
    fields.read(f"tokenizer: {file}", content, _KINDS[name], dict.fromkeys(_KINDS[name]))
    return content

  def _text(self, file, name):
    """Return the text of a token that a file names, in either form; None: it names none."""
    given = self._read(file).get(name) if file != _CONFIG else self.config.get(name)
    return (given["content"] if isinstance(given, dict) else given) or None


def _checked(text: Any) -> str:
  if not isinstance(text, str):
    raise TypeError
  return text
