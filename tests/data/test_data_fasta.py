# SPDX-License-Identifier: Apache-2.0
"""FASTA: what is read, what is left out and counted, what is refused and how."""

import bz2
import collections
import gzip
import json
import lzma
import os
import pathlib

import pytest

from dlm_jax.data import fasta, sources
from dlm_jax.errors import InputError


def both(source):
  return {split: list(source.documents(split)) for split in sources.SPLITS}


def dropped(source):
  """Return split → reason → sequences left out."""
  return {
    split: collections.Counter(reason for _, reason in source.sifted(split) if reason)
    for split in sources.SPLITS
  }


def everything(source):
  texts = both(source)
  return texts["train"] + texts["validation"]


def write(path, *sequences, start=0):
  path.write_text("".join(f">s{start + i} x\n{s}\n" for i, s in enumerate(sequences)))


def test_every_layout_and_compression(tmp_path):
  (tmp_path / "1.fasta").write_bytes(b"\xef\xbb\xbf>a first\r\nACD\r\nefg\r\n\r\n>b\nMKT*\n")
  (tmp_path / "2.fa.gz").write_bytes(gzip.compress(b">c|x y\nAC DE\nFG"))
  (tmp_path / "3.faa.xz").write_bytes(lzma.compress(b">d\nXBUZO\n"))
  (tmp_path / "4.fasta.bz2").write_bytes(bz2.compress(b">e\nWWW\n>f\nYYY"))
  records = [r for path in sorted(tmp_path.iterdir()) for r in fasta.read(str(path))]
  assert records == [
    ("a", "ACDEFG"),
    ("b", "MKT"),
    ("c|x", "ACDEFG"),
    ("d", "XBUZO"),
    ("e", "WWW"),
    ("f", "YYY"),
  ]
  source = sources.open_source(f"fasta:{tmp_path}/*")
  assert sorted(everything(source)) == ["ACDEFG", "MKT", "WWW", "XBUZO", "YYY"]  # one was double
  assert sum(counts["duplicates"] for counts in dropped(source).values()) == 1


def test_validation_files_and_their_sequences_are_held_out(tmp_path):
  write(tmp_path / "train.fasta", "AAAA", "CCCC", "AAAA", "DDDD")
  write(tmp_path / "valid.fasta", "CCCC", "EEEE", "EEEE", start=9)
  source = sources.open_source(f"fasta:{tmp_path}/*.fasta", validation=f"{tmp_path}/valid.fasta")
  assert both(source) == {"train": ["AAAA", "DDDD"], "validation": ["CCCC", "EEEE"]}
  assert dropped(source) == {"train": {"duplicates": 2}, "validation": {"duplicates": 1}}


def test_the_split_follows_from_names_and_is_a_partition(tmp_path):
  sequences = ["M" + format(i, "b").replace("0", "A").replace("1", "C") for i in range(300)]
  write(tmp_path / "a.fasta", *sequences)
  options = {"validation_fraction": 0.2}
  small = both(sources.open_source(f"fasta:{tmp_path}/*", **options))
  assert sorted(small["train"] + small["validation"]) == sorted(sequences)
  assert 35 <= len(small["validation"]) <= 85  # 60 ± 7
  held_out = [s for i, s in enumerate(sequences) if sources.fraction_of(f"s{i}") < 0.2]
  assert small["validation"] == held_out
  write(tmp_path / "0.fasta", "WWWW", start=1000)  # read first: nothing else moves
  large = both(sources.open_source(f"fasta:{tmp_path}/*", **options))
  assert all(set(small[split]) <= set(large[split]) for split in sources.SPLITS)


def test_lengths_are_limits_and_never_cut(tmp_path):
  write(tmp_path / "a.fasta", "", "AC", "ACD", "ACDE", "ACDEF", "ACDEFG")
  source = sources.open_source(
    f"fasta:{tmp_path}/*", min_length=3, max_length=5, validation_fraction=1e-9
  )
  assert both(source) == {"train": ["ACD", "ACDE", "ACDEF"], "validation": []}
  assert dropped(source)["train"] == {"shorter than 3": 2, "longer than 5": 1}
  both(source)
  assert dropped(source)["train"] == {"shorter than 3": 2, "longer than 5": 1}  # not added up


def test_description(tmp_path):
  write(tmp_path / "a.fasta", "ACDE")
  one = sources.open_source(f"fasta:{tmp_path}/*")
  before = one.describe()
  assert before["spec"] == f"fasta:{tmp_path}/*" and before["min_length"] == 1
  list(one.documents("train"))
  assert one.describe() == before == json.loads(json.dumps(before))  # counts are no setting
  assert sources.open_source(f"fasta:{tmp_path}/*", min_length=2).describe() != before
  write(tmp_path / "b.fasta", "ACDF")
  assert one.describe() != before


@pytest.mark.parametrize(
  "content, message",
  [
    (
      b">a\nACD\n>b\nAC-D\n",
      r"a\.fasta: record 'b' holds '-' at residue 3, which is no amino acid",
    ),
    (b">a\nAC*D\n", r"record 'a' holds '\*' at residue 3"),
    (b">a\nACJ\n", r"holds 'J' at residue 3"),
    (b">a\nAC1\n", "holds '1'"),
    (">a\nAC\u017f\n".encode(), "holds '\u017f'"),  # its upper case is S
    (b">a\nAC\xff\n", "no amino acid"),
    (b"ACD\n>a\nACD\n", r"a\.fasta:1 is not FASTA: expected a line that begins with '>'"),
    (b">a\nACD\n>\nACD\n", r"a\.fasta:3 is a header without a name"),
  ],
)
def test_what_is_refused(content, message, tmp_path):
  (tmp_path / "a.fasta").write_bytes(content)
  with pytest.raises(InputError, match=message) as caught:
    everything(sources.open_source(f"fasta:{tmp_path}/*"))
  assert "\n" not in str(caught.value)


def test_broken_archives_and_wrong_options(tmp_path):
  (tmp_path / "a.fasta.gz").write_bytes(gzip.compress(b">a\n" + b"ACDE" * 999, mtime=0)[:-9])
  with pytest.raises(InputError, match=r"a\.fasta\.gz is not a whole \.gz file"):
    everything(sources.open_source(f"fasta:{tmp_path}/*"))
  with pytest.raises(InputError, match=r"fasta:/nowhere/\* matches no file"):
    everything(sources.open_source("fasta:/nowhere/*"))
  with pytest.raises(InputError, match="has no option field; it has max_length, min_length"):
    sources.open_source("fasta:*", field="x")
  with pytest.raises(InputError, match="min_length=5 and max_length=4 leave no sequence"):
    sources.open_source("fasta:*", min_length=5, max_length=4)
  with pytest.raises(InputError, match="split='test' is unknown"):
    list(sources.open_source("fasta:*").documents("test"))


def test_public_example_file():
  """The sample file of the ESM repository, below $DLM_JAX_TEST_DATA."""
  path = pathlib.Path(os.environ.get("DLM_JAX_TEST_DATA", "absent"), "proteins")
  if not (path / "esm_some_proteins.fasta").is_file():
    pytest.skip("set DLM_JAX_TEST_DATA to a folder that holds proteins/esm_some_proteins.fasta")
  records = list(fasta.read(str(path / "esm_some_proteins.fasta")))
  assert len(records) == 15 and records[0][0] == "UniRef50_A0A1E3NP16"
  assert sorted(len(sequence) for _, sequence in records)[::14] == [71, 935]
