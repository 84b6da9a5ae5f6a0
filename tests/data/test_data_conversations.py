# SPDX-License-Identifier: Apache-2.0
"""Conversations: what is given and what is learnt, alone in a row or several; old and odd data."""

import doctest
import json
import lzma
import sys

import numpy as np
import pytest
import tiny_sdar

from dlm_jax.data import (
  builder,
  conversations,
  dataset,
  intact,
  loader,
  packing,
  sources,
  templates,
  tokenizers,
)
from dlm_jax.errors import InputError

BYTES = tokenizers.Bytes()
PAIRS = [(f"{a}+{a}", "4" * (1 + a % 3)) for a in range(12)]


@pytest.fixture
def folder(tmp_path):
  """Files in the shape of a question-and-answer set, one of them compressed."""
  lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS]
  with lzma.open(tmp_path / "train.jsonl.xz", "wt") as file:
    file.writelines(lines[:9])
  (tmp_path / "test.jsonl").write_text("".join(lines[9:]))
  return tmp_path


def source(folder, **options):
  fields = {"prompt": "question", "answer": "answer", "validation": f"{folder}/test.jsonl"}
  return sources.open_source(f"chat:{folder}/*.jsonl*", **fields | options)


def prepare(folder, name="out", length=16, **options):
  options = {"packing": "conversations", "progress": False} | options
  return builder.prepare(source(folder), BYTES, length, folder / name, **options)


def test_one_conversation_a_row(folder):
  info = prepare(folder).info
  assert info.features == ("tokens", "valid") and info.pad_id is None
  (group,) = loader.evaluation_groups(folder / "out", "train")
  assert len(group["tokens"]) == info.splits["train"].records == 9
  for (question, answer), tokens_L, valid_L in zip(
    PAIRS, group["tokens"], group["valid"], strict=False
  ):
    ids = [256, *question.encode(), 10, *answer.encode(), 256]
    assert tokens_L.tolist() == ids + [256] * (16 - len(ids))
    first = 2 + len(question)
    assert np.flatnonzero(valid_L).tolist() == list(range(first, first + len(answer) + 1))
  split = info.splits["train"]
  learnt = group["valid"].sum()
  assert split.bytes_per_token == sum(len(a) for _, a in PAIRS[:9]) / learnt
  assert split.tokens == sum(len(q) + len(a) + 3 for q, a in PAIRS[:9])
  assert builder.open_dataset(folder / "out").info == info


def test_several_share_a_row_of_whole_blocks(folder):
  info = prepare(folder, length=24, block_length=4).info
  assert info.features == ("tokens", "valid", "position", "segment")
  found = []
  for record in loader.make(
    folder / "out", "train", batch_size=1, seed=0, repeat=False, shuffle=False
  ):
    tokens_L, valid_L, position_L, segment_L = (record[name][0] for name in info.features)
    assert not valid_L[segment_L == 0].any() and (np.diff(segment_L)[segment_L[1:] > 0] >= 0).all()
    for number in range(1, segment_L.max() + 1):
      own = segment_L == number
      assert own.sum() % 4 == 0 and position_L[own].tolist() == list(range(own.sum()))
      found.append(BYTES.decode(tokens_L[own & ~valid_L][1:]).strip())
      assert valid_L[own][-1], "what follows an end is learnt up to the end of the block"
  assert found == [question for question, _ in PAIRS[:9]]
  assert info.splits["train"].records < 9 and info.splits["validation"].records == 3
  with pytest.raises(InputError, match="prepared with block_length=4 not 2"):
    prepare(folder, length=24, block_length=2)
  with pytest.raises(InputError, match=r"length=16 must be a multiple of data\.block_length=3"):
    prepare(folder, "other", block_length=3)


def test_what_is_too_long_is_dropped_whole(folder):
  info = prepare(folder, length=8).info  # [eos] a+a ⏎ answer [eos]: 6 + answer
  assert info.splits["train"].dropped == {"longer than 8": 3}
  assert info.splits["train"].records == 6 and info.splits["train"].documents == 9
  with pytest.raises(InputError, match="none of the 9 conversations of the train split"):
    prepare(folder, "short", length=5)


def test_messages_and_turns_of_chat_models(tmp_path):
  """With a chat tokenizer the assistant's words and the end of its turn are learnt, no frame is."""
  tokenizer = tokenizers.load(tiny_sdar.write(tmp_path / "network", layers=1))
  talk = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi <|im_end|>"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "12"},
    {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nhi"},
  ]
  ids, learnt = conversations.encode(talk, tokenizer)
  assert ids == tokenizer.encode_chat(talk, start=False)
  shown = "".join(
    tokenizer.decode([i]) if on else "·" for i, on in zip(ids, learnt, strict=True)
  ).strip("·")
  first, last = (part for part in shown.split("·") if part)
  assert first == "so<|im_end|>" and last == "<think>\nwhy\n</think>\n\nhi<|im_end|>"
  opened = tokenizer.encode_chat(talk[:4])
  assert ids[: len(opened)] == opened and not any(learnt[len(opened) - 4 : len(opened)])


