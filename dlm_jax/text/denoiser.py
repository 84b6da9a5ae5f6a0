# SPDX-License-Identifier: Apache-2.0
"""Texts from a denoiser on a grid: its network, its process and its tokenizer."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dlm_jax import convert, draw, fields, models, process, sample
from dlm_jax.convert import places
from dlm_jax.data import dataset, templates, tokenizers
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
  """What a denoiser wrote.

  Attributes:
    texts: one per sample.
    tokens: ids of each, given ones included.
    lengths: tokens of each.
    evaluations: of the denoiser and, of sampler="rgas", of the discriminator, summed over the
      texts. "first_hitting" evaluates once per token that is not given.
  """

  texts: list[str]
  tokens: list[list[int]]
  lengths: list[int]
  evaluations: int


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Pipeline:
  """A loaded diffusion language model; call it to get texts.

  Attributes:
    denoiser: network and parameters.
    process: forward process.
    tokenizer: text ↔ ids.
    length: default number of tokens per text.
    buckets: of proteins: the lengths that sequences were padded to in training.
    source: directory or file of the weights.
    guide: owns the discriminator of sampler="rgas", which lies beside them; read when asked for.
  """

  denoiser: models.Denoiser
  process: process.Absorbing | process.Uniform
  tokenizer: tokenizers.Tokenizer
  length: int
  buckets: tuple[int, ...] = ()
  source: pathlib.Path | None = None
  guide: convert.Weights | None = None

  def __repr__(self) -> str:
    process = type(self.process).__name__
    return f"Pipeline({str(self.source)!r}: {process}, {self.length} tokens, writes on a grid)"

  @property
  def critic(self) -> models.Critic | None:
    """The discriminator beside the network; None without one."""
    return self.guide.read() if self.guide is not None else None

  def sampler(self, data: dataset.Dataset | dataset.Path = "", **options: Any) -> frontier.Sampler:
    """Return this model with options of `sample.generate`, for `frontier.sweep`.

    Args:
      data: of proteins or conversations: the prepared dataset, opened or its directory, whose
        validation records give lengths or prompts.
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
      like = functools.partial(templates.like_validation, dataset.open_dataset(data))
      return frontier.TemplateSampler(templates=like, **given)
    return frontier.Sampler(**given)

  def __call__(
    self, *, steps: int | None = None, num: int = 1, seed: int = 0, prompt: str = "", **options: Any
  ) -> list[str]:
    """Return `num` texts; from a model of proteins, sequences of `length` residues.

    Args:
      steps: network evaluations per text; None: 16.
      num: number of texts.
      seed: text i of a seed is the same whatever `num`.
      prompt: text that every sample starts with; it follows the document separator, or the start
        of a protein.
      **options: of `sample.generate`, e.g. temperature=0.9, length=64.

    Raises:
      InputError: an option is none of the sampler, or out of range.

    Example:
      >>> pipe = load("runs/quickstart/student")  # doctest: +SKIP
      >>> print(pipe(steps=8, num=1)[0])  # doctest: +SKIP
    """
    return self.generate(prompt, steps=steps, num=num, seed=seed, **options).texts

  def generate(
    self, prompt: str = "", *, steps: int | None = None, num: int = 1, seed: int = 0, **options: Any
  ) -> Samples:
    """Return texts with their tokens and the evaluations that they took; arguments as for a call.

    Raises:
      InputError: see a call.
    """
    _check_options(options)
    steps = _STEPS if steps is None else steps
    rows = jax.device_get(self.tokens(steps=steps, num=num, seed=seed, prompt=prompt, **options))
    return Samples(
      texts=[self.tokenizer.decode(row) for row in rows],
      tokens=[row.tolist() for row in rows],
      lengths=[len(row) for row in rows],
      evaluations=self._evaluations(rows.shape, steps, prompt, options),
    )

  def _evaluations(self, shape, steps, prompt, options):
    """Return evaluations of all networks, in all texts."""
    _, frozen, _ = self._start(prompt, options.get("length"))
    given = 0 if frozen is None else int(frozen.sum())
    options = {"steps": steps, "proc": self.process, **options, "length": shape[1] - given}
    return shape[0] * sum(sample.evaluations(**options).values())

  def tokens(
    self, *, steps: int = 16, num: int = 1, seed: int = 0, prompt: str = "", **options: Any
  ) -> Int[Array, "B L"] | tuple[Int[Array, "B L"], Int[Array, "K B L"]]:
    """Return ids instead of texts; arguments as for a call, and return_trace.

    A protein's are its start, residues, end, and padding up to the bucket that it was trained in.
    """
    steps, num = fields.Whole(-fields.MOST).check("steps", steps), fields.Whole(1).check("num", num)
    seed = fields.SEED.check("seed", seed)
    given, frozen, length = self._start(prompt, options.pop("length", None))
    critic = self.critic if options.get("sampler") == "rgas" else None
    run = _generate(self.process, num, length, steps, self._key(options, critic))
    frontier.check_room(self.denoiser, "num", num, length, steps)
    drawn = run(self.denoiser, critic, draw.key(seed), given, frozen)
    dtype = getattr(getattr(getattr(self.denoiser, "model", None), "config", None), "dtype", None)
    rows = np.asarray(drawn[0] if isinstance(drawn, tuple) else drawn)
    check_logits(self.source, rows == draw.NONE, dtype)
    return drawn

  def given(self, prompt: str = "", length: int | None = None) -> Bool[np.ndarray, "L"]:
    """Return where nothing is drawn: at the prompt, and in the frame of a protein.

    Raises:
      InputError: see a call.
    """
    _, frozen, count = self._start(prompt, length)
    given_L = np.zeros(count, bool)
    if frozen is not None:
      given_L[: len(frozen)] = frozen
    return given_L

  def _key(self, options: dict[str, Any], critic: models.Critic | None) -> tuple:
    """Return options that were checked as they name a program: 2 and 2.0 are not the same one."""
    for name, instead in _OURS.items():
      if name in options:
        raise InputError(f"{name} is no option of a model with its tokenizer; {instead}.")
    options = {name: _constant(value) for name, value in options.items()}
    asked = {name: value for name, value in options.items() if name != "return_trace"}
    sampler = asked.pop("sampler", "ancestral")
    guided = asked if critic is None else {**asked, "critic": critic}
    sample.check_options(sampler, self.process, guided)
    for name, value in options.items():
      try:
        hash(value)
      except TypeError:
        raise InputError(
          f"{name}={fields.shown(value)} names a program, so it must be hashable; give numbers, "
          "texts or tuples, or call sample.generate."
        ) from None
    return tuple((name, value, type(value)) for name, value in sorted(options.items()))

  def _start(self, prompt: str, length: int | None):
    """Return what is given, where it is, and how many positions there are in all."""
    tokenizer, prompt = self.tokenizer, fields.Text().check("prompt", prompt)
    length = fields.Optional(fields.Whole(-fields.MOST)).check("length", length)
    if not tokenizer.framed:
      if not prompt:
        return None, None, self.length if length is None else length
      given = np.array([tokenizer.eos_id, *tokenizer.encode(prompt)], np.int32)
      # Said outright what is given: a uniform process has no id that means "to be generated".
      return given, np.ones(given.shape, bool), self.length if length is None else length
    residues = self.length - 2 if length is None else length
    bucket = templates.bucket_of(residues, self.buckets or (self.length,))
    row_L = tokenizer.template(residues, bucket)
    start = tokenizer.encode(prompt)
    if len(start) > residues:
      raise InputError(f"the prompt has {len(start)} residues and length={residues}; shorten it.")
    row_L[1 : len(start) + 1] = start
    return row_L, row_L != tokenizer.mask_id, len(row_L)


