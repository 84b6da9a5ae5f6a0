# SPDX-License-Identifier: Apache-2.0
"""What may come from outside, declared: the type and the range of a field, of JSON or of options.

A kind checks one value and returns it as the rest of the library wants it:

  Whole(1, 4096)     a whole number: 2 and numpy's 2, never True, nor 2.0, which only JSON may mean
  Number("(0, 1]")   a finite number of an interval
  Switch, Text, Items(kind, count), Object, Optional(kind), Either(kinds)

Every complaint is an InputError of one line that names the field, the value and what is allowed.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jaxtyping
import numpy as np

from dlm_jax.errors import MOST, InputError, check_choice

WORD = 2**63 - 1  # of bytes
_SHOWN = 60  # characters of a value in a message


class Kind:
  """What a field may hold; `phrase` says it."""

  phrase = "anything"

  def check(self, name: str, value: Any) -> Any:
    """Return the value; raise InputError unless it is of this kind."""
    del name
    return value

  def refuse(self, name: str, value: Any) -> InputError:
    """Return the complaint about a value of another type."""
    return InputError(f"{name}={shown(value)} is not {self.phrase}.")


@dataclasses.dataclass(frozen=True)
class Whole(Kind):
  """A whole number from `least` to `most`."""

  least: int = 0
  most: int = MOST

  @property
  def phrase(self) -> str:
    return "a whole number" + (f" of at least {self.least}" if self.least >= 0 else "")

  def check(self, name: str, value: Any) -> int:
    try:
      found = operator.index(value)
    except TypeError:  # tracers raise a kind of it
      found = None
    if found is None or isinstance(value, bool | np.bool_):
      raise self.refuse(name, value)
    if found < self.least:
      raise InputError(f"{name}={shown(found)} must be at least {self.least}.")
    if found > self.most:
      raise InputError(f"{name}={shown(found)} must be at most {self.most}.")
    return found


SEED = Whole(-(2**63), WORD)  # of 64 bits, see `draw.key`


@dataclasses.dataclass(frozen=True)
class Number(Kind):
  """A finite number of an interval as it is written: "(0, 1]", "[0, ∞)"; "" is any."""

  interval: str = ""

  @property
  def phrase(self) -> str:
    return "a finite number" + (f" in {self.interval}" if self.interval else "")

  def check(self, name: str, value: Any) -> float:
    number = _float(value)
    if number is None or not math.isfinite(number):
      raise self.refuse(name, value)
    if self.interval:
      ends = self.interval[1:-1].replace("∞", "inf").split(",")
      low, high = map(float, ends)
      above = number > low if self.interval[0] == "(" else number >= low
      below = number < high if self.interval[-1] == ")" else number <= high
      if not (above and below):
        raise InputError(f"{name}={shown(value)} must be in {self.interval}.")
    return number


class AnyArray(Kind):
  """An array; where a number may be one, the class that takes it says of which shape."""

  phrase = "an array"

  def check(self, name: str, value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
      raise self.refuse(name, value)
    return value


class Switch(Kind):
  """True or False."""

  phrase = "true or false"

  def check(self, name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
      raise InputError(f"{name}={shown(value)} is neither true nor false.")
    return bool(value)


@dataclasses.dataclass(frozen=True)
class Text(Kind):
  """A text; one of `allowed` if there are any."""

  allowed: tuple[str, ...] = ()
  phrase = "a text"

  def check(self, name: str, value: Any) -> str:
    if not isinstance(value, str):
      raise self.refuse(name, value)
    if self.allowed:
      check_choice(name, value, self.allowed)
    return value


@dataclasses.dataclass(frozen=True)
class Items(Kind):
  """A list of things of one kind, so many of them if a count is given."""

  kind: Kind = Kind()  # noqa: RUF009 (frozen)
  count: int | None = None

  @property
  def phrase(self) -> str:
    return "a list" if self.count is None else f"a list of {self.count}"

  def check(self, name: str, value: Any) -> tuple:
    if not isinstance(value, list | tuple) or self.count not in (None, len(value)):
      raise self.refuse(name, value)
    return tuple(self.kind.check(f"{name}[{i}]", one) for i, one in enumerate(value))


@dataclasses.dataclass(frozen=True)
class Object(Kind):
  """An object of JSON; `has` are fields that it must have, others are free."""

  has: Mapping[str, Kind] = dataclasses.field(default_factory=dict)
  phrase = "an object"

  def check(self, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
      raise InputError(f"{name} must be an object, got {named(value)}.")
    read(name, value, self.has)
    return dict(value)


@dataclasses.dataclass(frozen=True)
class Objects(Kind):
  """An object of JSON whose values, by whatever name, are all of one kind."""

  kind: Kind
  phrase = "an object"

  def check(self, name: str, value: Any) -> dict[str, Any]:
    given = Object().check(name, value)
    return {key: self.kind.check(f"{name}.{key}", one) for key, one in given.items()}


@dataclasses.dataclass(frozen=True)
class Optional(Kind):
  """Something of a kind, or nothing: None, null in JSON."""

  kind: Kind

  @property
  def phrase(self) -> str:
    return f"{self.kind.phrase} or none"

  def check(self, name: str, value: Any) -> Any:
    return None if value is None else self.kind.check(name, value)


@dataclasses.dataclass(frozen=True)
class Either(Kind):
  """Something of the first kind that fits."""

  kinds: tuple[Kind, ...]

  @property
  def phrase(self) -> str:
    return " or ".join(kind.phrase for kind in self.kinds if not isinstance(kind, AnyArray))

  def check(self, name: str, value: Any) -> Any:
    for kind in self.kinds:
      try:
        return kind.check(name, value)
      except InputError:
        continue
    raise self.refuse(name, value)


def read(
  where: Any, content: Any, kinds: Mapping[str, Kind], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Return the declared fields of an object of JSON; others are left out.

  Args:
    where: the file, for messages; "": the caller names it.
    content: the parsed object.
    kinds: by field.
    defaults: of the fields that may be missing.

  Raises:
    InputError: it is no object, or a field is missing or of another kind.
  """
  if not isinstance(content, Mapping):
    raise InputError(f"{where or 'it'} must be an object, got {named(content)}.")
  found, before = {}, f"{where}: " if where else ""
  for name, kind in kinds.items():
    if name in content:
      found[name] = kind.check(before + name, _whole(kind, content[name]))
    elif defaults is None or name not in defaults:
      raise InputError(f"{where or 'it'} lacks {name!r}.")
    else:
      found[name] = defaults[name]
  return found


