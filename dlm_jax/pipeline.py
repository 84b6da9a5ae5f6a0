# SPDX-License-Identifier: Apache-2.0
"""Strings in three lines: a denoiser, its process and its tokenizer."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dlm_jax import convert, experiment, models, process, sample
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
  """A loaded diffusion language model; call it to get texts.

  Attributes:
    denoiser: network and parameters.
    process: forward process.
    tokenizer: text ↔ ids.
    length: default number of tokens per text.
  """

  denoiser: models.Denoiser
  process: process.Absorbing
  tokenizer: tokenizers.Tokenizer
  length: int

  def __call__(
    self, *, steps: int = 16, num: int = 1, seed: int = 0, prompt: str = "", **options: Any
  ) -> list[str]:
    """Return `num` texts.

    Args:
      steps: network evaluations per text.
      num: number of texts.
      seed: text i of a seed is the same whatever `num`.
      prompt: text that every sample starts with; it follows the document separator.
      **options: of `sample.generate`, e.g. temperature=0.9, length=64.

    Example:
      >>> pipe = load("runs/quickstart/student")  # doctest: +SKIP
      >>> print(pipe(steps=8, num=1)[0])  # doctest: +SKIP
    """
    tokens_BL = self.tokens(steps=steps, num=num, seed=seed, prompt=prompt, **options)
    return [self.tokenizer.decode(row) for row in jax.device_get(tokens_BL)]

  def tokens(
    self, *, steps: int = 16, num: int = 1, seed: int = 0, prompt: str = "", **options: Any
  ) -> Int[Array, "B L"] | tuple[Int[Array, "B L"], Int[Array, "K B L"]]:
    """Return ids instead of texts; arguments as for a call, and return_trace."""
    given = None
    if prompt:
      given = jnp.asarray([self.tokenizer.eos_id, *self.tokenizer.encode(prompt)], jnp.int32)
    length = options.pop("length", self.length)
    run = _generate(self.process, num, length, steps, tuple(sorted(options.items())))
    return run(self.denoiser, jax.random.key(seed), given)


@functools.lru_cache(maxsize=32)
def _generate(proc, batch, length, steps, options):
  """Return a compiled sampler; the cache makes the second call of a notebook cell fast."""

  def run(denoiser, rng, prompt):
    return sample.generate(
      denoiser, proc, rng, batch=batch, length=length, steps=steps, prompt=prompt, **dict(options)
    )

  return jax.jit(run)


def load(path: str | pathlib.Path, *, dtype: str | None = None) -> Pipeline:
  """Load a denoiser for sampling.

  Args:
    path: a workdir of `dlm-jax train`, a directory in the Hugging Face layout with a tokenizer, or
      "shipped:teacher".
    dtype: of matrix products: default float32 on CPU, else bfloat16.

  Raises:
    InputError: no denoiser there, or its tokenizer is missing.
  """
  directory = experiment.network_directory(str(path))
  dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  kind = convert.read_config(directory)["model_type"]
  if kind != "mdlm":
    raise InputError(f"{directory} is a {kind} network; sampling needs a denoiser.")
  model, params, proc = convert.load(directory, dtype=dtype)
  tokenizer = tokenizers.load(directory)
  if tokenizer.vocab_size != proc.vocab_size - 1:
    raise InputError(
      f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens and the network "
      f"{proc.vocab_size - 1} besides the mask."
    )
  denoiser = models.Denoiser(model, params).cast(jnp.dtype(dtype))
  return Pipeline(denoiser=denoiser, process=proc, tokenizer=tokenizer, length=model.config.length)
