# SPDX-License-Identifier: Apache-2.0
"""Find out what kind of tokenizer lies somewhere, and load it."""

import os
import pathlib

from dlm_jax import fields, json_file, remote
from dlm_jax.data.tokenizers import bytes, chat, esm
from dlm_jax.data.tokenizers.base import EOS, canonical
from dlm_jax.data.tokenizers.bpe import BPE, byte_level
from dlm_jax.data.tokenizers.bytes import Bytes
from dlm_jax.data.tokenizers.esm import Esm
from dlm_jax.errors import InputError

Tokenizer = Bytes | BPE | Esm
_KNOWN_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "[SEP]")
# What is read here of tokenizer.json and of tokenizer_config.json; any of it may be missing.
_TOKEN = fields.Object({"content": fields.Text()})
_CONTENT = {"added_tokens": fields.Optional(fields.Items(_TOKEN))}
_CONFIG = {
  "added_tokens_decoder": fields.Optional(fields.Objects(_TOKEN)),
  "eos_token": fields.Optional(fields.Either((fields.Text(), fields.Object()))),
}
_LAYOUTS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def _read_json(path: pathlib.Path) -> dict:
  try:
    return json_file.read_object(path)
  except (OSError, ValueError) as error:
    problem = getattr(error, "strerror", None) or error
    raise InputError(f"tokenizer: {path} is not readable JSON: {problem}.") from error


def _read_config(directory: pathlib.Path) -> dict:
  file = directory / "tokenizer_config.json"
  config = _read_json(file) if file.exists() else {}
  fields.read(f"tokenizer: {file}", config, _CONFIG, dict.fromkeys(_CONFIG))
  return config


def _find_eos(directory: pathlib.Path, content: dict) -> str:
  """Return the separator: what tokenizer_config.json says, else the first usual name."""
  try:
    tokens = set(content["model"]["vocab"])
  except (KeyError, TypeError):
    tokens = set()
  tokens |= {token["content"] for token in content.get("added_tokens") or []}
  config = _read_config(directory)
  tokens |= {token["content"] for token in (config.get("added_tokens_decoder") or {}).values()}
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
  content = _read_json(path)
  fields.read(f"tokenizer: {path}", content, _CONTENT, dict.fromkeys(_CONTENT))
  if content in (bytes.CONTENT, esm.CONTENT):
    return Bytes() if content == bytes.CONTENT else Esm()
  try:
    eos = _find_eos(path.parent, content)
    chats = chat.holds(_read_config(path.parent))
    tokenizer = chat.from_json(content, eos) if chats else BPE(canonical(content), eos)
    tokenizer.encode("a")
  except InputError:
    raise
  except Exception as error:  # the parser raises bare Exceptions
    raise InputError(
      f"tokenizer: {path} is not a tokenizer.json of the tokenizers package: {error}."
    ) from error
  return tokenizer


def _load_merges(vocab_path: pathlib.Path, merges_path: pathlib.Path) -> BPE:
  vocab = _read_json(vocab_path)
  id_ = fields.Whole(0, fields.MOST)
  fields.read(f"tokenizer: {vocab_path}", vocab, dict.fromkeys(vocab, id_))
  eos = _find_eos(vocab_path.parent, {"model": {"vocab": vocab}})
  try:
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    chats = chat.holds(config := _read_config(vocab_path.parent))
    tokenizer = (
      chat.from_merges(vocab, merges, config, eos) if chats else byte_level(vocab, merges, eos)
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
  path = remote.fetch(path).expanduser()
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