def test_results_of_tools_are_given(tmp_path):
  """They share a user's turn; the call before them is learnt."""
  tokenizer = tokenizers.load(tiny_sdar.write(tmp_path / "network", layers=1))
  line = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "add"}]}
  line["messages"] += [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "so 4"}]
  (tmp_path / "a.jsonl").write_text(json.dumps(line))
  corpus = sources.open_source(f"chat:{tmp_path}/a.jsonl", validation=f"{tmp_path}/a.jsonl")
  (talk,) = corpus.conversations("validation")
  ids, learnt = conversations.encode(talk, tokenizer)
  assert ids == tokenizer.encode_chat(talk, start=False)
  assert "<tool_response>\n4\n</tool_response>" in tokenizer.decode(ids)
  told = tokenizer.decode([i for i, on in zip(ids, learnt, strict=True) if on])
  assert told == "add<|im_end|><think>\n\n</think>\n\nso 4<|im_end|>"


@pytest.mark.parametrize(
  "line, message",
  [
    ("{", r"a\.jsonl:1 is not JSON"),
    ('{"text": "x"}', r"a\.jsonl:1 has no messages; the line holds: text"),
    ('{"messages": "x"}', "is no conversation"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "is no conversation"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "one of the assistant at least"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "half a surrogate pair"),
  ],
)
def test_lines_that_are_no_conversation(line, message, tmp_path):
  (tmp_path / "a.jsonl").write_text(line + "\n")
  opened = sources.open_source(f"chat:{tmp_path}/a.jsonl", validation=f"{tmp_path}/a.jsonl")
  with pytest.raises(InputError, match=message) as caught:
    list(opened.conversations("validation"))
  assert "\n" not in str(caught.value)


def test_what_does_not_fit_together(folder):
  with pytest.raises(InputError, match="prompt='question' and answer=None name fields together"):
    source(folder, answer=None)
  text = sources.open_source(f"files:{folder}/*.jsonl", field="answer")
  with pytest.raises(InputError, match=r"needs prompts and answers, and data\.source=files:"):
    builder.prepare(text, BYTES, 16, folder / "out", packing="conversations")
  with pytest.raises(InputError, match="block_length=4 is of data"):
    builder.prepare(text, BYTES, 16, folder / "out", block_length=4)
  with pytest.raises(InputError, match="does not fit this tokenizer"):
    builder.prepare(source(folder), tokenizers.Esm(), 16, folder / "out", packing="conversations")


def test_templates_keep_prompts(folder):
  prepare(folder)
  answers = templates.like_validation(folder / "out", 5, 2)
  seen = []

  def run(number, prompt_BL):
    seen.append(prompt_BL)
    return np.where(prompt_BL == BYTES.mask_id, number, prompt_BL)

  drawn_NL = answers.draw(run)
  assert [prompt.shape for prompt in seen] == [(2, 16)] * 3
  np.testing.assert_array_equal(drawn_NL[~answers.valid_NL], answers.tokens_NL[~answers.valid_NL])
  found = [set(row[on]) for row, on in zip(drawn_NL, answers.valid_NL, strict=True)]
  assert found == [{0}, {0}, {1}, {1}, {2}]
  np.testing.assert_array_equal(answers.tokens_NL[:2], answers.tokens_NL[3:])


# --- datasets that are not ours -------------------------------------------------------------------


def test_a_dataset_without_masks_is_refused_with_the_command(folder):
  prepare(folder)
  path = folder / "out" / "dataset.json"
  content = json.loads(path.read_text()) | {"format": "dlm_jax.packed_tokens/1"}
  path.write_text(json.dumps(content))
  with pytest.raises(InputError, match="was prepared by an earlier version") as caught:
    builder.open_dataset(folder / "out")
  line = str(caught.value)
  assert "\n" not in line and "dlm-jax prepare --config=NAME " in line
  assert "is not a prepared dataset" not in line
  for field in ("data.length=16", f"tokenizer={folder}/out", f"directory={folder}/out_2"):
    assert f"--config.data.{field.removeprefix('data.')}" in line


def test_a_dataset_makes_us_import_nothing(folder):
  prepare(folder)
  path = next((folder / "out").rglob("features.json"))
  text = path.read_text()
  foreign = text.replace(intact._TEXTS[1], "this.That")
  pad = len(text) - len(foreign)
  path.write_text(foreign + " " * pad)  # the size is checked before
  with pytest.raises(InputError, match=r"features of this\.That, which is not ours"):
    builder.open_dataset(folder / "out")
  assert "this" not in sys.modules


@pytest.mark.parametrize("module", [builder, conversations, dataset, loader, packing, sources])
def test_examples_run(module):
  assert doctest.testmod(module).failed == 0
