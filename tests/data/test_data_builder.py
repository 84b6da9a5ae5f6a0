# SPDX-License-Identifier: Apache-2.0
"""Packing by hand, a whole prepare without TensorFlow, nothing half-written whatever happens."""

import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from dlm_jax.data import builder, loader, sources, tokenizers
from dlm_jax.errors import InputError

DOCUMENTS = [f"document number {i}: " + "abc " * (i % 7) for i in range(60)]


@pytest.fixture
def corpus(tmp_path):
  (tmp_path / "train.txt").write_text("\n\n".join(DOCUMENTS))
  (tmp_path / "valid.txt").write_text("held out\n\nalso held out")
  return sources.open_source(
    f"files:{tmp_path}/train.txt", validation=f"{tmp_path}/valid.txt", document_separator="\n\n"
  )


def prepare(corpus, directory, length=16, **options):
  return builder.prepare(corpus, tokenizers.Bytes(), length, directory, progress=False, **options)


def rows(dataset, split):
  return np.stack([record["tokens"] for record in dataset.splits[split]])


def test_packing_by_hand():
  packed = list(builder.pack([[1, 2], [3, 4, 5], [6], [7, 8]], 5, 0))
  # stream 1 2 0 | 3 4 5 | 0 6 0 | 7 8 0
  assert [row.tolist() for row in packed] == [
    [0, 1, 2, 0, 0],
    [0, 3, 4, 5, 0],
    [0, 0, 6, 0, 0],
    [0, 7, 8, 0, 0],
  ]
  assert all(row.dtype == np.int32 for row in packed)
  packed = builder.pack([[1, 2], [3, 4, 5], [6], [7, 8]], 5, 0, wrap=False)
  assert [row.tolist() for row in packed] == [[1, 2, 0, 3, 4], [5, 0, 6, 0, 7]]  # tail 8 0 dropped
  assert list(builder.pack([[1]], 5, 0)) == list(builder.pack([], 5, 0)) == []


@pytest.mark.parametrize("length, wrap", [(2, True), (0, False), (-1, True)])
def test_packing_needs_room(length, wrap):
  with pytest.raises(InputError, match="leaves no room for text"):
    builder.pack([[1]], length, 0, wrap)


def test_records_are_the_packed_corpus(corpus, tmp_path):
  prepared = prepare(corpus, tmp_path / "out")
  assert prepared.created and "train" in prepared.message
  dataset = builder.open_dataset(tmp_path / "out")
  assert dataset.info == prepared.info
  tokenizer = dataset.tokenizer()
  assert tokenizer == tokenizers.Bytes()
  for split, documents in (("train", DOCUMENTS), ("validation", ["held out", "also held out"])):
    stream = [i for d in documents for i in [*tokenizer.encode(d), 256]]
    count = len(stream) // 14
    rows_NL = rows(dataset, split)
    assert rows_NL.dtype == np.int32 and rows_NL.shape == (count, 16)
    assert (rows_NL[:, [0, -1]] == 256).all()
    assert rows_NL[:, 1:-1].ravel().tolist() == stream[: count * 14]
    info = dataset.info.splits[split]
    assert (info.records, info.tokens, info.documents) == (count, count * 16, len(documents))
    assert info.text_bytes == sum(len(d) for d in documents)
    # A model that knows only the alphabet pays log 257 per position, and that many bits per byte:
    bits = count * 16 * math.log2(257) / (info.text_bytes * count * 14 / len(stream))
    assert math.log2(257) / info.bytes_per_token == pytest.approx(bits)


