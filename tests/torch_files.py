# SPDX-License-Identifier: Apache-2.0
"""Write files as torch.save does, by hand: what is in them need not exist."""

import struct
import zipfile

import numpy as np

STORAGES = {
  "float32": "FloatStorage",
  "float64": "DoubleStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
  "int32": "IntStorage",
  "int16": "ShortStorage",
  "int8": "CharStorage",
  "uint8": "ByteStorage",
  "bool": "BoolStorage",
}


class Code(bytes):
  """Opcodes to copy as they are."""


def call(name, *arguments):
  """Return opcodes that call a global: what a pickle may ask for, also of what is not there."""
  module, _, function = name.rpartition(".")
  return Code(f"c{module}\n{function}\n".encode() + opcodes(arguments, []) + b"R")


def opcodes(value, storages):
  """Return protocol-2 opcodes, as torch.save writes them; arrays go to `storages`."""
  each = lambda values: b"".join(opcodes(v, storages) for v in values)  # noqa: E731
  if isinstance(value, Code):
    return bytes(value)
  if value is None or isinstance(value, bool):
    return {None: b"N", True: b"\x88", False: b"\x89"}[value]
  if isinstance(value, int):
    return b"J" + struct.pack("<i", value)
  if isinstance(value, str):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
  if isinstance(value, tuple):
    return b"(" + each(value) + b"t"
  if isinstance(value, list):
    return b"](" + each(value) + b"e"
  if isinstance(value, dict):
    return b"}(" + each(part for item in value.items() for part in item) + b"u"
  array = np.asarray(value)
  storages.append(array.tobytes("A"))  # in memory order: transposed views share it
  typed = array.dtype.name in STORAGES
  kind = f"torch\n{STORAGES[array.dtype.name]}" if typed else "torch.storage\nUntypedStorage"
  pid = ("storage", Code(f"c{kind}\n".encode()), str(len(storages) - 1), "cpu", array.size)
  strides = tuple(n // array.itemsize for n in array.strides)
  arguments = [Code(each([pid]) + b"Q"), 0, array.shape, strides, False]
  arguments.append(call("collections.OrderedDict"))
  if not typed:
    arguments.append(Code(f"ctorch\n{array.dtype.name}\n".encode()))
  return bytes(call(f"torch._utils._rebuild_tensor_v{2 if typed else 3}", *arguments))


def write(path, value, *, compression=zipfile.ZIP_STORED, extra=()):
  """Write a file as torch.save would."""
  storages = []
  description = b"\x80\x02" + opcodes(value, storages) + b"."
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", description)
    for number, data in enumerate(storages):
      archive.writestr(f"archive/data/{number}", data)
    for name, data in extra:
      archive.writestr(f"archive/{name}", data)
  return path
