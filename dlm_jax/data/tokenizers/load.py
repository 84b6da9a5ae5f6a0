# SPDX-License-Identifier: Apache-2.0
"""Find out what kind of tokenizer lies somewhere, and load it."""

import os
import pathlib

from dlm_jax import fields, remote
from dlm_jax.data.tokenizers import bytes, chat, esm
from dlm_jax.data.tokenizers.base import canonical
from dlm_jax.data.tokenizers.bpe import BPE, byte_level
from dlm_jax.data.tokenizers.bytes import Bytes
from dlm_jax.data.tokenizers.directory import Directory, read_json, vocabulary
from dlm_jax.data.tokenizers.esm import Esm
from dlm_jax.errors import InputError

Tokenizer = Bytes | BPE | Esm
# What is read here of a tokenizer.json; it may be missing.
_TOKEN = fields.Object({"content": fields.Text()})
_CONTENT = {"added_tokens": fields.Optional(fields.Items(_TOKEN))}
_LAYOUTS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def _load_file(path: pathlib.Path) -> Tokenizer:
  content = read_json(path)
  fields.read(f"tokenizer: {path}", content, _CONTENT, dict.fromkeys(_CONTENT))
  if content in (bytes.CONTENT, esm.CONTENT):
    return Bytes() if content == bytes.CONTENT else Esm()
  directory = Directory(path.parent)
  try:
    if chat.holds(directory):
      tokenizer = chat.from_json(content, directory)
    else:
      words = vocabulary(content)
      eos = directory.eos(words)
      tokenizer = BPE(canonical(content), eos, directory.stops(words, eos))
    tokenizer.encode("a")
  except InputError:
    raise
  except Exception as error:  # the parser raises bare Exceptions
    raise InputError(
      f"tokenizer: {path} is not a tokenizer.json of the tokenizers package: {error}."
    ) from error
  return tokenizer


def _load_merges(vocab_path: pathlib.Path, merges_path: pathlib.Path) -> BPE:
  vocab, directory = read_json(vocab_path), Directory(vocab_path.parent)
  id_ = fields.Whole(0, fields.MOST)
  fields.read(f"tokenizer: {vocab_path}", vocab, dict.fromkeys(vocab, id_))
  try:
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if chat.of_qwen(directory):
      tokenizer = chat.from_merges(vocab, merges, directory)
    else:
      words = vocab | {token["content"]: token["id"] for token in directory.added}
      eos = directory.eos(words)
      tokenizer = byte_level({**vocab, eos: words[eos]}, merges, eos)
    tokenizer.encode("a")
  except InputError:
    raise
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
      BPE with GPT-2's word splitting; Qwen's, see `chat`, if tokenizer_config.json says so). What
      ends a text and how a conversation is written is read from the files beside it. One
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
