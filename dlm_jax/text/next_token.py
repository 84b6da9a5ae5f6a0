# SPDX-License-Identifier: Apache-2.0
"""Texts from networks that predict next tokens: a judge, or GPT-2, writes what it would score."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import draw
from dlm_jax.arrays import Params
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError
from dlm_jax.fields import MOST, SEED, Number, Text, Whole
from dlm_jax.mesh import check_room
from dlm_jax.models import next_token_logits
from dlm_jax.models.protocols import NextToken
from dlm_jax.text.denoiser import Samples, check_logits


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TextContinuation:
  """A next-token network with its tokenizer; call it to get texts.

  It has no cache: every token is a pass over the whole text. That serves to see what a judge takes
  for likely, and to draw from it; it is not how to serve a language model.

  Attributes:
    model: the network.
    params: its parameters.
    tokenizer: text ↔ ids.
    length: the most, and by default the number of, tokens per text.
    source: directory of the weights.
  """

  model: NextToken
  params: Params
  tokenizer: tokenizers.Tokenizer
  length: int
  source: pathlib.Path

  def __repr__(self) -> str:
    return f"TextContinuation({str(self.source)!r}: {self.length} tokens, one after the other)"

  @property
  def _width(self) -> int:
    """Numbers per position that a pass holds at least: its logits."""
    return self.model.config.vocab_size

  def __call__(
    self, *, steps: int | None = None, num: int = 1, seed: int = 0, prompt: str = "", **options: Any
  ) -> list[str]:
    """Return `num` texts.

    Args:
      steps: is for other networks: here every token takes one evaluation.
      num: number of texts.
      seed: text i of a seed is the same whatever `num`.
      prompt: text that every sample starts with; it follows the document separator.
      **options: length, in tokens with separator and prompt; temperature, nucleus and top_k, see
        `draw.sharpen`. A text goes on behind the end of a document, as the packed data does.

    Raises:
      InputError: an option is none of these, or out of range.

    Example:
      >>> judge = load("shipped:novels-judge")  # doctest: +SKIP
      >>> print(judge(num=1, prompt="It was ", length=64)[0])  # doctest: +SKIP
    """
    return self.generate(prompt, steps=steps, num=num, seed=seed, **options).texts

  def generate(
    self,
    prompt: str = "",
    *,
    steps: int | None = None,
    num: int = 1,
    seed: int = 0,
    length: int | None = None,
    temperature: float = 1.0,
    nucleus: float = 1.0,
    top_k: int = 0,
    **others: Any,
  ) -> Samples:
    """Return texts with their tokens and the evaluations that they took; arguments as for a call.

    Raises:
      InputError: see a call.
    """
    if others or steps is not None:
      raise InputError(
        f"{next(iter(others), 'steps')} is no option of a network that writes one token after the "
        "other; it takes num, seed, prompt, length, temperature, nucleus and top_k."
      )
    prompt, num = Text().check("prompt", prompt), Whole(1).check("num", num)
    seed, top_k = SEED.check("seed", seed), Whole(-MOST).check("top_k", top_k)
    length = self.length if length is None else Whole(-MOST).check("length", length)
    temperature, nucleus = (
      Number().check(*one) for one in (("temperature", temperature), ("nucleus", nucleus))
    )
    given = [self.tokenizer.eos_id, *self.tokenizer.encode(prompt)]
    _check(len(given), length, self.length, temperature, nucleus, top_k)
    check_room(f"num={num} × length={length} tokens", 4 * num * length * self._width)
    tokens_BL = np.full((num, length), self.tokenizer.eos_id, np.int32)
    tokens_BL[:, : len(given)] = given
    arguments = (tokens_BL, len(given), draw.key(seed), temperature, nucleus)
    rows = self.tokenizer.vocab_size
    written_BL = np.asarray(_write(self.model, rows, top_k, self.params, *arguments))
    check_logits(self.source, written_BL == draw.NONE, getattr(self.model.config, "dtype", None))
    return Samples(
      texts=[self.tokenizer.decode(row) for row in written_BL],
      tokens=written_BL.tolist(),
      lengths=[length] * num,
      evaluations=num * (length - len(given)),
    )


def _check(given, length, most, temperature, nucleus, top_k):
  """Complain about numbers out of range."""
  if not given < length <= most:
    raise InputError(
      f"length={length}: separator and prompt are {given} tokens and this network reads {most}; "
      f"use {given + 1} … {most}."
      if given < most
      else f"the prompt is {given - 1} tokens and this network reads {most}; shorten it."
    )
  if temperature < 0 or not 0 < nucleus <= 1 or top_k < 0:
    raise InputError(
      f"temperature={temperature} must be 0 or more, nucleus={nucleus} in (0, 1] and top_k={top_k} "
      "0 or more; temperature=0 takes the most probable tokens."
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(model, rows, top_k, params, tokens_BL, given, rng, temperature, nucleus):
  """Fill rows up from position `given` on; other numbers and prompts are no other program."""
  rng_B = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(len(tokens_BL)))

  def one(place, tokens_BL):
    logits_BLV = next_token_logits(model, params, tokens_BL)
    logits_BV = draw.sharpen(logits_BLV[:, place - 1, :rows], temperature, nucleus, top_k)
    uniform_B2 = jax.vmap(lambda rng: draw.uniforms(jax.random.fold_in(rng, place), ()))(rng_B)
    return tokens_BL.at[:, place].set(draw.softmax(logits_BV).draw(uniform_B2))

  return jax.lax.fori_loop(given, tokens_BL.shape[1], one, tokens_BL)
