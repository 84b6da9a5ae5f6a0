# SPDX-License-Identifier: Apache-2.0
"""Datasets of documents: a record each, batches of one bucket, one stream whatever happens."""

import collections
import json

import numpy as np
import pytest

from dlm_jax.data import builder, loader, sources, templates, tokenizers
from dlm_jax.errors import InputError

ESM = tokenizers.Esm()
BUCKETS = (8, 12, 20)
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
COUNTS = (21, 30, 9)  # training records by bucket


def name(number, length):
  """Return a sequence of a length that tells its number."""
  digits = f"{number:03d}"
  return ("".join(LETTERS[int(d)] for d in digits) + "W" * length)[:length]


def sequences():
  lengths = [5] * 20 + [6] + [7, 10] * 15 + [11] * 8 + [18]
  return [name(i, length) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  folder = tmp_path_factory.mktemp("documents")
  order = np.random.default_rng(0).permutation(len(sequences()))
  train = [sequences()[i] for i in order] + ["Y" * 19, "V" * 30, "AC", sequences()[0]]
  for split, texts in (("train", train), ("valid", ["MKT", "M" * 9, "MKV", "K" * 18, "M" * 50])):
    lines = "".join(f">{split}{i}\n{text}\n" for i, text in enumerate(texts))
    (folder / f"{split}.fasta").write_text(lines)
  options = {"validation": f"{folder}/valid.fasta", "min_length": 3}
  source = sources.open_source(f"fasta:{folder}/*.fasta", **options)
  prepare(source, folder / "data")
  return folder / "data"


def prepare(source, directory, length=20, **options):
  options = {"packing": "documents", "buckets": BUCKETS, "progress": False} | options
  return builder.prepare(source, ESM, length, directory, **options)


def make(directory, **options):
  return loader.make(directory, "train", **({"batch_size": 4, "seed": 3} | options))


def take(iterator, count):
  return [checked(next(iterator)) for _ in range(count)]


def take_one(parts):
  return [checked(next(part)) for part in parts]


def checked(record):
  """Return the tokens of a batch; what frames and fills them is not valid, all else is."""
  assert set(record) == {"tokens", "valid"} and record["valid"].dtype == bool
  np.testing.assert_array_equal(record["valid"], ~np.isin(record["tokens"], ESM.given_ids))
  return record["tokens"]


def same(ones, others):
  return len(ones) == len(others) and all(map(np.array_equal, ones, others))


def test_what_is_stored(directory):
  dataset = builder.open_dataset(directory)
  info, train = dataset.info, dataset.info.splits["train"]
  assert (info.packing, info.buckets, info.length) == ("documents", BUCKETS, 20)
  assert (info.features, info.pad_id, info.vocab_size) == (("tokens", "valid"), 1, 32)
  assert train.bucket_records == COUNTS and train.records == sum(COUNTS)
  assert train.dropped == {"duplicates": 1, "shorter than 3": 1, "longer than 18": 2}
  assert train.tokens == sum(len(s) + 2 for s in sequences()) and train.bytes_per_token == 1
  assert info.splits["validation"].dropped == {"longer than 18": 1}
  rows = [record["tokens"] for record in dataset.splits["train"]]
  np.testing.assert_array_equal(dataset.lengths("train"), [len(row) for row in rows])
  assert all(row[0] == ESM.cls_id and row[-1] == ESM.eos_id for row in rows)
  assert sorted(ESM.decode(row) for row in rows) == sorted(sequences())
  for record in dataset.splits["train"]:
    np.testing.assert_array_equal(record["valid"], ~np.isin(record["tokens"], ESM.given_ids))
  assert dataset.tokenizer() == ESM


def test_the_message_counts_what_was_dropped(directory, tmp_path):
  (tmp_path / "a.fasta").write_text("".join(f">s{i}\n{'ACD' * i}\n" for i in range(1, 40)))
  source = sources.open_source(f"fasta:{tmp_path}/a.fasta", validation_fraction=0.3)
  message = prepare(source, tmp_path / "out").message
  dropped = builder.open_dataset(tmp_path / "out").info.splits["train"].dropped["longer than 18"]
  assert f"; dropped: train {dropped} longer than 18, validation" in message
  assert sum(s.records for s in prepare(source, tmp_path / "out").info.splits.values()) == 6
  with pytest.raises(InputError, match=r"prepared with buckets=\[8, 12, 20\] not \[20\];"):
    prepare(source, tmp_path / "out", buckets=())


def test_datasets_of_text_say_nothing_new(tmp_path):
  (tmp_path / "a.txt").write_text("some text " * 50)
  (tmp_path / "b.txt").write_text("other text " * 50)
  source = sources.open_source(f"files:{tmp_path}/a.txt", validation=f"{tmp_path}/b.txt")
  builder.prepare(source, tokenizers.Bytes(), 16, tmp_path / "out", progress=False)
  content = json.loads((tmp_path / "out" / "dataset.json").read_text())
  assert list(content) == [
    "format",
    "source",
    "length",
    "wrap",
    "vocab_size",
    "eos_id",
    "tokenizer_fingerprint",
    "splits",
    "package_version",
    "files",
  ]
  assert list(content["splits"]["train"]) == [
    "records",
    "tokens",
    "documents",
    "text_bytes",
    "bytes_per_token",
  ]
  assert "together" not in loader.make(tmp_path / "out", "train", batch_size=2, seed=0).position()


@pytest.mark.parametrize(
  "options, message",
  [
    (
      {"packing": "rows"},
      "data.packing='rows' is unknown; use concatenate or documents or",
    ),
    ({"packing": "concatenate"}, "does not fit this tokenizer, .*use data.packing='documents'"),
    ({"buckets": (8, 8, 20)}, r"buckets=\(8, 8, 20\) must rise, from 3 or more, to data.length=20"),
    ({"buckets": (2, 20)}, "must rise"),
    ({"buckets": (8, 12)}, "to data.length=20"),
    ({"length": 4, "buckets": (4,)}, "none of the 4 documents of the train split fits into"),
  ],
)
def test_what_does_not_fit(options, message, tmp_path):
  (tmp_path / "a.fasta").write_text("".join(f">s{i}\n{'MK' * 4}{'A' * i}\n" for i in range(4)))
  (tmp_path / "b.fasta").write_text(">t\nA\n")
  source = sources.open_source(
    f"fasta:{tmp_path}/a.fasta", validation=f"{tmp_path}/b.fasta", validation_fraction=0.5
  )
  with pytest.raises(InputError, match=message):
    prepare(source, tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


def test_text_has_no_documents(tmp_path):
  source = sources.open_source("stdlib")
  with pytest.raises(InputError, match=r"has no start and padding; use data.packing='concatenate'"):
    builder.prepare(source, tokenizers.Bytes(), 16, tmp_path / "out", packing="documents")
  with pytest.raises(InputError, match=r"data.buckets=\(8, 16\) are of data.packing='documents'"):
    builder.prepare(source, tokenizers.Bytes(), 16, tmp_path / "out", buckets=(8, 16))


# --- the stream -----------------------------------------------------------------------------------


def test_a_batch_is_one_bucket_and_no_wider(directory):
  widths = collections.Counter()
  for batch in take(make(directory), 29):  # two epochs
    assert batch.dtype == np.int32 and batch.shape[0] == 4
    lengths = (batch != ESM.pad_id).sum(1)
    below = ([0, *BUCKETS])[BUCKETS.index(batch.shape[1])]
    assert (lengths > below).all() and (lengths <= batch.shape[1]).all()
    assert (batch[np.arange(4), lengths - 1] == ESM.eos_id).all() and (batch[:, 0] == 0).all()
    widths[batch.shape[1]] += 1
  assert widths == {8: 10, 12: 15, 20: 4}


@pytest.mark.parametrize("together", [1, 3])
def test_every_record_comes_once_an_epoch(together, directory):
  seen = collections.defaultdict(collections.Counter)
  for batch in take(make(directory, together=together), 60):  # 4 · 60 records: four epochs of 60
    seen[batch.shape[1]].update(ESM.decode(row) for row in batch)
  for length, records in zip(BUCKETS, COUNTS, strict=True):
    assert len(seen[length]) == records
    assert set(seen[length].values()) == {4}
  orders = [ESM.decode(row) for b in take(make(directory), 60) if b.shape[1] == 20 for row in b]
  assert len({tuple(orders[i : i + 9]) for i in range(0, 36, 9)}) == 4  # each epoch its own


def test_the_stream_depends_on_the_seed_alone(directory):
  one, again, other = (take(make(directory, seed=seed), 20) for seed in (3, 3, 4))
  assert same(one, again) and not same(one, other)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_the_global_batch(hosts, directory):
  whole, parts = make(directory), [make(directory, host=h, hosts=hosts) for h in range(hosts)]
  for batch in take(whole, 25):
    np.testing.assert_array_equal(np.concatenate(take_one(parts)), batch)
  assert whole.position() == parts[0].position() == parts[-1].position()


@pytest.mark.first_case
@pytest.mark.parametrize("steps", [0, 1, 14, 15, 37])
@pytest.mark.parametrize("together", [1, 2])
def test_resume_continues_with_the_next_batch(steps, together, directory):
  straight = take(make(directory, together=together), steps + 7)
  first = make(directory, together=together)
  take(first, steps)
  state = json.loads(json.dumps(first.position()))
  second = make(directory, together=together)
  take(second, 3)
  second.seek(state)
  assert same(take(second, 7), straight[steps:]) and same(take(first, 7), straight[steps:])


def test_resume_is_immediate_far_into_the_stream_and_on_other_hosts(directory):
  one = make(directory)
  state = {**one.position(), "step": 10**12}
  one.seek(state)
  parts = [make(directory, host=h, hosts=2) for h in range(2)]
  for part in parts:
    part.seek(state)
  np.testing.assert_array_equal(np.concatenate(take_one(parts)), checked(next(one)))


def test_what_one_step_takes_is_of_one_bucket(directory):
  widths = [batch.shape[1] for batch in take(make(directory, together=3), 60)]
  assert all(len(set(widths[i : i + 3])) == 1 for i in range(0, 60, 3))
  assert set(widths) == set(BUCKETS)
  with pytest.raises(InputError, match=r"together=1 \(saved\), 3 \(now\)"):
    make(directory, together=3).seek(make(directory).position())


def test_one_epoch_without_repeat(directory):
  batches = [checked(record) for record in make(directory, repeat=False)]
  assert collections.Counter(b.shape[1] for b in batches) == {8: 5, 12: 7, 20: 2}
  texts = [ESM.decode(row) for batch in batches for row in batch]
  assert len(set(texts)) == len(texts) == 56
  with pytest.raises(
    InputError, match="batch_size=31 is larger than split 'train' with 30 records"
  ):
    make(directory, batch_size=31, repeat=False)
  plain = make(directory, repeat=False, shuffle=False)
  unshuffled = [record["tokens"].shape[1] for record in plain]
  assert unshuffled == [8] * 5 + [12] * 7 + [20] * 2


def test_evaluation_is_grouped_by_length_and_drops_nothing(directory):
  groups = [checked(g) for g in loader.evaluation_groups(directory, "validation")]
  assert [g.shape for g in groups] == [(2, 8), (1, 12), (1, 20)]
  assert [ESM.decode(row) for g in groups for row in g] == ["MKT", "MKV", "M" * 9, "K" * 18]
  first = [checked(g) for g in loader.evaluation_groups(directory, "validation", 2)]
  assert [ESM.decode(row) for g in first for row in g] == ["MKT", "M" * 9]
  with pytest.raises(InputError, match="limit=0 records"):
    loader.evaluation_groups(directory, "validation", 0)
  with pytest.raises(InputError, match="documents of several lengths"):
    loader.evaluation_batches(directory, "validation", 1)


def test_templates_have_the_lengths_of_validation_records(directory):
  drawn = templates.like_validation(directory, 6, batch_size=2)
  assert drawn.residues == (3, 9, 3, 18, 3, 9) and drawn.buckets == BUCKETS
  rows = [np.pad(ESM.template(n, n + 2), (0, 18 - n)) for n in drawn.residues]
  np.testing.assert_array_equal(drawn.valid_NL, np.stack(rows) == ESM.mask_id)