def test_same_settings_do_nothing_and_others_are_refused(corpus, tmp_path):
  prepare(corpus, tmp_path / "out")
  stamp = (tmp_path / "out" / "dataset.json").stat()
  again = prepare(corpus, tmp_path / "out")
  assert not again.created and "nothing to do" in again.message
  assert (tmp_path / "out" / "dataset.json").stat() == stamp
  with pytest.raises(InputError, match="prepared with length=16 not 32;"):
    prepare(corpus, tmp_path / "out", length=32)
  with pytest.raises(InputError, match="prepared with wrap=True not False;"):
    prepare(corpus, tmp_path / "out", wrap=False)
  bpe = tokenizers.train_bpe(DOCUMENTS, 270)
  with pytest.raises(InputError, match=r"vocab_size=257 not 270, eos_id=.*tokenizer_fingerprint="):
    builder.prepare(corpus, bpe, 16, tmp_path / "out")
  (tmp_path / "train.txt").write_text("\n\n".join(DOCUMENTS[1:]))
  with pytest.raises(InputError, match=r"source\.listing="):
    prepare(corpus, tmp_path / "out")


def test_length_beyond_the_corpus(corpus, tmp_path):
  with pytest.raises(InputError, match="length=26 is longer than the validation split") as caught:
    prepare(corpus, tmp_path / "out", length=26)
  assert "use length <= 25" in str(caught.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["train.txt", "valid.txt"]
  prepare(corpus, tmp_path / "out", length=25)  # the advice holds


def test_empty_split(tmp_path):
  (tmp_path / "one.txt").write_text("a single document")
  with pytest.raises(InputError, match="the validation split is empty"):
    prepare(sources.open_source(f"files:{tmp_path}/one.txt"), tmp_path / "out", length=4)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["one.txt"]


def test_undecodable_corpus_leaves_nothing(corpus, tmp_path):
  (tmp_path / "valid.txt").write_bytes(b"caf\xe9")
  with pytest.raises(InputError, match=r"valid\.txt is not UTF-8: byte 0xe9 at offset 3") as caught:
    prepare(corpus, tmp_path / "out")
  assert "\n" not in str(caught.value)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["train.txt", "valid.txt"]


class _Interrupted:
  """A corpus during whose reading the user presses Ctrl-C."""

  def describe(self):
    return {"spec": "interrupted"}

  def documents(self, split):
    yield "text " * 100
    raise KeyboardInterrupt


def test_interrupt_leaves_nothing(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    prepare(_Interrupted(), tmp_path / "out")
  assert not list(tmp_path.iterdir())


def test_unwritable_places(corpus, tmp_path):
  with pytest.raises(InputError, match="cannot be written"):
    prepare(corpus, tmp_path / "train.txt" / "out")
  with pytest.raises(InputError, match="exists and is not a prepared dataset"):
    prepare(corpus, tmp_path / "train.txt")
  with pytest.raises(InputError, match="exists and is not a prepared dataset"):
    prepare(corpus, tmp_path)
  if os.geteuid():  # root may write anywhere
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
      prepare(corpus, tmp_path / "closed" / "out")
  (tmp_path / "empty").mkdir()
  assert prepare(corpus, tmp_path / "empty").created


@pytest.mark.first_case
@pytest.mark.parametrize("limit", [0, 2000, 100_000])
def test_full_disk(limit, tmp_path):
  """A limit on file sizes stands in: TFDS metadata or the records do not fit."""
  source = sources.open_source("stdlib")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    with pytest.raises(InputError, match="cannot be written: File too large"):
      prepare(source, tmp_path / "out", length=1024)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda d: (d / "dataset.json").unlink(), r"not a prepared dataset: dataset\.json"),
    (lambda d: (d / "dataset.json").write_text("{"), r"dataset\.json is not ours"),
    (lambda d: (d / "dataset.json").write_text("[]"), r"dataset\.json is not ours"),
    (lambda d: (d / "dataset.json").write_text('{"format": "x"}'), "its format is not"),
    (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    (lambda d: os.truncate(next(d.rglob("*train*")), 100), "has 100 bytes instead of"),
    (lambda d: next(d.rglob("*validation*")).unlink(), "is missing"),
  ],
)
def test_damaged_directories(damage, message, corpus, tmp_path):
  prepare(corpus, tmp_path / "out")
  damage(tmp_path / "out")
  with pytest.raises(InputError, match=message) as caught:
    builder.open_dataset(tmp_path / "out")
  assert "\n" not in str(caught.value)


