# SPDX-License-Identifier: Apache-2.0
"""What `generate` is given, checked before anything is traced: sizes, network, key, prompt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dlm_jax.errors import InputError
from dlm_jax.fields import MOST, Whole, shown


def sizes(batch: Any, length: Any, steps: Any) -> tuple[int, int, int]:
  """Return batch, length and steps as whole numbers whose arrays can be indexed.

  Raises:
    InputError: one is no such number, or together they are too many.
  """
  given = {"batch": batch, "length": length, "steps": steps}
  found = {name: Whole(-MOST).check(name, count) for name, count in given.items()}
  for name, count in found.items():
    if count < 1:
      raise InputError(f"{name}={count}: sampling needs at least 1.")
  batch, length, steps = found.values()
  if batch * length * steps > MOST:
    raise InputError(
      f"batch={batch} × length={length} × steps={steps} are more than {MOST} tokens of all steps, "
      "the most that one call keeps; draw fewer at a time."
    )
  return batch, length, steps


def arguments(denoiser: Any, process: Any, rng: Any) -> None:
  """Raise InputError unless these are a network, a process and a key."""
  whole = all(callable(getattr(denoiser, name, None)) for name in ("trunk", "head"))
  if not whole or hasattr(denoiser, "apply"):
    raise InputError(
      f"denoiser is a {type(denoiser).__name__}; give models.Denoiser(model, params), or "
      "sample.from_logits(function)."
    )
  if not all(hasattr(process, name) for name in ("prior", "vocab_size", "schedule")):
    raise InputError(
      f"proc is a {type(process).__name__}; give the process of the network, e.g. "
      "process.Absorbing(vocab_size=V, mask_id=V - 1)."
    )
  dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
  typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
  if not (typed and shape == ()) and not (dtype == jnp.uint32 and shape == (2,)):
    raise InputError(f"rng={shown(rng)} is not one key; give jax.random.key(seed).")
  _check_finite(denoiser)


def given(prompt: Any, frozen: Any, vocab_size: int) -> None:
  """Raise InputError unless a prompt holds ids of the vocabulary, and what is frozen is boolean.

  Of traced arrays only the types are known.
  """
  if prompt is not None:
    _check_array("prompt", prompt, "iu", "ids")
    if not isinstance(prompt, jax.core.Tracer) and np.size(prompt):
      low, high = np.asarray(prompt).min(), np.asarray(prompt).max()  # concrete, also in a jit
      if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"prompt has the id {wrong}; ids are 0 … {vocab_size - 1}.")
  if frozen is not None:
    _check_array("frozen", frozen, "b", "true or false")


@dataclasses.dataclass(frozen=True)
class Shaped:
  """A denoiser whose arrays are checked as they are traced, which costs nothing when they run.

  Attributes:
    denoiser: the network.
    vocab_size: of the process.
  """

  denoiser: Any
  vocab_size: int

  def __getattr__(self, name: str) -> Any:
    return getattr(self.denoiser, name)

  def __call__(self, tokens: Array, *given: Any, **options: Any) -> Array:
    """Return logits of all positions."""
    logits = self.denoiser(tokens, *given, **options)
    return self._checked("logits", logits, (*tokens.shape[:2], self.vocab_size))

  def trunk(self, tokens: Array, *given: Any, **options: Any) -> Array:
    """Return hidden states, of any width."""
    hidden = self.denoiser.trunk(tokens, *given, **options)
    return self._checked("trunk", hidden, (*tokens.shape[:2], *np.shape(hidden)[2:3]))

  def head(self, hidden: Array, *given: Any, **options: Any) -> Array:
    """Return logits of gathered positions."""
    logits = self.denoiser.head(hidden, *given, **options)
    return self._checked("head", logits, (*hidden.shape[:2], self.vocab_size))

  def _checked(self, what, array, wanted):
    if np.shape(array) != wanted or len(wanted) != 3:
      last = "D" if what == "trunk" else f"V = {self.vocab_size}, the process' vocabulary"
      raise InputError(
        f"denoiser: {what} has shape {list(np.shape(array))}; with {wanted[0]} sequences of "
        f"{wanted[1]} positions it must be [{wanted[0]}, {wanted[1]}, {last}]."
      )
    return array


def _check_array(name, value, kinds, what):
  """Complain unless a value is an array, or lists, of numbers of these kinds."""
  try:
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
  except ValueError:  # lists of several lengths
    dtype = np.dtype(object)
  empty = isinstance(value, list | tuple) and not value
  if np.dtype(dtype).kind not in kinds and not empty:
    raise InputError(f"{name}={shown(value)} must be an array of {what}, got {dtype}.")


def _check_finite(denoiser):
  """Complain about parameters that are not numbers, where they are known here."""
  for leaf in jax.tree.leaves(denoiser):
    known = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if not known or not leaf.is_fully_addressable or not jnp.issubdtype(leaf.dtype, jnp.floating):
      continue
    here = leaf.platform() == "cpu"  # numpy has nothing to compile
    if not bool((np.isfinite(np.asarray(leaf)) if here else jnp.isfinite(leaf)).all()):
      raise InputError("denoiser has parameters that are not finite; load or train it again.")
