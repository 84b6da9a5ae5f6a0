# SPDX-License-Identifier: Apache-2.0
"""Attention predicates against recorded masks and against the rules, word by word."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.models import masks

PUBLISHED = {"layout": "published"}


def _brute(rule, q, k=None):
  """Apply a rule to every pair of slots; each slot is a dict of plain integers."""
  names = ("kind", "time", "block", "document", "position")

  def rows(slots):
    columns = [np.asarray(getattr(slots, name)) for name in names]
    return [dict(zip(names, map(int, entry), strict=True)) for entry in zip(*columns, strict=True)]

  pairs = itertools.product(rows(q), rows(q if k is None else k))
  return np.array([rule(a, b) for a, b in pairs]).reshape(q.kind.size, -1)


@pytest.mark.parametrize("length", [16, 18])
def test_recorded_block_causal(golden, length):
  recorded = golden("sdar_masks__a")[0][f"block_causal_L{length}_block4"]
  slots = masks.sequence_slots(jnp.arange(length), 4)
  np.testing.assert_array_equal(masks.block_causal(slots), recorded)


@pytest.mark.parametrize("file, prefix", [("sdar_masks__a", "doubled_"), ("bd3_masks__a", "")])
def test_recorded_doubled(golden, file, prefix):
  found = {k: v for k, v in golden(file)[0].items() if k.startswith(prefix + "n")}
  assert len(found) >= 5
  for name, recorded in found.items():
    length, block = (int(part.strip("nblock")) for part in name.removeprefix(prefix).split("_"))
    slots = masks.doubled_slots(jnp.arange(length), block)
    np.testing.assert_array_equal(masks.doubled(slots), recorded, err_msg=name)


@pytest.mark.parametrize("lengths", [(8, 8), (6, 10), (4, 4, 8)])
def test_recorded_packed(golden, lengths):
  """Several documents in a row, each as [noisy | clean]; the predicate takes any order."""
  name = "packed_" + "_".join(map(str, lengths)) + "_block4"
  parts = [masks.doubled_slots(jnp.arange(n), 4, i) for i, n in enumerate(lengths)]
  slots = masks.join(*parts)
  np.testing.assert_array_equal(masks.doubled(slots), golden("sdar_masks__a")[0][name])


def _released_slots(labels, blocks, block_length):
  """Read recorded labels: −1 pads, 0 is prompt, up to T is data, T + 1 a mask, paired by rank.

  Where a draft stopped early its undrafted data also carry T + 1, and the ranks pair them first.
  """
  labels, blocks = np.asarray(labels), np.asarray(blocks).copy()
  kind = np.select(
    [labels < 0, labels == 0, labels <= block_length],
    [masks.PAD, masks.PROMPT, masks.DATA],
    masks.MASK,
  )
  time = np.where(kind == masks.DATA, labels, 0)
  for block in set(blocks[kind == masks.MASK]):
    data = time[(kind == masks.DATA) & (blocks == block)]
    asking = np.flatnonzero((kind == masks.MASK) & (blocks == block))
    time[asking] = masks.UNDRAFTED
    time[asking[: len(data)]] = data
  prompt = kind == masks.PROMPT
  blocks[prompt] = np.arange(prompt.sum()) // block_length
  return masks.Slots.make(kind, time, blocks)


def test_recorded_simsd(golden):
  """9.3-a: prompts, accepted blocks of any length, one to three drafts, padding, early stops."""
  vectors, config = golden("simsd_masks__a")
  for number, case in enumerate(config["cases"]):
    labels, blocks = (vectors[f"case{number}/{name}"] for name in ("token_labels", "block_ids"))
    slots = _released_slots(labels, blocks, case["block_length"])
    seen = np.asarray(masks.simsd(slots, **PUBLISHED))
    np.testing.assert_array_equal(seen, vectors[f"case{number}/mask"], err_msg=str(case))
  slots = _released_slots(vectors["training/token_labels"], vectors["training/block_ids"], 4)
  np.testing.assert_array_equal(masks.simsd(slots, **PUBLISHED), vectors["training/mask"])


def test_draft_slots_are_the_recorded_layout(golden):
  """The static form, given the recorded step maps, is the recorded tail of the sequence."""
  vectors, config = golden("simsd_masks__a")
  for number in (0, 6):  # one block; three blocks, recorded as [data | masks] per block
    case = config["cases"][number]
    size, blocks = case["block_length"], case["num_draft_blocks"]
    time = jnp.asarray(vectors[f"case{number}/step_map"] + 1)
    slots = masks.draft_slots(time, case["prompt_len"])
    seen = np.asarray(masks.simsd(slots, **PUBLISHED))
    order = np.arange(2 * blocks * size).reshape(2, blocks, size).swapaxes(0, 1).reshape(-1)
    tail = vectors[f"case{number}/mask"][case["prompt_len"] :, case["prompt_len"] :]
    np.testing.assert_array_equal(seen[order][:, order], tail)
    recorded = vectors[f"case{number}/position_ids"][case["prompt_len"] :]
    np.testing.assert_array_equal(slots.position[order], recorded)


def _simsd_rule(layout, clean):
  """Return the rules of one pass in words, for one query and one key."""

  def rule(q, k):
    if masks.PAD in (q["kind"], k["kind"]) or q["document"] != k["document"]:
      return False
    if k["kind"] == masks.COMMITTED:
      return q["kind"] != masks.COMMITTED or k["block"] <= q["block"]
    if q["kind"] == masks.COMMITTED:
      return False
    if q["kind"] == masks.PROMPT:
      return k["kind"] == masks.PROMPT and k["block"] <= q["block"]
    if k["kind"] == masks.PROMPT:
      return True
    if k["block"] != q["block"]:
      shown = masks.CLEAN if clean else masks.DATA
      return k["block"] < q["block"] and k["kind"] == shown
    pair = (q["kind"], k["kind"])
    if masks.CLEAN in pair:
      return pair == (masks.CLEAN, masks.CLEAN)
    if pair == (masks.DATA, masks.MASK) and layout == "published" and q["time"] == masks.CARRIED:
      return False
    return {
      (masks.DATA, masks.DATA): k["time"] <= q["time"],
      (masks.DATA, masks.MASK): k["time"] > q["time"],
      (masks.MASK, masks.DATA): k["time"] < q["time"],
      (masks.MASK, masks.MASK): k["time"] >= q["time"],
    }[pair]

  return rule


@pytest.mark.parametrize("layout", masks.LAYOUTS)
@pytest.mark.parametrize("clean", [False, True])
def test_simsd_against_the_rules(layout, clean):
  """9.3-a: all kinds × kinds × times × times × blocks, with ties and tokens never drafted."""
  kinds = [masks.PAD, masks.COMMITTED, masks.PROMPT, masks.DATA, masks.MASK, masks.CLEAN]
  times = [masks.CARRIED, 1, 2, masks.UNDRAFTED]
  every = np.array(list(itertools.product(kinds, times, [0, 1, 2], [0, 1]))).T
  slots = masks.Slots.make(*every)
  seen = masks.simsd(slots, layout=layout, clean=clean)
  np.testing.assert_array_equal(seen, _brute(_simsd_rule(layout, clean), slots))


def _random_times(rng, batch, blocks, size, carried, undrafted):
  """Draw steps with ties; the first tokens of the first block carried, some never drafted."""
  time = rng.integers(1, size, size=(batch, blocks, size))
  time[:, 0, :carried] = masks.CARRIED
  drop = rng.random(time.shape) < undrafted
  return jnp.asarray(np.where(drop & (time > 0), masks.UNDRAFTED, time))


@pytest.mark.parametrize("size, carried, undrafted", [(4, 0, 0.0), (4, 1, 0.0), (8, 3, 0.3)])
@pytest.mark.parametrize("layout", masks.LAYOUTS)
def test_simsd_sees_each_position_once(size, carried, undrafted, layout):
  """9.3-a: a drafted row sees exactly one of the two copies of each undecided position."""
  time = _random_times(np.random.default_rng(size), 6, 2, size, carried, undrafted)
  slots = masks.draft_slots(time, jnp.arange(6) * size)
  seen = np.asarray(masks.simsd(slots, layout=layout))
  assert seen.shape == (6, 4 * size, 4 * size)
  data, asking = seen[:, :, : 2 * size], seen[:, :, 2 * size :]
  block = np.asarray(slots.block[0])
  own = block[:, None] == block[None, : 2 * size]
  pad = np.asarray(slots.kind == masks.PAD)
  assert not seen[pad].any() and not seen.swapaxes(1, 2)[pad].any()
  decided = np.asarray(time.reshape(6, 1, -1) == masks.CARRIED)
  once = data.astype(int) + asking
  alone = (np.asarray(slots.time) == masks.CARRIED) & (layout == "published")  # carried rows
  wanted = np.where(alone[:, :, None] & ~decided, 0, 1) * own[None] * ~pad[:, :, None]
  np.testing.assert_array_equal(np.where(own[None], once, 0), wanted)
  assert not (asking & ~own[None]).any()  # never another block's masks


def test_data_after_a_step_sees_what_masks_before_the_next_see():
  slots = masks.draft_slots(jnp.array([[1, 2, 3, 4]]), 8)
  seen = np.asarray(masks.simsd(slots))
  for step in range(3):
    np.testing.assert_array_equal(seen[step], seen[4 + step + 1])


def test_clean_copies_replace_earlier_data():
  """Later blocks see the finished copy, not the data; the first block sees neither."""
  slots = masks.draft_slots(jnp.array([[1, 2], [2, 1]]), 0, clean=True)
  seen = np.asarray(masks.simsd(slots, clean=True))
  d0, d1, m0, m1, c0, c1 = (slice(2 * i, 2 * i + 2) for i in range(6))
  for later in (d1, m1, c1):
    assert seen[later, c0].all() and not seen[later, d0].any() and not seen[later, m0].any()
  assert seen[c0, c0].all() and not seen[c0, c1].any()
  assert not seen[d0, c0].any() and not seen[m0, c0].any() and not seen[d1, c1].any()


def test_stacked():
  """Each copy sees itself and the committed tokens; padding copies see nothing."""
  copies = masks.stacked_slots(jnp.array([[1, 3, -1, 9]]), jnp.array([8]), 4)
  past = masks.Slots.make(masks.COMMITTED, block=jnp.full((1, 8), -1))
  seen = np.asarray(masks.stacked(copies, masks.join(past, copies)))[0]
  block = np.kron(np.diag([1, 1, 0, 1]), np.ones((4, 4))).astype(bool)
  beside = np.repeat(np.array([1, 1, 0, 1], bool), 4)[:, None] & np.ones((1, 8), bool)
  np.testing.assert_array_equal(seen, np.concatenate([beside, block], 1))
  np.testing.assert_array_equal(copies.position[0], np.tile(np.arange(8, 12), 4))


def test_causal_and_documents():
  """Tokens of different documents never meet, whatever the order in which they come."""
  rng = np.random.default_rng(0)
  document, position = rng.integers(0, 3, 20), rng.integers(0, 9, 20)
  slots = masks.sequence_slots(jnp.asarray(position), 4, document)
  np.testing.assert_array_equal(
    masks.causal(slots),
    (document[:, None] == document[None]) & (position[None] <= position[:, None]),
  )
  same = document[:, None] == document[None]
  for predicate in (masks.block_causal, masks.doubled, masks.simsd, masks.stacked):
    assert not (np.asarray(predicate(slots)) & ~same).any()


def test_under_jit_and_vmap():
  """9.3-a: K blocks, batched, compiled: as one row at a time."""
  time = _random_times(np.random.default_rng(1), 3, 2, 4, 1, 0.2)
  start = jnp.array([0, 4, 12])
  together = jax.jit(lambda t, s: masks.simsd(masks.draft_slots(t, s)))(time, start)
  alone = jax.vmap(lambda t, s: masks.simsd(masks.draft_slots(t, s)))(time, start)
  np.testing.assert_array_equal(together, alone)


def test_unknown_layout():
  with pytest.raises(ValueError, match="layout='x' is unknown"):
    masks.simsd(masks.sequence_slots(jnp.arange(2), 2), layout="x")
