# SPDX-License-Identifier: Apache-2.0
"""Damage to files: drawn by hypothesis as small tuples that say it all, applied to bytes.

A mutation is a list of steps (name, *numbers and values). Numbers are places, taken modulo what
there is, so that any list fits any file and a list that shrinks still means something.
"""

import io
import itertools
import json
import os
import pathlib
import pickletools
import struct
import zipfile

from hypothesis import strategies as st

# JSON that Python would not write, by name: messages stay short.
RAW = {
  "nan": "NaN",
  "infinity": "-Infinity",
  "beyond floats": "1e999",
  "tiny": "1e-999",
  "minus nothing": "-0.0",
  "whole float": "2.0",
  "digits": "9" * 5000,
  "half a pair": '"\\ud800"',
  "deep lists": "[" * 5000 + "]" * 5000,
  "open lists": "[" * 200_000,
  "deep objects": '{"a":' * 150 + "1" + "}" * 150,
  "long text": json.dumps("x" * 100_000),
  "long list": json.dumps([0] * 20_000),
  "many fields": json.dumps({f"a{i}": i for i in range(5000)}),
  "nothing": "",
  "word": "undefined",
}
_TEXTS = ["", "x", "\0", "../x", "/dev/zero", "none", "float32", "F64", "F8_E4M3", "BF16", "I64"]
_TEXTS += [
  "BOOL",
  "a\nb",
  "\u2028",
  "\x1b[2J",
  "é",
  "😀",
  "<|endoftext|>",
  "(x+x+)+y",
  "model.safetensors",
]
_TEXTS += ["{{ 1 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ messages[0].content }}"]
_WHOLE = [0, 1, 2, 3, 5, 7, 255, 256, 300, 4096, 10**6, 2**31 - 1, 2**31, 2**32, 10**9, 2**53]
_WHOLE += [2**63 - 1, 2**63, 2**64, 10**30, -1, -2, -(2**31) - 1, -(2**63), -(10**30)]
_FLOATS = [0.5, 1.5, -0.5, 1e-30, 1e30, 1e300, 0.1, 1.0]


class Raw(str):
  """The name of a text in `RAW`."""

  def __repr__(self) -> str:
    return f"Raw({str(self)!r})"


class Fields(list):
  """An object of JSON as pairs: a name may be there twice."""


