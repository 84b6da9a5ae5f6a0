# SPDX-License-Identifier: Apache-2.0
"""Sources: what is selected, how it is split, and what is said about text that cannot be used."""

import bz2
import collections
import gzip
import json
import lzma

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dlm_jax.data import sources
from dlm_jax.errors import InputError


def both(source):
  return {split: list(source.documents(split)) for split in sources.SPLITS}


def test_stdlib_splits_are_disjoint_by_module_and_near_the_fraction():
  source = sources.open_source("stdlib")
  size = {s: sum(len(d.encode()) for d in source.documents(s)) for s in sources.SPLITS}
  assert 4e6 < sum(size.values()) < 2e7
  assert 0.03 < size["validation"] / sum(size.values()) < 0.2
  files = {str(file) for file in source.files()}
  assert {"asyncio/queues.py", "argparse.py"} <= files
  for part in ("site-packages", "test", "tests", "pydoc_data", "encodings", "idlelib"):
    assert not [f for f in files if part in f.split("/")[:-1]]
  assert list(source.documents("validation")) == list(source.documents("validation"))


def test_stdlib_selection_on_a_made_up_tree(tmp_path):
  for i in range(200):
    (tmp_path / f"m{i}").mkdir()
    for name in ("a.py", "b.py"):
      (tmp_path / f"m{i}" / name).write_text(f"m{i}")
  for folder in ("test", "site-packages", "m0/tests", "m1/__pycache__"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "no.py").write_text("no")
  (tmp_path / "_sysconfigdata__x.py").write_text("no")
  (tmp_path / "m0" / "empty.py").write_text("")
  (tmp_path / "m0" / "latin.py").write_bytes(b"\xe9")
  texts = both(sources.open_source("stdlib", root=str(tmp_path)))
  counts = {split: collections.Counter(documents) for split, documents in texts.items()}
  assert set(counts["train"]) | set(counts["validation"]) == {f"m{i}" for i in range(200)}
  assert not set(counts["train"]) & set(counts["validation"])
  assert set((counts["train"] + counts["validation"]).values()) == {2}
  assert 4 <= len(counts["validation"]) <= 30  # 200 · 0.08 = 16 ± 3.8


def test_the_hash_never_changes():
  # A change here silently moves validation text into training: it must be deliberate.
  assert sources.fraction_of("asyncio") == pytest.approx(0.88730722, abs=1e-6)
  values = np.array([sources.fraction_of(str(i)) for i in range(4000)])
  histogram = np.histogram(values, 16, (0, 1))[0]
  assert ((histogram - 250) ** 2 / 250).sum() < 37.7  # chi-square, 15 degrees, 0.1 %


def test_files_of_every_kind(tmp_path):
  (tmp_path / "1.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
  (tmp_path / "2.txt.gz").write_bytes(gzip.compress("zwö".encode(), mtime=0))
  (tmp_path / "3.txt.xz").write_bytes(lzma.compress(b"three"))
  (tmp_path / "4.txt.bz2").write_bytes(bz2.compress(b"four"))
  lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in ("five\n", " ", "six"))
  (tmp_path / "5.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
  (tmp_path / "6.txt").write_text(" \n")
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "7.txt").write_text("seven")
  (tmp_path / "8.val").write_text("eight")
  source = sources.open_source(f"files:{tmp_path}/**/*.*", validation=f"{tmp_path}/*.val")
  assert both(source) == {
    "train": ["one\r\n", "zwö", "three", "four", "five\n", "six", "seven"],
    "validation": ["eight"],
  }


