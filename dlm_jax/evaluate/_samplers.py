# SPDX-License-Identifier: Apache-2.0
"""A denoiser, a process and sampling options as one thing that is called for samples."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dlm_jax import draw, mesh
from dlm_jax.errors import InputError

_KEPT = 4  # arrays as wide as the network that a pass holds at least
_OURS = ("batch", "denoiser", "frozen", "length", "proc", "prompt", "return_trace", "rng", "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """Bind `sample.generate` to a denoiser, a process and its options, for `sweep`.

  Attributes:
    denoiser: a `models.Denoiser`.
    process: forward process.
    length: tokens per sample.
    options: further options of `sample.generate`, e.g. {"temperature": 0.9}.
    critic: discriminator of sampler="rgas".
  """

  denoiser: Any
  process: Any
  length: int
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  critic: Any = None

  def __post_init__(self):
    for name in _OURS:
      if name in self.options:
        raise InputError(f"{name} is no option here: it follows from what is measured.")

  def __call__(self, batch: int, nfe: int) -> Callable[[jax.Array], jax.Array]:
    """Compile sampling of `batch` sequences in `nfe` steps.

    Raises:
      InputError: the denoiser's logits are not numbers; samples would hide it. Or the sampler has
        no such NFE, or the batch is more than the memory there is.
    """
    self._check_sizes(batch, nfe)
    networks = self._networks()
    refuse_unless(_fine(self.denoiser, self.process, self.length))
    compiled = self._compile(networks, batch=batch, nfe=nfe)
    return lambda rng: compiled(*networks, rng)

  def nfes(self, asked: Sequence[int]) -> list[int]:
    """Return the NFEs to measure of those asked for: "first_hitting" has one, a token at a time."""
    return [self.length] if self.options.get("sampler") == "first_hitting" else list(asked)

  def evaluations(self, nfe: int) -> int:
    """Return the evaluations of all networks that a sample takes, see `sample.evaluations`."""
    from dlm_jax import sample

    sizes = {"steps": nfe, "proc": self.process, "length": self.length}
    return sum(sample.evaluations(**{**self.options, **sizes}).values())

  def check(self, batch: int = 1, nfe: int = 1, samples: int = 1) -> None:
    """Trace one step; compute nothing.

    Raises:
      InputError: the sampler does not take its options or has no such NFE, or memory does not hold
        a batch, or all samples.
    """
    self._check_sizes(batch, nfe, samples)
    generate = functools.partial(self._generate, batch=1, nfe=1)
    jax.eval_shape(generate, *self._networks(), jax.random.key(0))

  def _check_sizes(self, batch, nfe, samples=1):
    if nfe not in self.nfes([nfe]):
      raise InputError(
        "sampler='first_hitting' takes one evaluation per masked token whatever the NFE, so it has "
        f"no frontier but one point, NFE {self.length}; ask for that, or use 'ancestral'."
      )
    check_room(self.denoiser, "batch_size", batch, self.length, nfe)
    mesh.check_room(f"samples={samples} × length={self.length} tokens", 4 * samples * self.length)

  def _networks(self):
    return self.denoiser, self.critic if self.options.get("sampler") == "rgas" else None

  def _compile(self, networks, *given, **sizes):
    run = jax.jit(functools.partial(self._generate, **sizes))
    return run.lower(*networks, jax.random.key(0), *given).compile()

  def _generate(self, denoiser, critic, rng, prompt=None, frozen=None, *, batch, nfe):
    from dlm_jax import sample

    if prompt is None and getattr(self.process, "blocked", ()):
      raise InputError(
        "proteins are drawn with a start, an end and given lengths: those of --data=DIR, a "
        "prepared dataset of them."
      )
    guide = {} if critic is None else {"critic": critic}
    given = {"prompt": prompt, "frozen": frozen, "steps": nfe, **guide, **self.options}
    length = self.length if prompt is None else prompt.shape[1]
    return sample.generate(denoiser, self.process, rng, batch=batch, length=length, **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateSampler(Sampler):
  """Draw what templates leave open: residues between start and end, answers to prompts.

  Attributes:
    templates: (samples, batch) -> `data.templates.Templates` or `Answers`: what is given.
  """

  templates: Callable[[int, int], Any]

  def nfes(self, asked: Sequence[int]) -> list[int]:
    """Return the NFEs asked for.

    Raises:
      InputError: of "first_hitting", whose evaluations differ from text to text here.
    """
    if self.options.get("sampler") == "first_hitting":
      raise InputError(
        "sampler='first_hitting' takes as many evaluations as a text has tokens to draw, which "
        "differ here; use 'ancestral'."
      )
    return list(asked)

  def check(self, batch: int = 1, nfe: int = 1, samples: int = 1) -> None:
    """Trace one step; see `Sampler.check`."""
    self._check_sizes(batch, nfe, samples)
    given = self.templates(1, 1)
    generate = functools.partial(self._generate, batch=1, nfe=1)
    shapes = _shapes(1, given.lengths[0])
    jax.eval_shape(generate, *self._networks(), jax.random.key(0), *shapes)

  def draw(self, nfe: int, samples: int, batch: int, seed: int) -> tuple[np.ndarray, float]:
    """Return int32 [samples, longest bucket], and the seconds that they took without compilation.

    A batch holds one bucket; rows that fill up a bucket's last batch cost time, too.
    """
    self._check_sizes(batch, nfe, samples)
    given, networks = self.templates(samples, batch), self._networks()
    refuse_unless(_fine(self.denoiser, self.process, given.lengths[0]))
    compiled = {
      length: self._compile(networks, *_shapes(batch, length), batch=batch, nfe=nfe)
      for length in given.lengths
    }
    rng = jax.random.fold_in(draw.key(seed), nfe)
    start = time.perf_counter()

    def run(number, prompt_BL):
      key = jax.random.fold_in(rng, number)
      open_BL = prompt_BL == given.tokenizer.mask_id
      return compiled[prompt_BL.shape[1]](*networks, key, prompt_BL, ~open_BL)

    tokens_NL = given.draw(run)
    return tokens_NL, time.perf_counter() - start


def check_room(denoiser: Any, name: str, count: int, length: int, steps: int) -> None:
  """Refuse samples that the memory of this machine cannot hold.

  Args:
    denoiser: a network of known or unknown width.
    name: of the option that asks for so many at a time.
    count: samples at a time.
    length: tokens of each.
    steps: states of each that may be kept.

  Raises:
    InputError: they do not fit.
  """
  config = getattr(getattr(denoiser, "model", None), "config", None)
  floats = count * length * (_KEPT * getattr(config, "dim", 1) + max(steps, 1))
  mesh.check_room(f"{name}={count} × length={length} tokens in {steps} steps", 4 * floats)


def numbers(denoiser, process, length: int) -> Bool[Array, ""]:
  """Return whether logits at t = 1 are finite or −inf; a draw from others is some token as well."""
  x_1L = process.prior(jax.random.key(0), length)[None]
  logits_1LV = denoiser(x_1L, jnp.broadcast_to(process.schedule.sigma(1.0), (1,)))
  return jnp.all(logits_1LV < jnp.inf)  # NaN is not


_fine = jax.jit(numbers, static_argnums=(1, 2))


def refuse_unless(fine: Bool[Array, ""] | bool) -> None:
  """Raise InputError unless `numbers` says so."""
  if not fine:
    raise InputError(
      "the denoiser's logits hold NaN or infinity, so its samples mean nothing; look for NaN in "
      "its weights."
    )


def _shapes(batch, length):
  """Return the shapes of a batch of templates and of what in them is given."""
  return tuple(jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (np.int32, bool))