def test_absent_directory(tmp_path):
  with pytest.raises(InputError, match="No such file or directory"):
    builder.open_dataset(tmp_path / "absent")


def test_edited_tfds_metadata(corpus, tmp_path):
  prepare(corpus, tmp_path / "out")
  info = next((tmp_path / "out").rglob("dataset_info.json"))
  info.write_text("x" * info.stat().st_size)
  with pytest.raises(InputError, match="cannot be opened by TFDS"):
    builder.open_dataset(tmp_path / "out")


def test_two_prepare_the_same(corpus, tmp_path, monkeypatch):
  """The slower one finds what the faster one made."""
  plain = builder._build

  def slow(*given):
    monkeypatch.setattr(builder, "_build", plain)
    (tmp_path / "elsewhere").mkdir()
    made = plain(*given)
    faster = prepare(corpus, tmp_path / "elsewhere" / "out")
    (tmp_path / "elsewhere" / "out").rename(tmp_path / "out")
    assert faster.created
    return made

  monkeypatch.setattr(builder, "_build", slow)
  assert not prepare(corpus, tmp_path / "out").created
  assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def _flip(file, place=0.5):
  content = bytearray(file.read_bytes())
  content[int(place * len(content))] ^= 4
  file.write_bytes(content)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "dataset_info.json"])
def test_flipped_bits_of_small_files(name, corpus, tmp_path):
  prepare(corpus, tmp_path / "out")
  _flip(next((tmp_path / "out").rglob(name)))
  with pytest.raises(InputError, match=rf"(damaged or changed: {name}|cannot be opened)") as caught:
    builder.open_dataset(tmp_path / "out")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sums", [True, False])
def test_flipped_bits_of_records(sums, corpus, tmp_path):
  """Wherever they are read: one line that names the shard; with and without sums to go by."""
  prepare(corpus, tmp_path / "out")
  shard = next((tmp_path / "out").rglob("*train.array_record*"))
  content = bytearray(shard.read_bytes())
  for place in range(200, 2000, 50):
    content[place] ^= 255
  shard.write_bytes(content)
  if not sums:
    listed = json.loads((tmp_path / "out" / "dataset.json").read_text())
    del listed["files"]["checksums.json"]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(listed))
    (tmp_path / "out" / "checksums.json").unlink()
  dataset = builder.open_dataset(tmp_path / "out")
  said = rf"out: record \d+ of train cannot be read from {shard.name}: .*; prepare it again"
  readers = [
    lambda: list(dataset.splits["train"]),
    lambda: list(loader.make(dataset, "train", batch_size=2, seed=0, repeat=False)),
    lambda: loader.evaluation_groups(dataset, "train"),
    lambda: list(loader.evaluation_batches(dataset, "train", 2)),
  ]
  for read in readers:
    with pytest.raises(InputError, match=said) as caught:
      read()
    assert "\n" not in str(caught.value)
  assert len(list(dataset.splits["validation"])) > 0


def _legacy(name):
  return {"type": name, "content": {}}


_HOSTILE = {
  "name": lambda f: f | {"pythonClassName": "evil.X"},
  "snake": lambda f: {"python_class_name": "evil.X", "featuresDict": f["featuresDict"]},
  "legacy": lambda f: _legacy("evil.X"),
  "inner": lambda f: (
    f | {"featuresDict": {"features": {"tokens": {"python_class_name": "evil.X"}}}}
  ),
  "text": lambda f: {
    "pythonClassName": f["pythonClassName"],
    "jsonFeature": {"json": '{"tokens": {"type": "evil\\u002eX", "content": {}}}'},
  },
}


