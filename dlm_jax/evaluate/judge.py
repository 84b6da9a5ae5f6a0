# SPDX-License-Identifier: Apache-2.0
"""The autoregressive judge of texts: loading one, its tokens, and what it says of samples."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from dlm_jax import convert
from dlm_jax.convert import places
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError
from dlm_jax.evaluate import generative, likelihood
from dlm_jax.process import has_mask


def check_tokenizer(network: convert.Network, tokenizer: tokenizers.Tokenizer) -> None:
  """Check that a network was trained on the tokens of this tokenizer.

  An absorbing process adds the mask, a uniform one may have a row for padding, and a decoder may
  have rows to spare.

  Args:
    network: a checkpoint's.
    tokenizer: of the data.

  Raises:
    InputError: it was not.
  """
  directory, rows = network.source, network.model.config.vocab_size
  masked, wanted = has_mask(network.process), tokenizer.vocab_size
  fits = network.family.fits(rows, wanted, masked)
  stored = network.facts.get("tokenizer_fingerprint")
  if not fits or stored not in (None, tokenizer.fingerprint):
    raise InputError(
      f"{directory} has a vocabulary of {wanted if fits else rows - masked} tokens and the data "
      f"one of {wanted}{' others' if fits else ''}; prepare the data with "
      f"--config.data.tokenizer={directory}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeWithTokens:
  """A judge with what it needs to read samples.

  Attributes:
    judge: see `generative.genppl`.
    eos_id: end-of-text id of its tokenizer; None counts every target.
    retokenise: samples [B, L] to its tokens and mask, if it has a tokenizer of its own.
    batch_size: samples judged at a time, where not told otherwise.
  """

  judge: likelihood.Judge | Callable
  eos_id: int | None = None
  retokenise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
  batch_size: int = 8

  def quality(
    self,
    tokens_BL: np.ndarray,
    batch_size: int | None = None,
    valid_NL: np.ndarray | None = None,
  ) -> generative.Quality:
    """Return GenPPL and entropy of samples in the generator's ids, where they are valid."""
    translated = self.retokenise(tokens_BL) if self.retokenise else None
    return generative.quality(
      self.judge,
      tokens_BL,
      eos_id=self.eos_id,
      batch_size=self.batch_size if batch_size is None else batch_size,
      retokenised=translated,
      valid_NL=valid_NL,
    )


def load_judge(
  path: str, tokenizer: tokenizers.Tokenizer, *, given: bool = False
) -> JudgeWithTokens:
  """Load a judge for texts of a tokenizer: one of our runs, or a GPT-2 directory with BPE files.

  It runs in float32 on CPUs and in bfloat16 elsewhere, its softmax in float32 everywhere.

  Args:
    path: workdir or model directory.
    tokenizer: of the texts.
    given: some of their tokens are given, prompts and padding: a judge of other tokens, in which
      these cannot be told apart, is refused.

  Raises:
    InputError: it is not autoregressive, or was trained on other tokens.
  """
  if not path:
    raise InputError("evaluate.judge is empty; name the workdir of an autoregressive run.")
  directory = places.network_directory(path)
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  network = convert.open_network(directory, dtype=dtype)
  if network.writes != "next":
    mask = " with a mask" if network.family.spare_rows else ""
    raise InputError(f"judge {path} is a {network.kind} network{mask}; a judge is autoregressive.")
  if not network.family.own_tokenizer:
    check_tokenizer(network, tokenizer)
    return JudgeWithTokens(
      judge=likelihood.Judge(network.model, network.params), eos_id=tokenizer.eos_id
    )
  if tokenizer.framed:
    raise InputError(f"judge {path} reads text; proteins need an autoregressive run on proteins.")
  if given:
    raise InputError(generative.TRANSLATED)
  return _translated(network, tokenizer)


def _translated(network, tokenizer):
  """Return a judge that reads texts in its own tokens."""
  theirs = tokenizers.load(network.source)
  return JudgeWithTokens(
    judge=likelihood.Judge(network.model, network.params),
    eos_id=theirs.eos_id,
    retokenise=lambda tokens_BL: generative.retokenise(
      np.where(tokens_BL == tokenizer.mask_id, tokenizer.eos_id, tokens_BL),
      lambda text: theirs.encode(text.replace(tokenizer.eos_text, theirs.eos_text), specials=True),
      decode=tokenizer.decode,
      eos_id=theirs.eos_id,
    ),
  )
