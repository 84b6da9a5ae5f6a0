# SPDX-License-Identifier: Apache-2.0
"""Pickles are data here: what lies beside the weights is not built, and no bomb goes off."""

import argparse
import collections
import datetime
import functools
import pathlib
import pickle
import struct
import time
import tracemalloc
import uuid
import zipfile

import numpy as np
import pytest
from torch_files import Code, call, opcodes, write

from dlm_jax.convert import pickles, torch_file
from dlm_jax.errors import InputError

STRANGERS = {
  "numpy scalar": np.float32(1.5),
  "numpy array": np.arange(3),
  "numpy dtype": np.dtype("f4"),
  "path": pathlib.PurePosixPath("a/b"),
  "namespace": argparse.Namespace(lr=1e-3, betas=(0.9, 0.99)),
  "partial": functools.partial(dict, a=1),
  "time": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
  "span": datetime.timedelta(seconds=3),
  "set": {1, 2},
  "complex": 1j,
  "counter": collections.Counter("aab"),
  "queue": collections.deque([1], maxlen=3),
  "uuid": uuid.UUID(int=3),
  "bytes": b"abc",
  "torch dtype": Code(b"ctorch\nfloat32\n"),
  "torch version": Code(b"ctorch.torch_version\nTorchVersion\n" + opcodes(("2.1",), []) + b"\x81"),
  "optimiser": Code(b"ctorch.optim.adamw\nAdamW\n"),
}


