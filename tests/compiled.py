# SPDX-License-Identifier: Apache-2.0
"""Methods under `jit`: one operation at a time, tests would compile hundreds of programs."""

import functools

import jax


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
