# SPDX-License-Identifier: Apache-2.0
"""Networks as bytes, so that functions of a `Denoiser` can be stored by `jax.export`.

What is stored of a network is its class, one of this package, and its config, as a Python literal:
nothing is executed when it is read. `jax.export` itself needs the package flatbuffers to write
bytes or read them.
"""

import ast
import dataclasses
import sys
from typing import Any

from jax import export

from dlm_jax.errors import InputError

_OF_LINEN = ("parent", "name")  # fields of every module


def exportable(kind: type) -> type:
  """Let `jax.export` store arguments of this class, whose static data are networks."""
  return export.register_pytree_node_serialization(
    kind,
    serialized_name=f"dlm_jax.{kind.__name__}",
    serialize_auxdata=to_bytes,
    deserialize_auxdata=from_bytes,
  )


def to_bytes(static: Any) -> bytes:
  """Return static data of a pytree as bytes.

  Raises:
    InputError: it holds a network that is not of this package.
  """
  return repr(_described(static)).encode()


def from_bytes(stored: bytes | bytearray) -> Any:
  """Return what `to_bytes` was given."""
  return _made(ast.literal_eval(bytes(stored).decode()))


def _described(value):
  """Return literals as they are, and an object of ours as {class: fields}."""
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, tuple):
    return tuple(map(_described, value))
  name = type(value).__name__
  if getattr(sys.modules[__package__], name, None) is not type(value):
    raise InputError(
      f"jax.export cannot store a {name}, which is no network of dlm_jax.models; export a function "
      "of the parameters, and bind them inside."
    )
  fields = [field.name for field in dataclasses.fields(value) if field.name not in _OF_LINEN]
  return {name: {field: _described(getattr(value, field)) for field in fields}}


def _made(stored):
  if isinstance(stored, tuple):
    return tuple(map(_made, stored))
  if not isinstance(stored, dict):
    return stored
  ((name, fields),) = stored.items()
  kind = getattr(sys.modules[__package__], name)
  return kind(**{field: _made(value) for field, value in fields.items()})