_STEPS = 16
_OURS = {  # arguments of `sample.generate` that follow from others here
  "batch": "ask for num texts",
  "critic": "the discriminator beside the network is taken",
  "denoiser": "it has one",
  "frozen": "the prompt is what stays; other tokens are for sample.generate",
  "proc": "it has one",
  "rng": "give a seed",
}
_GUIDED = ("h", "candidates", "ratio", "reward")  # of sampler="rgas": they decide its evaluations
_ELSEWHERE = (
  "block_length",
  "chat",
  "confidence",
  "draft",
  "layout",
  "max_new_tokens",
  "stop",
  "strategy",
  "threshold",
  "top_k",
  "top_p",
  "verify",
)


def _check_options(options):
  """Refuse what only decoders of blocks have; a sampler knows its own options."""
  if options.get("return_trace"):
    raise InputError("return_trace gives states besides texts; ask `tokens` for them.")
  for name in options:
    if name in _ELSEWHERE:
      raise InputError(
        f"{name} is an option of networks that decode blocks, and this one denoises on a grid; it "
        "takes steps, num, seed, prompt, length, sampler, precision, and those of the sampler: "
        "temperature, nucleus, noise_removal, grid, …"
      )


def _constant(value):
  """Return lists as tuples and arrays without axes as numbers: what can name a program."""
  if isinstance(value, list | tuple):
    return tuple(map(_constant, value))
  return value.item() if isinstance(value, np.ndarray | jax.Array) and not value.ndim else value


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
      **{name: value for name, value, _ in options},
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
  dtype = default_dtype() if dtype is None else dtype
  if (opened := convert.open_network(source)).writes != "grid":
    raise InputError(f"{source} is a {opened.kind} network; sampling needs a denoiser.")
  tokenizer = load_tokenizer(source, tokenizer)
  network = convert.open_network(source, dtype=dtype, weights=weights)
  check_vocabulary(source, tokenizer, network.process)
  facts = {"buckets": fields.Items(fields.Whole(3))}
  facts = fields.read(f"{source}: dlm_jax", network.facts, facts, {"buckets": ()})
  guide = functools.partial(convert.load_beside, source, "discriminator", dtype=dtype)
  return Pipeline(
    denoiser=models.Denoiser(network.model, network.params).cast(jnp.dtype(dtype)),
    process=network.process,
    tokenizer=tokenizer,
    length=network.model.config.length,
    buckets=facts["buckets"],
    source=source,
    guide=convert.Weights(guide),
  )


