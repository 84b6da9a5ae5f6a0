# SPDX-License-Identifier: Apache-2.0
"""The autoregressive judge of texts: loading one, its tokens, and what it says of samples."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from dlm_jax import convert, process
from dlm_jax.convert import places
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError
from dlm_jax.evaluate import generative, likelihood


def check_tokenizer(
  directory: pathlib.Path, tokenizer: tokenizers.Tokenizer, vocab_size: int, proc=None
) -> None:
  """Check that a network was trained on the tokens of this tokenizer.

  Args:
    directory: of the network, for messages.
    tokenizer: of the data.
    vocab_size: the network's.
    proc: its process: an absorbing one adds the mask, a uniform one may have a row for padding.
  """
  padded = isinstance(proc, process.Uniform) and vocab_size == tokenizer.vocab_size + 1
  vocab_size -= isinstance(proc, process.Absorbing) or padded
  if convert.is_decoder(directory):  # it has rows to spare, for the mask at least
    vocab_size = min(vocab_size, tokenizer.vocab_size)
  stored = convert.read_config(directory).get("dlm_jax", {}).get("tokenizer_fingerprint")
  if vocab_size != tokenizer.vocab_size or stored not in (None, tokenizer.fingerprint):
    raise InputError(
      f"{directory} has a vocabulary of {vocab_size} tokens and the data one of "
      f"{tokenizer.vocab_size}{'' if vocab_size != tokenizer.vocab_size else ' others'}; prepare "
      f"the data with --config.data.tokenizer={directory}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeWithTokens:
  """A judge and, if it has a tokenizer of its own, how to translate to its tokens."""

  judge: likelihood.Judge
  eos_id: int
  retokenise: Any = None

  def settings(self) -> dict[str, Any]:
    """Return the arguments of `frontier.sweep` that a judge decides."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def quality(
    self, tokens_BL: np.ndarray, batch_size: int, valid_NL: np.ndarray | None = None
  ) -> generative.Quality:
    """Return GenPPL and entropy of samples in the generator's ids, where they are valid."""
    translated = self.retokenise(tokens_BL) if self.retokenise else None
    return generative.quality(
      self.judge,
      tokens_BL,
      eos_id=self.eos_id,
      batch_size=batch_size,
      retokenised=translated,
      valid_NL=valid_NL,
    )


def load_judge(path: str, tokenizer: tokenizers.Tokenizer) -> JudgeWithTokens:
  """Load a judge for texts of a tokenizer: one of our runs, or a GPT-2 directory with BPE files.

  Raises:
    InputError: it is not autoregressive, or was trained on other tokens.
  """
  if not path:
    raise InputError("evaluate.judge is empty; name the workdir of an autoregressive run.")
  directory = places.network_directory(path)
  kind = convert.read_config(directory)["model_type"]
  if kind == "gpt2" and tokenizer.given_ids:
    raise InputError(f"judge {path} reads text; proteins need an autoregressive run on proteins.")
  if kind == "gpt2":
    model, params, _ = convert.load(directory)
    theirs = tokenizers.load(directory)
    return JudgeWithTokens(
      judge=likelihood.Judge(model, params),
      eos_id=theirs.eos_id,
      retokenise=lambda tokens_BL: generative.retokenise(
        np.where(tokens_BL == tokenizer.mask_id, tokenizer.eos_id, tokens_BL),
        lambda text: theirs.encode(
          text.replace(tokenizer.eos_text, theirs.eos_text), specials=True
        ),
        decode=tokenizer.decode,
        eos_id=theirs.eos_id,
      ),
    )
  decoder = convert.is_decoder(directory)
  if kind != "dlm_jax_causal" and not decoder:
    raise InputError(f"judge {path} is a {kind} network; a judge is autoregressive.")
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  model, params, proc = convert.load(directory, dtype=dtype)
  if proc is not None:
    raise InputError(f"judge {path} is a {kind} network with a mask; a judge is autoregressive.")
  check_tokenizer(directory, tokenizer, model.config.vocab_size)
  return JudgeWithTokens(judge=likelihood.Judge(model, params), eos_id=tokenizer.eos_id)