def build(cls: type, where: Any, content: Any, **given: Any) -> Any:
  """Return a dataclass from an object of JSON, whose fields are its own, of the types it says.

  Args:
    cls: the dataclass.
    where: the file, for messages.
    content: the parsed object.
    **given: fields that are not read from it.

  Raises:
    InputError: it is no object, or a field is missing, unknown or of another type.
  """
  content = Object().check(str(where or "it"), content)
  known, wanted = [f for f in dataclasses.fields(cls) if f.name not in given], {}
  for field in known:
    needed = field.default is field.default_factory is dataclasses.MISSING
    if needed or field.name in content:
      wanted[field.name] = annotated(field.type)
  found = read(where, content, wanted)
  if unknown := sorted(set(content) - {field.name for field in known}):
    raise InputError(f"{where or 'it'} has the unknown field {unknown[0]!r}.")
  return cls(**found, **given)


def part(where: Any, content: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Return an object inside an object of JSON; {} if it is missing.

  Raises:
    InputError: it is something else.
  """
  return read(where, content, {name: Object()}, {name: {}})[name]


def make(cls: type, given: Mapping[str, Any], prefix: str = "", most: int = WORD) -> Any:
  """Return a dataclass of options that are checked by its annotations before it is made.

  Numbers must be finite; ranges are the class' own, and so are options that it does not know.
  Fields of other types and what is being traced are left alone; lists become tuples.

  Args:
    cls: the dataclass.
    given: its arguments.
    prefix: of the names in messages.
    most: that whole numbers may be.

  Raises:
    InputError: an option is of another type, or see the class.
  """
  kinds, checked = {f.name: annotated(f.type, most) for f in dataclasses.fields(cls)}, dict(given)
  for name, value in given.items():
    if name in kinds and not isinstance(value, jax.core.Tracer):
      checked[name] = kinds[name].check(prefix + name, value)
  return cls(**checked)


def check_types(record: Any, prefix: str = "") -> None:
  """Check every field of a dataclass that users make themselves, in its `__post_init__`.

  As `make` does, which is for those that are made of options by name.

  Args:
    record: a dataclass, frozen or not.
    prefix: of the names in messages.

  Raises:
    InputError: a field is of another type.
  """
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    if not isinstance(value, jax.core.Tracer):
      checked = annotated(field.type).check(prefix + field.name, value)
      if checked is not value:
        object.__setattr__(record, field.name, checked)


@functools.cache
def annotated(annotation: Any, most: int = WORD) -> Kind:
  """Return the kind that an annotation means; of other classes than plain ones, anything."""
  plain = {bool: Switch(), int: Whole(-most, most), float: Number(), str: Text()}
  if annotation in plain:
    return plain[annotation]
  if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
    return AnyArray()
  parts = typing.get_args(annotation)
  if typing.get_origin(annotation) is tuple and parts:
    endless = parts[-1] is ...
    return Items(annotated(parts[0], most), None if endless else len(parts))
  if typing.get_origin(annotation) is dict:
    return Object()
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    kinds = tuple(annotated(part, most) for part in parts if part is not types.NoneType)
    kind = kinds[0] if len(kinds) == 1 else Either(kinds)
    return Optional(kind) if types.NoneType in parts else kind
  return Kind()


def shown(value: Any) -> str:
  """Return a value as a message shows it: one line, cut where it is long."""
  if isinstance(value, int) and value.bit_length() > 200:  # thousands of digits are no repr
    return f"{'-' if value < 0 else ''}10^{int(value.bit_length() * math.log10(2))}"
  text = " ".join(repr(value).split())
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def named(value: Any) -> str:
  """Return what JSON calls the type of a value."""
  known = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
  known |= {str: "a text", list: "a list", dict: "an object"}
  return known.get(type(value), f"a {type(value).__name__}")


def _whole(kind, value):
  """Return 2 for the 2.0 of a file where a whole number is meant: JSON has one kind of number."""
  inner = kind.kind if isinstance(kind, Optional) else kind
  if isinstance(inner, Whole) and isinstance(value, float) and value.is_integer():
    return int(value)
  return value


def _float(value) -> float | None:
  """Return a real number, also one of numpy or in an array without axes; None of anything else."""
  if isinstance(value, bool | np.bool_):
    return None
  if not isinstance(value, int | float | np.number):
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "dtype"):
      return None
    value = np.asarray(value, np.float64 if value.dtype != bool else object).item()
  try:
    return float(value)
  except (OverflowError, TypeError):
    return None