def test_fraction_split_is_a_partition_and_grows_without_moving(tmp_path):
  path = tmp_path / "books.txt"
  documents = [f"book {i}" for i in range(300)]
  path.write_text("\n\n\n".join(documents))
  options = {"document_separator": "\n\n\n", "validation_fraction": 0.2}
  small = both(sources.open_source(f"files:{path}", **options))
  assert sorted(small["train"] + small["validation"]) == sorted(documents)
  assert 35 <= len(small["validation"]) <= 85  # 60 ± 7
  path.write_text("\n\n\n".join([*documents, "one more"]))
  large = both(sources.open_source(f"files:{path}", **options))
  assert all(set(small[split]) <= set(large[split]) for split in sources.SPLITS)


def test_the_end_of_every_file_is_held_out(tmp_path):
  """From the start of a line; nothing is in both or lost; lines of jsonl go by the hash."""
  prose = "".join(f"line {i}\n" for i in range(200))
  (tmp_path / "a.txt").write_text(prose)
  (tmp_path / "b.txt").write_text("x" * 50)
  found = both(sources.open_source(f"files:{tmp_path}/*.txt", validation_tail=0.1))
  long, short = zip(found["train"], found["validation"], strict=True)
  assert "".join(long) == prose and long[1].startswith("line ")
  assert 0.1 <= len(long[1]) / len(prose) < 0.11
  assert short == ("x" * 45, "x" * 5)
  lines = [json.dumps({"text": f"record {i}"}) for i in range(100)]
  (tmp_path / "c.jsonl").write_text("\n".join(lines))
  given = {"validation_fraction": 0.2}
  plain = both(sources.open_source(f"files:{tmp_path}/*.jsonl", **given))
  assert (
    both(sources.open_source(f"files:{tmp_path}/*.jsonl", **given, validation_tail=0.1)) == plain
  )


def test_description_follows_the_files(tmp_path):
  (tmp_path / "a.txt").write_text("one")
  before = sources.open_source(f"files:{tmp_path}/*").describe()
  json.dumps(before)
  assert sources.open_source(f"files:{tmp_path}/*").describe() == before
  (tmp_path / "b.txt").write_text("two")
  assert sources.open_source(f"files:{tmp_path}/*").describe() != before


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.txt", b"ab\xff", r"a\.txt is not UTF-8: byte 0xff at offset 2"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"byte 0xff at offset 24"),
    ("a.jsonl", b'{"text": "a"}\n{"te', r"a\.jsonl:2 is not JSON"),
    ("a.jsonl", b'{"body": "a"}', r"no text in field 'text'; the line holds: body"),
    ("a.jsonl", b'{"text": 3}', r"no text in field 'text'"),
    ("a.jsonl", b"[1]", r"no text in field 'text'; the line holds: list"),
    ("a.jsonl", b'{"text": "\\ud800"}', r"half a surrogate pair"),
    ("a.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a\.gz is not a whole \.gz file"),
    ("a.gz", b"text", r"a\.gz is not a whole \.gz file"),
    ("a.xz", lzma.compress(b"text" * 99)[:-9], r"a\.xz is not a whole \.xz file"),
    ("a.zst", b"\x28\xb5\x2f\xfd", r"\.zst files are not read; decompress it \(zstd -d\)"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", r"a\.jsonl\.zst: \.zst files are not read"),
    ("a.parquet", b"PAR1\xff", r"\.parquet files are not read; convert it to \.jsonl"),
    ("a.txt", b"PAR1\xff", r"a\.txt is a \.parquet file, which is not read; convert it to \.jsonl"),
    ("a.txt", b"\x28\xb5\x2f\xfd", r"a\.txt is a \.zst file, which is not read; decompress it"),
    (
      "a.jsonl",
      gzip.compress(b"{}", mtime=0),
      r"a\.jsonl is a \.gz file; let its name end in \.gz",
    ),
    ("a.json", b'{"text": "a"}\n{"text": "b"}', r"holds records \(text\).*; name it a\.jsonl"),
    ("a.json", b'\xef\xbb\xbf\n{"x": 1,\n"y": 2}\n\n{"x": 3}', r"holds records \(x, y\)"),
    ("a.json", b'{"text": "a"}\n', r"name it a\.jsonl, or a\.txt to train on the JSON itself"),
    ("a.json", b'[\n {"q": 1},\n {"q": 2}]', r"write one a line \(jq -c '\.\[\]'\) to a\.jsonl"),
    ("a.json.gz", gzip.compress(b'[{"q": 1}]', mtime=0), r"a\.json\.gz holds records \(q\)"),
  ],
)
def test_unusable_files(name, content, message, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=message) as caught:
    both(sources.open_source(f"files:{tmp_path}/*"))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "name, content",
  [
    ("a.txt", '{"text": "a"}\n{"text": "b"}'),
    ("a.json", '{\n  "name": "x",\n  "text": 3\n}\n'),
    ("a.json", '["a", "b"]'),
    ("a.json", "[]"),
    ("a.json", "{broken"),
    ("a.json", "[" * 100_000),
    ("a.json", '{"a": 1}, and so on'),
  ],
)
def test_json_that_is_no_records_is_text(name, content, tmp_path):
  (tmp_path / name).write_text(content)
  source = sources.open_source(f"files:{tmp_path}/*", validation=f"{tmp_path}/*")
  assert list(source.documents("validation")) == [content]