@pytest.mark.parametrize("how", sorted(_HOSTILE))
def test_a_dataset_imports_no_module(how, corpus, tmp_path, monkeypatch):
  """Under every key that TFDS takes for the name of a class."""
  prepare(corpus, tmp_path / "out")
  (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  features = next((tmp_path / "out").rglob("features.json"))
  features.write_text(json.dumps(_HOSTILE[how](json.loads(features.read_text()))))
  for file, key in (("checksums.json", None), ("dataset.json", "files")):
    path = tmp_path / "out" / file
    content = json.loads(path.read_text())
    listed, name = (content[key] if key else content), "packed_tokens/1.0.0/features.json"
    size = features.stat().st_size if key else zlib.crc32(features.read_bytes())
    listed[name] = size
    if key:
      listed["checksums.json"] = (tmp_path / "out" / "checksums.json").stat().st_size
    path.write_text(json.dumps(content))
  with pytest.raises(InputError, match=r"holds features of .*evil.*, which is not ours and is not"):
    builder.open_dataset(tmp_path / "out")
  assert "evil" not in sys.modules


_STDLIB = """
import sys
from dlm_jax.data import builder, loader, sources, tokenizers
source = sources.open_source("stdlib", root=sys.argv[1])
tokenizer = tokenizers.train_bpe(source.documents("train"), 400)
print(builder.prepare(source, tokenizer, 64, sys.argv[2]).message)
print(next(loader.make(sys.argv[2], "train", batch_size=4, seed=0))["tokens"].shape)
print("tensorflow" in sys.modules)
"""


def _run(program, *arguments, **options):
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  return subprocess.Popen(
    [sys.executable, "-c", program, *map(str, arguments)],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    **options,
  )


@pytest.mark.slow
def test_standard_library_end_to_end_without_tensorflow(tmp_path):
  root = tmp_path / "lib"
  root.mkdir()
  files = list(pathlib.Path(json.__file__).parent.glob("*.py"))
  files += [pathlib.Path(m.__file__) for m in (subprocess, pathlib, math and json.decoder)]
  for i in range(40):  # enough modules for both splits
    (root / f"m{i}.py").write_text(files[i % len(files)].read_text(encoding="utf-8"))
  process = _run(_STDLIB, root, tmp_path / "out")
  output, errors = process.communicate()
  assert process.returncode == 0, errors
  assert "packed_tokens" not in output  # TFDS would name the temporary path
  message, shape, tensorflow = output.strip().splitlines()
  assert "prepared (train" in message and (shape, tensorflow) == ("(4, 64)", "False")
  content = json.loads((tmp_path / "out" / "dataset.json").read_text())
  assert content["source"]["spec"] == "stdlib" and content["vocab_size"] == 400


_SLOW = """
import sys, time
from dlm_jax.data import builder, tokenizers
class Slow:
  def describe(self): return {"spec": "slow"}
  def documents(self, split):
    for i in range(200):
      yield "text " * 1000
    print("reading", flush=True)
    time.sleep(20)
builder.prepare(Slow(), tokenizers.Bytes(), 64, sys.argv[1])
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_killed_prepare_leaves_no_dataset_and_can_be_repeated(kill, corpus, tmp_path):
  process = _run(_SLOW, tmp_path / "sub" / "out")
  assert process.stdout.readline() == "reading\n"
  time.sleep(0.1)
  process.send_signal(kill)
  process.communicate()
  assert not (tmp_path / "sub" / "out").exists()
  left = list((tmp_path / "sub").glob("*"))  # the folder goes, too, if it can
  assert len(left) == (kill == signal.SIGKILL), "after SIGKILL a hidden sibling stays"
  assert prepare(corpus, tmp_path / "sub" / "out").created
  assert [entry.name for entry in (tmp_path / "sub").iterdir()] == ["out"]


def test_a_prepare_that_goes_on_keeps_its_files(corpus, tmp_path):
  process = _run(_SLOW, tmp_path / "out")
  assert process.stdout.readline() == "reading\n"
  theirs = [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".out.")]
  assert len(theirs) == 1 and prepare(corpus, tmp_path / "out").created
  assert (tmp_path / theirs[0]).exists()
  process.kill()
  process.communicate()
