# SPDX-License-Identifier: Apache-2.0
"""Time grids for sampling: K + 1 decreasing times from 1 (noise) to `end`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.errors import InputError
from dlm_jax.fields import shown

END = 1e-5  # where the published samplers stop; leftover masks there are left to noise removal


def uniform(steps: int, end: float = END) -> Float[Array, "K"]:
  """Return equally spaced times: the grid of every published few-step number."""
  return jnp.linspace(1.0, end, steps + 1)


def cosine(steps: int, end: float = END) -> Float[Array, "K"]:
  """Return times that move slowly near t = 1: few tokens per step while the context is empty."""
  return jnp.maximum(jnp.cos(jnp.pi / 2 * jnp.linspace(0.0, 1.0, steps + 1)), end)


def rising(steps: int, end: float = END, *, length: int) -> Float[Array, "K"]:
  """Return what is to be left of the masks, so that few tokens are revealed first and more later.

  For spaced orders. On a log-linear schedule these are times; else `orders.times` has them. After k
  of K steps a share (k/K)^p is revealed, p = 1 + 0.6 (1 − 1/K)(1 − K/L): while the context is
  empty a group's members have nothing to lean on, late they have neighbours on both sides. As
  many steps as tokens reveal one each.

  Args:
    steps: K.
    end: the last time.
    length: L.
  """
  power = 1 + 0.6 * (1 - 1 / steps) * max(1 - steps / length, 0)
  return 1 - (1 - end) * jnp.linspace(0.0, 1.0, steps + 1) ** power


_NAMES = {"uniform": uniform, "cosine": cosine, "rising": rising}


def check(name: str) -> None:
  """Raise InputError unless a grid has this name."""
  if not isinstance(name, str) or name not in _NAMES:
    raise InputError(f"grid={shown(name)} is unknown; use one of {', '.join(sorted(_NAMES))}.")


def make(name: str, steps: int, end: float = END, *, length: int = 1) -> Float[Array, "K"]:
  """Return the named grid, float32 [steps + 1]; `length` is that of a sequence, for "rising".

  Raises:
    InputError: steps < 1, or an unknown name.
  """
  if steps < 1:
    raise InputError(f"steps={steps}: sampling needs at least 1 step.")
  check(name)
  return rising(steps, end, length=length) if name == "rising" else _NAMES[name](steps, end)
