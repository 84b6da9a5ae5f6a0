# SPDX-License-Identifier: Apache-2.0
"""Read a pickle as data: text, numbers, tuples, lists and dicts are built, and nothing is called.

A pickle is a program for a stack machine that names functions and calls them; an ordinary reader
runs whatever it names, and a careful one can still be crashed, kept busy or filled up by plain
containers. This one is a loop over the operations. It imports nothing, calls only what its caller
hands over, compares and hashes only text and numbers, descends into no object, and counts what it
builds: together that is at most the size of the file, or 128 MiB.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from dlm_jax.errors import InputError

_LEAST, _MOST = 2**27, 2**30  # bytes that a description may take in memory: of the file's size
# Bytes that an operation may take in memory, rounded up; each takes at least `_STEP`.
_STEP, _TEXT, _CONTAINER, _MEMO, _ITEM = 32, 64, 128, 144, 112

_KEYS = (str, float, bool, type(None))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_NOTHING = ("PROTO", "FRAME", "STOP")


class PickleError(Exception):
  """A pickle asks for what is not read, or is none."""


class Global(NamedTuple):
  """A name in a pickle, module and all; nothing was imported."""

  name: str


class Placeholder:
  """Stands for every object that is not built."""

  def __repr__(self) -> str:
    return "an object that was not built"


PLACEHOLDER = Placeholder()


def read(
  description: bytes,
  known: Callable[[str], None],
  call: Callable[[str, tuple], Any],
  persistent: Callable[[Any], Any],
  size: int,
) -> Any:
  """Return the object that a pickle describes.

  A dict keeps the items whose keys are text, numbers or None; one with another key gets one item
  more, whose key is a `PLACEHOLDER`. States of objects are never set.

  Args:
    description: the pickle.
    known: raises for a name that is not to be read.
    call: (name, arguments) -> what stands for the object; of names that `known` let pass.
    persistent: (identifier) -> what stands for an object outside of the pickle.
    size: bytes of the file that the pickle is part of.

  Raises:
    PickleError: it asks for what is not read, describes more than a file of its size may hold, or
      is damaged.
  """
  try:
    return _Machine(known, call, persistent, min(max(size, _LEAST), _MOST)).run(description)
  except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
    if isinstance(error, InputError):  # of `known`
      raise
    raise PickleError("its pickle is damaged") from None


class _Machine:
  def __init__(self, known, call, persistent, room):
    self._known, self._call, self._persistent = known, call, persistent
    self._room = room
    self._stack, self._below, self._memo = [], [], {}

  def run(self, description):
    """Run to the end; what is on top is the object."""
    for opcode, argument, _ in pickletools.genops(description):
      name = opcode.name
      self._spend(_STEP)
      if name in _CONSTANTS:
        self._stack.append(_CONSTANTS[name])
      elif name in _EMPTY:
        self._spend(_CONTAINER)
        self._stack.append(_EMPTY[name]())
      elif name in _PUTS:
        self._remember(argument)
      elif name in _GETS:
        self._stack.append(self._memo[int(argument)])
      elif name in _TUPLES:
        self._tuple(self._take(_TUPLES[name]))
      elif isinstance(argument, str | int | float | bytes) and name not in _ACTS:
        if name not in _NOTHING:
          self._value(argument)
      elif name not in _NOTHING:
        if name not in _ACTS:
          raise PickleError(f"the operation {name}, which torch.save never writes")
        _ACTS[name](self, argument)
    if len(self._stack) != 1 or self._below:
      raise PickleError("a pickle that does not end in one object")
    return self._stack[0]

  def _spend(self, count):
    self._room -= count
    if self._room < 0:
      raise PickleError("it describes more objects than a file of its size may hold")

  def _take(self, count):
    if len(self._stack) < count:
      raise PickleError("too little on the stack")
    taken = self._stack[len(self._stack) - count :]
    del self._stack[len(self._stack) - count :]
    return taken

  def _value(self, argument):
    if isinstance(argument, bytes):  # of numpy, of pickled tokenizers
      argument = PLACEHOLDER
    if isinstance(argument, str):
      self._spend(_TEXT + 4 * len(argument))
    elif isinstance(argument, int):
      self._spend(argument.bit_length() // 8)
    self._stack.append(argument)

  def _remember(self, slot):
    self._spend(_MEMO)
    self._memo[int(slot)] = self._stack[-1]

  def _memoize(self, _):
    self._remember(len(self._memo))

  def _mark(self, _):
    self._spend(_CONTAINER)
    self._below.append(self._stack)
    self._stack = []

  def _to_mark(self):
    taken, self._stack = self._stack, self._below.pop()
    return taken

  def _pop(self, _):
    if self._stack:
      self._stack.pop()
    else:
      self._to_mark()

  def _pop_mark(self, _):
    self._to_mark()

  def _duplicate(self, _):
    self._stack.append(self._stack[-1])

  def _tuple(self, items):
    self._spend(_CONTAINER + 8 * len(items))
    self._stack.append(tuple(items))

  def _marked_tuple(self, _):
    self._tuple(self._to_mark())

  def _marked_list(self, _):
    items = self._to_mark()
    self._stack.append([])
    self._extend(items)

  def _marked_dict(self, _):
    items = self._to_mark()
    self._stack.append({})
    self._update(items)

  def _append(self, _):
    self._extend(self._take(1))

  def _appends(self, _):
    self._extend(self._to_mark())

  def _extend(self, items):
    into = self._stack[-1]
    self._spend(16 * len(items))
    if type(into) is list:
      into.extend(items)
    elif into is not PLACEHOLDER:
      raise PickleError(f"items for a {type(into).__name__}")

  def _set_item(self, _):
    self._update(self._take(2))

  def _set_items(self, _):
    self._update(self._to_mark())

  def _update(self, items):
    into = self._stack[-1]
    self._spend(_ITEM * (len(items) // 2))
    if into is PLACEHOLDER:
      return
    if type(into) is not dict or len(items) % 2:
      raise PickleError(f"items for a {type(into).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
      into[key if _is_key(key) else PLACEHOLDER] = value

  def _placeholder(self, _):
    self._stack.append(PLACEHOLDER)

  def _marked_placeholder(self, _):
    self._to_mark()
    self._stack.append(PLACEHOLDER)

  def _global(self, argument):
    module, _, name = argument.partition(" ")
    self._name(module, name)

  def _stack_global(self, _):
    module, name = self._take(2)
    if type(module) is not str or type(name) is not str:
      raise PickleError("a name that is no text")
    self._name(module, name)

  def _name(self, module, name):
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    found = Global(f"{module}.{name}")
    self._known(found.name)
    self._spend(_TEXT + len(found.name))
    self._stack.append(found)

  def _reduce(self, _):
    self._made(*self._take(2))

  def _new_with_keywords(self, _):
    kind, arguments, _keywords = self._take(3)
    self._made(kind, arguments)

  def _object(self, _):
    kind, *arguments = self._to_mark()
    self._made(kind, tuple(arguments))

  def _instance(self, argument):
    arguments = tuple(self._to_mark())
    self._global(argument)
    self._made(self._stack.pop(), arguments)

  def _made(self, kind, arguments):
    if type(arguments) is not tuple:
      raise PickleError("a call without arguments")
    self._spend(_CONTAINER)
    if type(kind) is Global:
      self._stack.append(self._call(kind.name, arguments))
    elif kind is PLACEHOLDER:
      self._stack.append(PLACEHOLDER)
    else:
      raise PickleError(f"a call of a {type(kind).__name__}")

  def _build(self, _):
    self._take(1)
    if not self._stack:
      raise PickleError("a state of nothing")

  def _outside(self, _):
    self._stack.append(self._persistent(self._stack.pop()))


def _is_key(value):
  """Tell whether a value may be a key: it is hashed at once, and few share a hash."""
  return type(value) in _KEYS or (type(value) is int and -(2**63) <= value < 2**63)


_ACTS = {
  "MEMOIZE": _Machine._memoize,
  "MARK": _Machine._mark,
  "POP": _Machine._pop,
  "POP_MARK": _Machine._pop_mark,
  "DUP": _Machine._duplicate,
  "TUPLE": _Machine._marked_tuple,
  "LIST": _Machine._marked_list,
  "DICT": _Machine._marked_dict,
  "APPEND": _Machine._append,
  "APPENDS": _Machine._appends,
  "ADDITEMS": _Machine._appends,
  "SETITEM": _Machine._set_item,
  "SETITEMS": _Machine._set_items,
  "EMPTY_SET": _Machine._placeholder,
  "FROZENSET": _Machine._marked_placeholder,
  "BYTEARRAY8": _Machine._placeholder,
  "GLOBAL": _Machine._global,
  "STACK_GLOBAL": _Machine._stack_global,
  "REDUCE": _Machine._reduce,
  "NEWOBJ": _Machine._reduce,
  "NEWOBJ_EX": _Machine._new_with_keywords,
  "OBJ": _Machine._object,
  "INST": _Machine._instance,
  "BUILD": _Machine._build,
  "BINPERSID": _Machine._outside,
}