def _file(path, description, data=b"", size=0):
  """Write an archive around a description, with a storage of zeros."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", description)
    archive.writestr("archive/data/0", data or bytes(size))
  return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", sorted(STRANGERS))
def test_inert_strangers_are_dropped(tmp_path, name, protocol):
  """They lie in values, in lists and as keys; the tensor beside them is read."""
  value = STRANGERS[name]
  if not isinstance(value, Code):
    head = 2 if protocol > 1 else 0  # what says the protocol
    value = Code(pickle.dumps(value, protocol)[head:-1])
  x = np.arange(4, dtype=np.float32)
  content = {"hyper": {"a": value, "b": [value, 3]}, "x": x}
  back = torch_file.read(write(tmp_path / "x.ckpt", content))
  assert list(back) == ["hyper", "x"] and back["hyper"]["b"][1] == 3
  np.testing.assert_array_equal(np.asarray(back["x"]), x)
  for item in (back["hyper"]["a"], back["hyper"]["b"][0]):
    assert type(item).__name__ in ("Placeholder", "Global")
    assert not getattr(item, "__dict__", {})


def test_an_odd_key_hides_nothing(tmp_path):
  """It stays one that is no text, which a list of weights refuses."""
  large = Code(b"\x8a\x09" + (2**70).to_bytes(9, "little"))
  content = Code(b"}(" + b"".join(opcodes(k, []) + b"N" for k in ((1, 2), large, 7)) + b"u")
  back = torch_file.read(write(tmp_path / "x.ckpt", {"a": content, "b": 1}))
  assert [type(key).__name__ for key in back["a"]] == ["Placeholder", "int"] and back["b"] == 1


class _Runs:
  """Creates a directory when anything of it is called."""

  def __init__(self, target):
    self.target = target

  def __reduce__(self):
    return pathlib.Path.mkdir, (self.target,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_payload_among_strangers_is_refused(tmp_path, protocol):
  """Also inside what is dropped: its name is read before what is around it."""
  target = tmp_path / "harm"
  payload = {"a": functools.partial(dict, x=_Runs(target)), "b": np.float32(1)}
  data = pickle.dumps(payload, protocol)
  with pytest.raises(InputError, match="only tensors, containers and numbers") as caught:
    torch_file.read(_file(tmp_path / "x.ckpt", data))
  assert not target.exists() and "\n" not in str(caught.value)
  pickle.loads(data)
  assert target.exists()


@pytest.mark.parametrize(
  "name", ["os.system\nx", "a" * 10**5, "builtins.getattr", "pathlib.Path.mkdir", "numpy.load"]
)
def test_refusals_are_one_line(tmp_path, name):
  module, _, function = name.rpartition(".")
  stack = b"\x80\x04" + opcodes(module, []) + opcodes(function, []) + b"\x93."
  with pytest.raises(InputError) as caught:
    torch_file.read(_file(tmp_path / "x.ckpt", stack))
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def _doubled(start, times, push=b"q\x00h\x00\x86"):
  return start + push * times


_NESTED = b")" + b"\x85" * 10**5
BOMBS = {
  "deep key": b"}" + _NESTED + b"Ns.",
  "deep value": b"}K\x00" + _NESTED + b"s.",
  "deep lists": b"]" * 10**3 + b"a" * 999 + b".",
  "doubled key": b"}" + _doubled(b")", 60) + b"Ns.",
  "doubled storage": _doubled(b")", 60) + b"Q.",
  "doubled shape": b"ctorch._utils\n_rebuild_tensor_v2\n(N" + _doubled(b")", 60) + b"))tR.",
  "far slot": b"Nr" + struct.pack("<I", 2**28) + b".",
  "text of lists": b"cbuiltins\nstr\n" + _doubled(b"]", 60, b"q\x000](h\x00h\x00e") + b"\x85R.",
  "copies": b"](" + b"N" * 10**3 + b"eq\x00" + b"0cbuiltins\nset\nh\x00\x85R" * 500 + b".",
  "many marks": b"(" * 10**5 + b".",
  "many slots": b"N" + b"".join(b"r" + struct.pack("<I", n) for n in range(10**5)) + b".",
  "equal hashes": b"}("
  + b"".join(b"\x8a\x0b" + (n * (2**61 - 1)).to_bytes(11, "little") + b"N" for n in range(10**4))
  + b"u.",
  "long number": b"L" + b"9" * 10**6 + b"L\n.",
  "long text": b"X\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bombs(tmp_path, monkeypatch, name):
  """Read or refused in one line, at once, and within the memory that a description may take."""
  monkeypatch.setattr(pickles, "_LEAST", 2**18)
  file = _file(tmp_path / "x.ckpt", b"\x80\x02" + BOMBS[name])
  before = time.monotonic()
  tracemalloc.start()
  try:
    torch_file.read(file)
  except InputError as error:
    assert "\n" not in str(error) and len(str(error)) < 500
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  allowed = max(2**18, file.stat().st_size) + 2 * file.stat().st_size  # it is held, and parsed
  assert peak < allowed + 2**17 and time.monotonic() - before < 60


def _tensor(offset, shape, strides, size=4):
  pid = ("storage", Code(b"ctorch\nFloatStorage\n"), "0", "cpu", size)
  big = lambda n: Code(b"\x8a\x08" + n.to_bytes(8, "little"))  # noqa: E731
  parts = (big(offset), tuple(map(big, shape)), tuple(map(big, strides)))
  rebuilt = call("torch._utils._rebuild_tensor_v2", Code(opcodes(pid, []) + b"Q"), *parts, False)
  return b"\x80\x02" + opcodes({"x": rebuilt}, []) + b"."


@pytest.mark.parametrize(
  "offset, shape, strides",
  [
    (2**62, (1,), (1,)),
    (0, (10**9, 4), (0, 1)),
    (0, (2**62, 0), (1, 1)),
    (0, (2**62, 2**62), (0, 0)),
    (0, (2,), (2**62,)),
  ],
)
def test_tensors_are_no_larger_than_their_storage(tmp_path, offset, shape, strides):
  file = _file(tmp_path / "x.ckpt", _tensor(offset, shape, strides), size=16)
  with pytest.raises(InputError, match="is damaged"):
    np.asarray(torch_file.read(file)["x"])


def test_tensors_without_a_typed_storage(tmp_path):
  """How torch stores what has no storage class of its own, and derived classes."""
  pid = ("storage", Code(b"ctorch.storage\nUntypedStorage\n"), "0", "cpu", 4)
  storage, kind = Code(opcodes(pid, []) + b"Q"), Code(b"ctorch\nfloat8_e4m3fn\n")
  arguments = (storage, 0, (2, 2), (2, 1), False, {}, kind)
  plain = call("torch._utils._rebuild_tensor_v3", *arguments)
  function, cls = (Code(b"ctorch._utils\n_rebuild_tensor_v3\n"), Code(b"ctorch\nTensor\n"))
  derived = call("torch._tensor._rebuild_from_type_v2", function, cls, arguments, {})
  data = bytes([0x38, 0x40, 0xB8, 0x00])  # 1, 2, −1, 0
  content = b"\x80\x02" + opcodes({"a": plain, "b": derived}, []) + b"."
  back = torch_file.read(_file(tmp_path / "x.pt", content, data))
  for name in ("a", "b"):
    np.testing.assert_array_equal(np.asarray(back[name], np.float32), [[1, 2], [-1, 0]])
