# SPDX-License-Identifier: Apache-2.0
"""Strings in three lines: `load` opens whatever writes, and what it returns has one face."""

import dataclasses
import pathlib
from typing import Any, Protocol, runtime_checkable

from dlm_jax import convert, models
from dlm_jax.convert import places
from dlm_jax.data import tokenizers
from dlm_jax.data.tokenizers.directory import Directory
from dlm_jax.errors import InputError
from dlm_jax.text.decoder import TextDecoder
from dlm_jax.text.denoiser import Pipeline, default_dtype, load_denoiser, load_tokenizer
from dlm_jax.text.next_token import TextContinuation


@runtime_checkable
class Written(Protocol):
  """Texts, and what is known about them.

  Attributes:
    texts: one per sample.
    tokens: ids of each.
    lengths: tokens of each.
    evaluations: of all networks, summed over the texts.
  """

  texts: list[str]
  tokens: Any
  lengths: list[int]
  evaluations: int


@runtime_checkable
class Writer(Protocol):
  """A network that writes, with its tokenizer: call it for texts, or `generate` for more.

  An option that is not one of its way of writing is refused, by a line that names those that are.
  """

  tokenizer: tokenizers.Tokenizer

  def __call__(
    self, *, steps: int | None = None, num: int = 1, seed: int = 0, prompt: Any = "", **options: Any
  ) -> list[str]:
    """Return `num` texts that begin with, or go on behind, a prompt."""
    ...

  def generate(self, *args: Any, num: int = 1, seed: int = 0, **options: Any) -> Written:
    """Return texts with what is known about them; options as for a call."""
    ...


def load(
  path: str | pathlib.Path,
  tokenizer: str | pathlib.Path | None = None,
  *,
  dtype: str | None = None,
  weights: str | None = None,
  draft: str | pathlib.Path | None = None,
) -> Pipeline | TextDecoder | TextContinuation:
  """Load a model that writes: a denoiser, a network that decodes blocks, or a judge.

  Args:
    path: a workdir of `dlm-jax train`, a directory in the Hugging Face layout, a Lightning *.ckpt
      with a config.json beside it, or "shipped:teacher".
    tokenizer: a directory with its files, e.g. GPT-2's vocab.json + merges.txt; see
      `tokenizers.load`. Default: the one beside the network.
    dtype: of matrix products: default float32 on CPU, else bfloat16.
    weights: "ema" or "raw" of a Lightning checkpoint; see `convert.load`.
    draft: of a network that decodes blocks: a smaller one, same tokenizer, that drafts for it.

  Returns:
    A `Writer`: `pipe(steps=8, num=4, seed=0)` gives texts, `pipe.generate(…)` texts with their
    tokens and evaluations. Of a denoiser a `Pipeline`, of an SDAR or a decoder of ours trained on
    blocks a `TextDecoder`, of a GPT-2 or a judge of ours a `TextContinuation`.

  Raises:
    InputError: no such network there, or its tokenizer is missing or another one.

  Example:
    >>> pipe = load("data/mdlm-owt", tokenizer="data/gpt2")  # doctest: +SKIP
  """
  source = places.find_network(path)
  network = convert.open_network(source)
  if decodes(network):
    if weights is not None:
      raise InputError(f"{path}: weights={weights!r} is a choice of Lightning checkpoints only.")
    opened = open_decoder(source, tokenizer, dtype=dtype, draft=draft)
    opened.load_weights()
    return opened
  if draft is not None:
    raise InputError(f"{path} does not decode blocks, so it takes no draft ({draft}).")
  if network.writes == "next":
    return open_continuation(source, tokenizer, dtype=dtype, weights=weights)
  return load_denoiser(source, tokenizer, dtype=dtype, weights=weights)


def decodes(network: convert.Network) -> bool:
  """Tell whether a network decodes blocks, or would if it had a mask."""
  return "blocks" in network.family.writes


def open_continuation(
  path: str | pathlib.Path,
  tokenizer: str | pathlib.Path | None = None,
  *,
  dtype: str | None = None,
  weights: str | None = None,
) -> TextContinuation:
  """Load a network that predicts next tokens; arguments as for `load`.

  Raises:
    InputError: it reads proteins, or another tokenizer's tokens; or see `load`.
  """
  source = places.find_network(path)
  network = convert.open_network(
    source, dtype=default_dtype() if dtype is None else dtype, weights=weights
  )
  words = _load_tokenizer(network, tokenizer)
  if words.framed:
    raise InputError(f"{source} is a judge of proteins; to write them load a denoiser.")
  return TextContinuation(
    model=network.model,
    params=network.params,
    tokenizer=words,
    length=network.model.config.length,
    source=source,
  )


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
    InputError: one of them is no such network, or has no mask, fewer rows than the tokenizer has
      tokens or another tokenizer, or the two do not fit each other.
  """
  dtype = default_dtype() if dtype is None else dtype
  storage = storage or models.default_storage()
  if storage not in models.STORAGES:
    raise InputError(f"storage={storage!r} is unknown; use {', '.join(models.STORAGES)}.")
  opened = None
  for place in (draft, path):
    if place is None:
      continue
    source = places.find_network(place)
    network = convert.open_network(source, params_dtype=_kept(source, dtype), dtype=dtype)
    _check(network, "" if place is path else "the draft ")
    opened = TextDecoder(
      model=network.model,
      process=network.process,
      tokenizer=_load_tokenizer(network, tokenizer),
      source=source,
      weights=_regrouped(network, storage),
      block_length=network.block_length,
      draft=opened,
    )
  return opened


def _kept(source, dtype):
  """Return what parameters are kept in: what products are of, if the family has that choice."""
  return dtype if dtype in convert.open_network(source).family.dtypes else None


def _regrouped(network, storage) -> convert.Weights:
  def read():
    try:
      return models.regroup(network.model, network.params, storage, consume=True)
    finally:
      network.weights.free()  # what was stacked is consumed

  return convert.Weights(read)


def _check(network, role):
  """Refuse a network that does not decode blocks."""
  if not decodes(network):
    raise InputError(
      f"{role}{network.source} is a {network.kind} network, which does not decode blocks."
    )
  if network.writes == "next":
    raise InputError(
      f"{role}{network.source} is a {network.kind} network without a mask token, which predicts "
      "next tokens; decoding of blocks needs one trained with a mask: mask_token_id in config.json "
      "names it."
    )


def _load_tokenizer(network, path):
  """Return the tokenizer of a path or beside a network; refuse one that is not the network's."""
  source, rows = network.source, network.model.config.vocab_size
  tokenizer = load_tokenizer(source, path)
  if tokenizer.vocab_size > rows:
    raise InputError(
      f"{source}: the tokenizer has {tokenizer.vocab_size} tokens and the network {rows} rows."
    )
  if network.facts.get("tokenizer_fingerprint") not in (None, tokenizer.fingerprint):
    raise InputError(f"{source} was trained with another tokenizer; leave tokenizer out.")
  if path is None or not isinstance(tokenizer, tokenizers.BPE):
    return tokenizer
  # What ends a text may lie beside the network alone.
  beside = Directory(source).generation_ids(range(tokenizer.vocab_size))
  return dataclasses.replace(tokenizer, stops=(*tokenizer.stops, *beside)) if beside else tokenizer
