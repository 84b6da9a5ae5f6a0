# SPDX-License-Identifier: Apache-2.0
"""Strings in three lines: `load` opens whatever writes, a denoiser or a decoder of blocks."""

import pathlib

from dlm_jax import convert, models
from dlm_jax.convert import places
from dlm_jax.errors import InputError
from dlm_jax.text import decoder
from dlm_jax.text.decoder import TextDecoder
from dlm_jax.text.denoiser import Pipeline, default_dtype, load_denoiser, load_tokenizer


def load(
  path: str | pathlib.Path,
  tokenizer: str | pathlib.Path | None = None,
  *,
  dtype: str | None = None,
  weights: str | None = None,
  draft: str | pathlib.Path | None = None,
) -> Pipeline | TextDecoder:
  """Load a model that writes: a denoiser, or a network that decodes blocks.

  Args:
    path: a workdir of `dlm-jax train`, a directory in the Hugging Face layout, a Lightning *.ckpt
      with a config.json beside it, or "shipped:teacher".
    tokenizer: a directory with its files, e.g. GPT-2's vocab.json + merges.txt; see
      `tokenizers.load`. Default: the one beside the network.
    dtype: of matrix products: default float32 on CPU, else bfloat16.
    weights: "ema" or "raw" of a Lightning checkpoint; see `convert.load`.
    draft: of a network that decodes blocks: a smaller one, same tokenizer, that drafts for it.

  Returns:
    A `Pipeline` to call; of an SDAR or a decoder of ours a `decoder.TextDecoder` with `generate`.

  Raises:
    InputError: no such network there, or its tokenizer is missing or another one.

  Example:
    >>> pipe = load("data/mdlm-owt", tokenizer="data/gpt2")  # doctest: +SKIP
  """
  source = places.find_network(path)
  if convert.is_decoder(source):
    if weights is not None:
      raise InputError(f"{path}: weights={weights!r} is a choice of Lightning checkpoints only.")
    opened = open_decoder(path, tokenizer, dtype=dtype, draft=draft)
    opened.load_weights()
    return opened
  if draft is not None:
    raise InputError(f"{path} does not decode blocks, so it takes no draft ({draft}).")
  return load_denoiser(path, tokenizer, dtype=dtype, weights=weights)


def open_decoder(
  path: str | pathlib.Path,
  tokenizer: str | pathlib.Path | None = None,
  *,
  dtype: str | None = None,
  draft: str | pathlib.Path | None = None,
  storage: str | None = None,
) -> TextDecoder:
  """Open a network that decodes blocks; weights are read when they are first needed.

  Args:
    path: as for `load`; so are tokenizer, dtype and draft.
    tokenizer: of both networks.
    dtype: of both networks.
    draft: a smaller network.
    storage: of parameters, see `models.regroup`; None: `models.default_storage`.

  Raises:
    InputError: one of them is no such network, or the two do not fit each other.
  """
  dtype = dtype or default_dtype()
  storage = storage or models.default_storage()
  if storage not in models.STORAGES:
    raise InputError(f"storage={storage!r} is unknown; use {', '.join(models.STORAGES)}.")
  opened = None
  for place in (draft, path):
    if place is None:
      continue
    source = places.find_network(place)
    if not convert.is_decoder(source):
      kind = convert.read_config(source)["model_type"]
      role = "" if place is path else "the draft "
      raise InputError(f"{role}{source} is a {kind} network, which does not decode blocks.")
    words = load_tokenizer(source, tokenizer)
    opened = decoder.open_decoder(source, words, dtype=dtype, storage=storage, draft=opened)
  return opened