_plain = st.sampled_from([None, True, False, *_WHOLE, *_FLOATS, *_TEXTS, *map(Raw, RAW)])
values = st.one_of(
  _plain,
  st.integers(-300, 300),
  st.recursive(
    _plain,
    lambda inner: st.one_of(
      st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(_TEXTS), inner, max_size=2)
    ),
    max_leaves=4,
  ),
)
_place = st.integers(0, 2**20)
# From the root: which child, which child of that, …
_path = st.lists(st.integers(0, 400), max_size=4)
_names = st.sampled_from(
  [*_TEXTS, "dlm_jax", "model_type", "quantization_config", "added_tokens", "chat_template", "id"]
)
_json_step = st.one_of(
  st.tuples(st.just("near"), _path, st.integers(0, 7)),
  *[st.tuples(st.just("put"), _path, values)] * 3,
  st.tuples(st.just("put"), _path, st.sampled_from([*map(Raw, RAW)])),
  st.tuples(st.just("drop"), _path),
  st.tuples(st.just("twice"), _path, values),
  st.tuples(st.just("rename"), _path, _names),
  st.tuples(st.just("add"), _path, _names, values),
  st.tuples(st.just("copy"), _path, _path),
  st.tuples(st.just("wrap"), _path, st.sampled_from([1, 2, 99, 101, 500])),
)
_BYTES = [b"\xff", b"\xef\xbb\xbf", b"\0", b"[", b"]", b"{", b"}", b'"', b"\\u", b"1e999", b"NaN"]
_BYTES += [
  b",",
  b":",
  b"\n",
  b"\r",
  b" ",
  b"\xed\xa0\x80",
  b"\x1f\x8b",
  b"PK\x03\x04",
  b"a" * 70000,
]
_byte_step = st.one_of(
  st.tuples(st.just("flip"), _place, st.integers(0, 7)),
  st.tuples(st.just("set"), _place, st.integers(0, 255)),
  st.tuples(st.just("cut"), _place, st.sampled_from([1, 2, 8, 100, 5000])),
  st.tuples(st.just("insert"), _place, st.sampled_from(_BYTES)),
  st.tuples(st.just("repeat"), _place, st.sampled_from([1, 10, 1000]), st.sampled_from([2, 500])),
  st.tuples(st.just("end"), _place),
  st.tuples(st.just("all"), st.sampled_from([b"", b"{}", b"[]", b"null", b"5", b'"x"', *_BYTES])),
)
_length_step = st.tuples(st.just("length"), st.sampled_from([0, 1, 8, 2**20, 2**31, 2**63, -1]))
# Operations of pickles: containers, numbers, names, calls, slots, frames; well and badly formed.
_CODES = [b"(", b")", b"]", b"}", b"N", b"t", b"l", b"d", b"e", b"a", b"u", b"s", b"R", b"b", b"0"]
_CODES += [b"1", b"2", b".", b"o", b"Q", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x8f"]
_CODES += [b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"\x80\x05", b"\x95" + b"\xff" * 8]
_CODES += [
  b"J\xff\xff\xff\x7f",
  b"J\xff\xff\xff\xff",
  b"K\x00",
  b"K\x07",
  b"M\x00\x01",
  b"F1e999\n",
]
_CODES += [
  b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
  b"\x8a\x08" + b"\0" * 7 + b"\x40",
  b"G\x7f\xf8" + b"\0" * 6,
]
_CODES += [
  b"\x8b\xff\xff\xff\x7f",
  b"I" + b"9" * 5000 + b"\n",
  b"I01\n",
  b"X\x01\0\0\0x",
  b"U\x01x",
]
_CODES += [b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 7 + b"\0", b"C\x01x"]
_CODES += [b"q\x00", b"h\x00", b"h\x01", b"r\0\0\0\x10", b"j\0\0\0\x10", b"p9\n", b"g9\n", b"P1\n"]
_CODES += [
  b"cos\nsystem\n",
  b"ctorch\nFloatStorage\n",
  b"ctorch\nfloat32\n",
  b"\x82\x01",
  b"S'x'\n",
]
_CODES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n", b"]r\0"]
_CODES += [
  b"ctorch._utils\n_rebuild_parameter\n",
  b"ccollections\nOrderedDict\n",
  b"c\n\n",
  b"V\\ud800\n",
]
_CODES += [b"cbuiltins\nlist\n", b"cbuiltins\nstr\n", b"ctorch._tensor\n_rebuild_from_type_v2\n"]
_CODES += [
  b"X\x0a\0\0\0state_dict",
  b"X\x03\0\0\0ema",
  b"X\x0d\0\0\0shadow_params",
  b"X\x05\0\0\0lm.\xf0\x9f",
]
_pickle_step = st.one_of(
  st.tuples(st.just("lose"), _place, st.sampled_from([1, 2, 5])),
  st.tuples(st.just("again"), _place, st.sampled_from([1, 3, 20]), st.sampled_from([2, 50, 5000])),
  st.tuples(st.just("code"), _place, st.sampled_from(_CODES), st.sampled_from([1, 1, 2, 100_000])),
  st.tuples(st.just("instead"), _place, st.sampled_from(_CODES)),
  st.tuples(st.just("trade"), _place, _place),
)
_STEPS = {
  "bytes": [_byte_step],
  "json": [_json_step, _json_step, _json_step, _byte_step],
  "jsonl": [_json_step, _json_step, _byte_step],
  "safetensors": [_json_step, _json_step, _json_step, _length_step, _byte_step],
  "torch": [_pickle_step, _pickle_step, _pickle_step, _byte_step],
}


def mutation(form: str) -> st.SearchStrategy:
  """Return lists of steps for a file: "bytes", "json", "jsonl", "safetensors" or "torch"."""
  return st.one_of([st.lists(one, min_size=1, max_size=3) for one in _STEPS[form]])


# What may stand at a file's place instead of it.
INSTEAD = ("nothing", "folder", "loop", "pipe", "device", "self")


def instead() -> st.SearchStrategy:
  """Return lists of the one step that no file is left after."""
  return st.sampled_from(INSTEAD).map(lambda what: [("instead of it", what)])


def place(file: pathlib.Path, what: str) -> None:
  """Put something at a file's place that is no file."""
  file.unlink()
  if what == "folder":
    file.mkdir()
  elif what == "loop":
    file.symlink_to(file)
  elif what == "pipe":
    os.mkfifo(file)
  elif what == "device":
    file.symlink_to("/dev/zero")
  elif what == "self":
    file.symlink_to(file.parent)


def apply(form: str, data: bytes, steps) -> bytes:
  """Return a file after every step; one that does not fit what is left changes nothing."""
  for step in steps:
    if step[0] in _ON_BYTES:
      data = _ON_BYTES[step[0]](data, *step[1:])
    elif step[0] == "length":
      data = struct.pack("<Q", step[1] % 2**64) + data[8:]
    else:
      try:
        data = _ON_PARTS[form](data, step)
      except (ValueError, struct.error, zipfile.BadZipFile, KeyError, RecursionError):
        continue
  return data


# --- bytes ----------------------------------------------------------------------------------------


def _flip(data, place, bit):
  return _set(data, place, data[place % len(data)] ^ 1 << bit) if data else data


def _set(data, place, value):
  place %= max(len(data), 1)
  return data[:place] + bytes([value]) + data[place + 1 :]


def _cut(data, place, count):
  place %= max(len(data), 1)
  return data[:place] + data[place + count :]


def _insert(data, place, more):
  place %= len(data) + 1
  return data[:place] + more + data[place:]