def check_logits(
  source: pathlib.Path | None, wrong_BL: Bool[np.ndarray, "B L"], dtype: str | None
) -> None:
  """Refuse texts of which some tokens came from logits that are no numbers.

  Args:
    source: of the network, for the message.
    wrong_BL: where.
    dtype: of the network's products.

  Raises:
    InputError: there are such tokens.
  """
  if wrong_BL.any():
    row, place = (int(axis[0]) for axis in np.nonzero(wrong_BL))
    raise InputError(
      f"{source}: the logits of token {place + 1} of text {row + 1} are NaN or infinite, "
      "though its weights are finite; "
      + ("fetch or train it again." if dtype == "float32" else "try dtype='float32'.")
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


def check_vocabulary(
  source: pathlib.Path, tokenizer: tokenizers.Tokenizer, proc: process.Process
) -> None:
  """Check that a tokenizer has the tokens of a network.

  An absorbing process has the mask besides. A uniform one may have one row of padding besides, as
  public Duo checkpoints do: should it be drawn, it decodes to MASK_SYMBOL.

  Raises:
    InputError: the sizes differ.
  """
  size, given = proc.vocab_size, tokenizer.vocab_size
  uniform = not process.has_mask(proc)
  if given == size - 1 or (uniform and given == size):
    return
  wanted = f"{size} or, without padding, {size - 1}" if uniform else f"{size - 1} besides the mask"
  raise InputError(f"{source}: the tokenizer has {given} tokens and the network {wanted}.")