@pytest.mark.parametrize(
  "spec, options, message",
  [
    ("web", {}, "source='web' is unknown; use stdlib, files:GLOB"),
    ("files:", {}, "is unknown"),
    ("tfds:lm1b", {}, "write tfds:NAME/SPLIT:FEATURE"),
    ("stdlib", {"fields": "x"}, "no option fields; it has root, tests, validation_fraction"),
    ("stdlib", {"validation_fraction": 1.0}, r"outside \(0, 1\)"),
    ("files:/nowhere/*.txt", {}, "matches no file"),
    ("tfds:no_such_dataset/train:text", {}, "cannot be opened"),
  ],
)
def test_unusable_specs(spec, options, message):
  with pytest.raises(InputError, match=message) as caught:
    both(sources.open_source(spec, **options))
  assert "\n" not in str(caught.value)


def test_unknown_split_and_empty_stdlib(tmp_path):
  with pytest.raises(InputError, match="split='test' is unknown"):
    list(sources.open_source("stdlib").documents("test"))
  with pytest.raises(InputError, match=r"holds no \.py files"):
    both(sources.open_source("stdlib", root=str(tmp_path)))


def test_validation_glob_that_takes_everything(tmp_path):
  (tmp_path / "a.txt").write_text("one")
  with pytest.raises(InputError, match="leaves no training file"):
    both(sources.open_source(f"files:{tmp_path}/*.txt", validation=f"{tmp_path}/./*.txt"))


class DlmJaxLines(tfds.core.GeneratorBasedBuilder):
  """A dataset for the test below."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int32})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(50), "test": self._generate_examples(3)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"text": f"líne {i} of {count}", "n": i}


def test_tfds_source(tmp_path):
  DlmJaxLines(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  spec, options = "tfds:dlm_jax_lines/train:text", {"data_dir": str(tmp_path)}
  texts = both(sources.open_source(spec, validation="test", **options))
  assert texts["train"] == [f"líne {i} of 50" for i in range(50)]
  assert texts["validation"] == [f"líne {i} of 3" for i in range(3)]
  texts = both(sources.open_source(spec, validation_fraction=0.2, **options))
  assert sorted(texts["train"] + texts["validation"]) == sorted(
    f"líne {i} of 50" for i in range(50)
  )
  assert texts["validation"]
  with pytest.raises(InputError, match="no such feature; it has n, text"):
    both(sources.open_source("tfds:dlm_jax_lines/train:body", **options))
  with pytest.raises(InputError, match="is not text"):
    both(sources.open_source("tfds:dlm_jax_lines/train:n", **options))
  with pytest.raises(InputError, match="cannot be opened"):
    both(sources.open_source("tfds:dlm_jax_lines/valid:text", **options))
