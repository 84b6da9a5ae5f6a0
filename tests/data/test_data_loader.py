# SPDX-License-Identifier: Apache-2.0
"""The loader: one global stream, whatever the hosts, restarts and prefetching."""

import json

import numpy as np
import pytest

from dlm_jax import draw
from dlm_jax.data import builder, loader, sources, tokenizers
from dlm_jax.errors import InputError

RECORDS = 37


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """37 training records of length 8, each holding its index twice, and 5 for validation."""
  folder = tmp_path_factory.mktemp("loader")
  (folder / "train.txt").write_text("".join(f"{i:06d}" for i in range(RECORDS)))
  (folder / "valid.txt").write_text("".join(f"{i:06d}" for i in range(5)))
  source = sources.open_source(f"files:{folder}/train.txt", validation=f"{folder}/valid.txt")
  builder.prepare(source, tokenizers.Bytes(), 8, folder / "data", progress=False)
  return folder / "data"


def make(directory, **options):
  return loader.make(directory, "train", **({"batch_size": 8, "seed": 3} | options))


def take(iterator, count):
  return np.stack([next(iterator)["tokens"] for _ in range(count)])


def whole(records):
  return [record["tokens"] for record in records]


def numbers(batches):
  rows = np.asarray(batches).reshape(-1, 8)
  return [int(tokenizers.Bytes().decode(row[1:7])) for row in rows]


def test_batches_have_shape_and_dtype(directory):
  batch = next(make(directory))["tokens"]
  assert isinstance(batch, np.ndarray) and batch.dtype == np.int32 and batch.shape == (8, 8)


def test_an_epoch_is_a_permutation_and_the_next_another(directory):
  stream = numbers(take(make(directory), 5 * RECORDS))  # 8 · 5 · 37 records = 40 epochs
  epochs = np.reshape(stream, (40, RECORDS))
  assert (np.sort(epochs) == np.arange(RECORDS)).all()
  assert len({tuple(epoch) for epoch in epochs}) == 40
  # Every record has the same chance to come first: 40 · 37 pairs, mean position 18 ± 1.7.
  assert np.abs(np.argsort(epochs).mean(0) - 18).max() < 7


def test_the_stream_depends_on_the_seed_alone(directory):
  one, again, other = (numbers(take(make(directory, seed=s), 6)) for s in (3, 3, 4))
  assert one == again != other
  # Batch size only cuts the stream.
  assert numbers(take(make(directory, batch_size=12), 4)) == one


def test_without_shuffle_the_order_is_stored_order(directory):
  stream = numbers(take(make(directory, shuffle=False), 10))
  assert stream == [i % RECORDS for i in range(80)]


@pytest.mark.parametrize("hosts", [2, 4, 8])
@pytest.mark.parametrize("repeat", [True, False])
def test_hosts_together_see_the_global_batch(hosts, repeat, directory):
  whole = make(directory, repeat=repeat)
  parts = [make(directory, host=h, hosts=hosts, repeat=repeat) for h in range(hosts)]
  for _ in range(12 if repeat else 4):
    together = np.concatenate([next(part)["tokens"] for part in parts])
    np.testing.assert_array_equal(together, next(whole)["tokens"])
  if not repeat:
    assert [next(p, None) for p in [whole, *parts]] == [None] * (hosts + 1)


def test_a_batch_may_exceed_the_split(directory):
  batch = next(make(directory, batch_size=100))["tokens"]
  counts = np.bincount(numbers(batch))
  assert batch.shape == (100, 8) and set(counts) == {2, 3}


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 33])
def test_resume_continues_with_the_next_batch(steps, directory):
  straight = take(make(directory), steps + 7)
  first = make(directory)
  for _ in range(steps):
    next(first)
  state = json.loads(json.dumps(first.position()))
  assert first.position() == state  # taking it changes nothing
  second = make(directory)
  next(second)
  second.seek(state)
  assert second.position() == state
  np.testing.assert_array_equal(take(second, 7), straight[steps:])
  np.testing.assert_array_equal(take(first, 7), straight[steps:])