def _repeat(data, place, count, times):
  place %= max(len(data), 1)
  return data[:place] + data[place : place + count] * times + data[place + count :]


_ON_BYTES = {
  "flip": _flip,
  "set": _set,
  "cut": _cut,
  "insert": _insert,
  "repeat": _repeat,
  "end": lambda data, place: data[: place % max(len(data), 1)],
  "all": lambda data, content: content,
}


# --- JSON -----------------------------------------------------------------------------------------


def _on_json(data, step):
  root = [json.loads(data.decode(), object_pairs_hook=Fields)]
  _change(root, *step)
  return "".join(_written(one) for one in root).encode()


def _on_line(data, step):
  lines = data.split(b"\n")
  number = sum(step[1]) % max(len(lines), 1)
  lines[number] = _on_json(lines[number], step)
  return b"\n".join(lines)


def _on_header(data, step):
  (size,) = struct.unpack("<Q", data[:8])
  header = _on_json(data[8 : 8 + size], step)
  return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _change(root, name, path, *values):
  """Change one value of a tree in place; the tree lies in a list of one."""
  into, index = _found(root, path)
  held = into[index]
  value = held[1] if isinstance(into, Fields) else held
  label = held[0] if isinstance(into, Fields) else None
  if name == "put":
    _put(into, index, values[0])
  elif name == "near":
    _put(into, index, _near(value, values[0]))
  elif name == "drop":
    del into[index]
  elif name == "twice":
    into.insert(index, (label, values[0]) if isinstance(into, Fields) else value)
  elif name == "rename" and isinstance(into, Fields):
    into[index] = (values[0], value)
  elif name == "add" and isinstance(value, list):
    value.append(tuple(values) if isinstance(value, Fields) else values[1])
  elif name == "copy":
    other, place = _found(root, values[0])
    source = other[place][1] if isinstance(other, Fields) else other[place]
    _put(into, index, json.loads(_written(source), object_pairs_hook=Fields))
  elif name == "wrap":
    for _ in range(values[0]):
      value = [value]
    _put(into, index, value)


def _near(value, number):
  """Return another value of the same type: what a check of types alone lets pass."""
  if isinstance(value, bool) or value is None:
    return not value
  if isinstance(value, int | float):
    return (value + 1, value - 1, 2 * value, -value, 0, 1, value + 64, value * 1000)[number]
  if isinstance(value, str):
    others = (value + "x", value[1:], value.upper(), "", f" {value}", value * 2, value[:1], "a")
    return others[number]
  inner = list(value)
  others = (inner[1:], inner[::-1], inner * 2, inner[:1], [], inner[1:] + inner[:1], inner, inner)
  return type(value)(others[number])


def _found(root, path):
  """Return (container, index) of the value at the end of a path."""
  into, index = root, 0
  for child in path:
    node = into[index][1] if isinstance(into, Fields) else into[index]
    if not isinstance(node, list) or not node:
      break
    into, index = node, child % len(node)
  return into, index


def _put(into, index, value):
  into[index] = (into[index][0], value) if isinstance(into, Fields) else value


def _written(value) -> str:
  if isinstance(value, Raw):
    return RAW[value]
  if isinstance(value, Fields | dict):
    pairs = value.items() if isinstance(value, dict) else value
    return "{" + ", ".join(f"{json.dumps(name)}: {_written(one)}" for name, one in pairs) + "}"
  if isinstance(value, list):
    return "[" + ", ".join(map(_written, value)) + "]"
  return json.dumps(value)


# --- pickles --------------------------------------------------------------------------------------


def _on_pickle(data, step):
  """Change data.pkl of a file of torch.save, operation by operation."""
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    entries = {name: archive.read(name) for name in archive.namelist()}
  name = next(name for name in entries if name.endswith("data.pkl"))
  places = [place for _, _, place in pickletools.genops(entries[name])] + [len(entries[name])]
  codes = [entries[name][a:b] for a, b in itertools.pairwise(places)]
  entries[name] = b"".join(_operations(codes, *step))
  into = io.BytesIO()
  with zipfile.ZipFile(into, "w") as archive:
    for entry, content in entries.items():
      archive.writestr(entry, content)
  return into.getvalue()


def _operations(codes, name, place, *values):
  place %= len(codes)
  if name == "lose":
    return codes[:place] + codes[place + values[0] :]
  if name == "again":
    count, times = values
    return codes[:place] + codes[place : place + count] * times + codes[place + count :]
  if name == "code":
    return codes[:place] + [values[0]] * values[1] + codes[place:]
  if name == "instead":
    return [*codes[:place], values[0], *codes[place + 1 :]]
  other = values[0] % len(codes)
  codes[place], codes[other] = codes[other], codes[place]
  return codes


_ON_PARTS = {
  "json": _on_json,
  "jsonl": _on_line,
  "safetensors": _on_header,
  "torch": _on_pickle,
}
