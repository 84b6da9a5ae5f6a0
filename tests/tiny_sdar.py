# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of block-diffusion networks with the tokenizer of a chat model, small and random."""

import dataclasses
import json
import pathlib

import jax
import tiny_decoder

from dlm_jax import convert, process

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|MASK|>")
MASK = 256 + len(ADDED) - 1
CONFIG = dataclasses.replace(
  tiny_decoder.DENSE, vocab_size=272, dim=16, layers=2, mlp_dim=24, length=256
)


def write(
  directory, *, seed=0, block_length=4, mask=True, noise=0.0, saved=None, **changes
) -> pathlib.Path:
  """Write a checkpoint; `noise` moves it away from the network of the same seed without noise."""
  directory = pathlib.Path(directory)
  model, params = tiny_decoder.make(dataclasses.replace(CONFIG, **changes), seed)
  if noise:
    other = tiny_decoder.make(dataclasses.replace(CONFIG, **changes), seed + 1)[1]
    mix = lambda x, y: x + noise * (y - x)  # noqa: E731
    params = jax.tree.map(mix, params, other)
  proc = process.Absorbing(vocab_size=model.config.vocab_size, mask_id=MASK) if mask else None
  convert.save(directory, model, params, proc, block_length=block_length, **(saved or {}))
  words(directory)
  return directory


def words(directory) -> None:
  """Write the tokenizer's files: 256 bytes and six added tokens."""
  import tokenizers as library

  vocab = {s: i for i, s in enumerate(sorted(library.pre_tokenizers.ByteLevel.alphabet()))}
  added = {
    str(len(vocab) + i): {"content": token, "special": "|" in token and token != "<|MASK|>"}
    for i, token in enumerate(ADDED)
  }
  config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
  (directory / "vocab.json").write_text(json.dumps(vocab))
  (directory / "merges.txt").write_text("#version: 0.2\n")
  (directory / "tokenizer_config.json").write_text(
    json.dumps({**config, "added_tokens_decoder": added})
  )