def test_resume_on_another_number_of_hosts(directory):
  one = make(directory)
  take(one, 5)
  state = one.position()
  parts = [make(directory, host=h, hosts=2) for h in range(2)]
  for part in parts:
    part.seek(state)
  np.testing.assert_array_equal(
    np.concatenate([next(part)["tokens"] for part in parts]), next(one)["tokens"]
  )
  assert parts[0].position() == one.position()


def test_resume_is_immediate_far_into_the_stream(directory):
  one = make(directory)
  one.seek({**one.position(), "step": 10**9})
  batch = next(one)["tokens"]
  one.seek({**one.position(), "step": 10**9})
  np.testing.assert_array_equal(next(one)["tokens"], batch)


def test_resume_at_the_end_of_a_finite_stream(directory):
  one = make(directory, repeat=False)
  assert len(list(one)) == 4
  state = one.position()
  two = make(directory, repeat=False)
  two.seek(state)
  assert list(two) == []


@pytest.mark.parametrize(
  "change", [{"seed": 4}, {"batch_size": 4}, {"shuffle": False}, {"repeat": False}]
)
def test_a_state_of_another_stream_is_refused(change, directory):
  state = make(directory, **change).position()
  with pytest.raises(InputError, match=f"{next(iter(change))}=.*restore these settings"):
    make(directory).seek(state)


def test_seeds_of_64_bits(directory):
  """They order as 32 bits of them do, and a state still knows the whole seed."""
  seeds = (3, 3 + 2**32, 3 + 2**40, 2**63 - 1, -1, -(2**63))
  orders = {tuple(numbers(take(make(directory, seed=seed), 5))) for seed in seeds}
  assert len(orders) == len(seeds)
  large = 3 + 2**32
  same = draw.fold_32(large)
  one, two = (make(directory, seed=seed) for seed in (large, same))
  np.testing.assert_array_equal(take(one, 3), take(two, 3))
  saved = json.loads(json.dumps(one.position()))
  assert saved["seed"] == large
  with pytest.raises(InputError, match=f"seed={large} .saved., {same} .now."):
    two.seek(saved)
  one.seek(saved)


def test_a_damaged_state_is_refused(directory):
  one = make(directory)
  for step in (None, -1, "3"):
    with pytest.raises(InputError, match="step="):
      one.seek({**one.position(), "step": step})


@pytest.mark.parametrize(
  "options, message",
  [
    ({"batch_size": 0}, "batch_size=0 is not positive"),
    ({"batch_size": 9, "hosts": 2}, r"batch_size=9 is not divisible by 2 hosts; use 8 or 10\."),
    ({"batch_size": 1, "hosts": 2}, r"use 2\."),
    ({"host": 2, "hosts": 2}, "host=2 is outside"),
    ({"seed": -(2**63) - 1}, "loader.seed=.* must be at least -9223372036854775808"),
    ({"seed": 2**63}, "loader.seed=.* must be at most 9223372036854775807"),
    ({"batch_size": 38, "repeat": False}, "use 37 or less, or repeat=True"),
  ],
)
def test_wrong_options(options, message, directory):
  with pytest.raises(InputError, match=message):
    make(directory, **options)


def test_wrong_places(directory, tmp_path):
  with pytest.raises(InputError, match=r"split='test' is not in .*; it has train, validation"):
    loader.make(directory, "test", batch_size=1, seed=0)
  with pytest.raises(InputError, match="is not a prepared dataset"):
    loader.make(tmp_path, "train", batch_size=1, seed=0)


def test_evaluation_is_in_order_and_whole(directory):
  batches = whole(loader.evaluation_batches(directory, "train", 10))
  assert [b.shape for b in batches] == [(10, 8)] * 3 and batches[0].dtype == np.int32
  assert numbers(batches) == list(range(30))
  assert numbers(whole(loader.evaluation_batches(directory, "train", 10, limit=2))) == list(
    range(20)
  )
  assert numbers(whole(loader.evaluation_batches(directory, "validation", 5))) == list(range(5))
  with pytest.raises(InputError, match="batch_size=6 is larger than split 'validation' with 5"):
    loader.evaluation_batches(directory, "validation", 6)
  with pytest.raises(InputError, match="limit=0"):
    loader.evaluation_batches(directory, "validation", 5, limit=0)
