# SPDX-License-Identifier: Apache-2.0
"""Texts from a denoiser on a grid: its network, its process and its tokenizer."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dlm_jax import convert, models, process, sample
from dlm_jax.convert import places
from dlm_jax.data import templates, tokenizers
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
  """A loaded diffusion language model; call it to get texts.

  Attributes:
    denoiser: network and parameters.
    process: forward process.
    tokenizer: text ↔ ids.
    length: default number of tokens per text.
    buckets: of proteins: the lengths that sequences were padded to in training.
    source: directory or file of the weights; the discriminator of sampler="rgas" lies there too.
  """

  denoiser: models.Denoiser
  process: process.Absorbing | process.Uniform
  tokenizer: tokenizers.Tokenizer
  length: int
  buckets: tuple[int, ...] = ()
  source: pathlib.Path | None = None

  @functools.cached_property
  def critic(self) -> models.Critic | None:
    """The discriminator beside the network, read when it is first asked for; None without one."""
    if self.source is None:
      return None
    return convert.load_discriminator(self.source, dtype=self.denoiser.model.config.dtype)

  def sampler(self, data: str | pathlib.Path = "", **options: Any) -> frontier.Sampler:
    """Return this model with options of `sample.generate`, for `frontier.sweep`.

    Args:
      data: of proteins or conversations: the prepared dataset whose validation records give lengths
        or prompts.
      **options: of the sampler.
    """
    given = {
      "denoiser": self.denoiser,
      "process": self.process,
      "length": self.length,
      "options": options,
      "critic": self.critic if options.get("sampler") == "rgas" else None,
    }
    if data:
      like = functools.partial(templates.like_validation, data)
      return frontier.TemplateSampler(templates=like, **given)
    return frontier.Sampler(**given)

  def __call__(
    self, *, steps: int = 16, num: int = 1, seed: int = 0, prompt: str = "", **options: Any
  ) -> list[str]:
    """Return `num` texts; from a model of proteins, sequences of `length` residues.

    Args:
      steps: network evaluations per text.
      num: number of texts.
      seed: text i of a seed is the same whatever `num`.
      prompt: text that every sample starts with; it follows the document separator, or the start
        of a protein.
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
    """Return ids instead of texts; arguments as for a call, and return_trace.

    A protein's are its start, residues, end, and padding up to the bucket that it was trained in.
    """
    given, frozen, length = self._start(prompt, options.pop("length", None))
    run = _generate(self.process, num, length, steps, tuple(sorted(options.items())))
    critic = self.critic if options.get("sampler") == "rgas" else None
    return run(self.denoiser, critic, jax.random.key(seed), given, frozen)

  def _start(self, prompt: str, length: int | None):
    """Return what is given, where it is, and how many positions there are in all."""
    words = self.tokenizer
    if not words.given_ids:
      if not prompt:
        return None, None, self.length if length is None else length
      given = np.array([words.eos_id, *words.encode(prompt)], np.int32)
      # Said outright what is given: a uniform process has no id that means "to be generated".
      return given, np.ones(given.shape, bool), self.length if length is None else length
    residues = self.length - 2 if length is None else length
    row_L = words.template(residues, templates.bucket_of(residues, self.buckets or (self.length,)))
    start = words.encode(prompt)
    if len(start) > residues:
      raise InputError(f"the prompt has {len(start)} residues and length={residues}; shorten it.")
    row_L[1 : len(start) + 1] = start
    return row_L, row_L != words.mask_id, len(row_L)


@functools.lru_cache(maxsize=32)
def _generate(proc, batch, length, steps, options):
  """Return a compiled sampler; the cache makes the second call of a notebook cell fast."""

  def run(denoiser, critic, rng, prompt, frozen):
    guide = {} if critic is None else {"critic": critic}
    return sample.generate(
      denoiser,
      proc,
      rng,
      batch=batch,
      length=length,
      steps=steps,
      prompt=prompt,
      frozen=frozen,
      **guide,
      **dict(options),
    )

  return jax.jit(run)


def load_denoiser(
  path: str | pathlib.Path,
  tokenizer: str | pathlib.Path | None = None,
  *,
  dtype: str | None = None,
  weights: str | None = None,
) -> Pipeline:
  """Load a denoiser; see `load`.

  Raises:
    InputError: what is there is no denoiser, or see `load`.
  """
  source = places.find_network(path)
  dtype = dtype or default_dtype()
  if not convert.is_denoiser(source):
    kind = convert.read_config(source)["model_type"]
    raise InputError(f"{source} is a {kind} network; sampling needs a denoiser.")
  words = load_tokenizer(source, tokenizer)
  model, params, proc = convert.load(source, dtype=dtype, weights=weights)
  check_vocabulary(source, words, proc)
  denoiser = models.Denoiser(model, params).cast(jnp.dtype(dtype))
  stored = convert.read_config(source).get("dlm_jax")
  buckets = tuple(stored.get("buckets", ())) if isinstance(stored, dict) else ()
  return Pipeline(
    denoiser=denoiser,
    process=proc,
    tokenizer=words,
    length=model.config.length,
    buckets=buckets,
    source=source,
  )


def default_dtype() -> str:
  """Return the dtype of matrix products on this back end: float32 on CPUs, else bfloat16."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_tokenizer(
  source: pathlib.Path, tokenizer: str | pathlib.Path | None = None
) -> tokenizers.Tokenizer:
  """Load the tokenizer of a path, or without one that beside the network."""
  if tokenizer:
    return tokenizers.load(str(tokenizer))
  return tokenizers.load(source.parent if source.is_file() else source)


def check_vocabulary(source: pathlib.Path, tokenizer: tokenizers.Tokenizer, proc) -> None:
  """Check that a tokenizer has the tokens of a network.

  An absorbing process has the mask besides. A uniform one may have one row of padding besides, as
  public Duo checkpoints do: should it be drawn, it decodes to MASK_SYMBOL.

  Raises:
    InputError: the sizes differ.
  """
  size, given = proc.vocab_size, tokenizer.vocab_size
  uniform = isinstance(proc, process.Uniform)
  if given == size - 1 or (uniform and given == size):
    return
  wanted = f"{size} or, without padding, {size - 1}" if uniform else f"{size - 1} besides the mask"
  raise InputError(f"{source}: the tokenizer has {given} tokens and the network {wanted}.")
