# SPDX-License-Identifier: Apache-2.0
"""Methods under `jit`: one operation at a time, tests would compile hundreds of programs."""

import functools
import itertools

import chex
import jax

_NUMBERS = itertools.count()


class Methods:
  """A process or schedule whose methods are compiled; equal ones share programs."""

  def __init__(self, subject):
    self._subject = subject

  def __getattr__(self, name):
    value = getattr(self._subject, name)
    return _method(self._subject, name) if callable(value) else value


@functools.cache
def _method(subject, name):
  lengths = 1 if name == "prior" else ()
  return jax.jit(getattr(subject, name), static_argnums=lengths)


def at_most(function, traces: int = 1):
  """Return the function, which fails when it is traced more often: `chex.assert_max_traces`.

  Counted anew by every call: chex has one counter for the same definition in all tests.
  """

  @functools.wraps(function)
  def counted(*arguments, **options):
    return function(*arguments, **options)

  counted.__name__ = f"{function.__name__}_{next(_NUMBERS)}"
  return chex.assert_max_traces(counted, traces)
