# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of chat models: recorded ids, turns that text cannot forge, the mask."""

import json
import os
import pathlib

import pytest

from dlm_jax.data import tokenizers
from dlm_jax.data.tokenizers import chat, qwen3
from dlm_jax.errors import InputError

RECORDED = pathlib.Path(__file__).parents[1] / "golden" / "tokenizer_sdar.json"
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|MASK|>")


@pytest.fixture(scope="module")
def recorded():
  return json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def public():
  """The folder sdar_tokenizer (vocab.json, merges.txt, …) below $DLM_JAX_TEST_DATA."""
  folder = pathlib.Path(os.environ.get("DLM_JAX_TEST_DATA", "absent")) / "sdar_tokenizer"
  if not (folder / "vocab.json").is_file():
    pytest.skip("set DLM_JAX_TEST_DATA to a folder that holds sdar_tokenizer/vocab.json, …")
  return folder


@pytest.fixture
def tiny(tmp_path):
  """A directory in the public layout: 256 bytes, four merges, six added tokens."""
  import tokenizers as library

  merges = ["h i", "Ġ hi", "1 2", "Ċ Ċ"]
  symbols = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  symbols += [merge.replace(" ", "") for merge in merges]
  vocab = {symbol: i for i, symbol in enumerate(symbols)}
  added = {
    str(len(vocab) + i): {"content": token, "special": "|" in token and token != "<|MASK|>"}
    for i, token in enumerate(ADDED)
  }
  config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({**config, "added_tokens_decoder": added})
  )
  return tmp_path


def test_recorded_ids(public, recorded):
  tokenizer = tokenizers.load(public)
  assert tokenizer.vocab_size == tokenizer.mask_id == recorded["added_tokens"]["<|MASK|>"]
  assert tokenizer.stop_ids == (151645, 151643)
  for case in recorded["cases"]:
    ids = tokenizer.encode(case["text"], specials=True)
    assert ids == case["ids"], case["text"]
    shown = case["decoded"].replace("<|MASK|>", tokenizers.MASK_SYMBOL)
    assert tokenizer.decode(ids) == shown


def test_recorded_chats(public, recorded):
  tokenizer = tokenizers.load(public)
  for case in recorded["chat"]:
    assert (
      tokenizer.encode_chat(case["messages"], start=case["add_generation_prompt"]) == case["ids"]
    )


def test_recorded_templates(recorded):
  assert len(recorded["chat"]) == 2
  for case in recorded["chat"]:
    text = qwen3.render(case["messages"], start=case["add_generation_prompt"])
    assert text == case["rendered"]


def test_thoughts():
  """History loses its thoughts, the last answer keeps or gets one; an empty one on request."""
  ask, again = ({"role": "user", "content": text} for text in ("a", "b"))
  answer = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nso"}
  plain = {"role": "assistant", "content": "so"}
  turn = "<|im_start|>{}\n{}<|im_end|>\n".format
  history = turn("user", "a") + turn("assistant", "so") + turn("user", "b")
  for given in (answer, plain):
    assert qwen3.render([ask, given, again], start=False) == history
  kept = turn("user", "a") + turn("assistant", "<think>\nwhy\n</think>\n\nso")
  assert qwen3.render([ask, answer], start=False) == kept
  assert "<think>\n\n</think>\n\nso" in qwen3.render([ask, plain], start=False)
  opened = qwen3.render([ask], thinking=False)
  assert opened.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
  with pytest.raises(InputError, match="message 1 has the role 'function'"):
    chat.checked([ask, {"role": "function", "content": "4"}])


def test_text_forges_nothing(tiny):
  """Text that spells a frame or the mask stays text unless asked; thoughts are ordinary words."""
  tokenizer = tokenizers.load(tiny)
  assert isinstance(tokenizer, chat.ChatBPE)
  mask, end = tokenizer.mask_id, tokenizer.stop_ids[0]
  assert mask == tokenizer.vocab_size == 265
  for text, special in (("<|MASK|>", mask), ("<|im_end|>", end)):
    assert special not in tokenizer.encode(text)
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.encode(text, specials=True) == [special]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode_chat([{"role": "user", "content": text}], start=False)
    assert ids.count(special) == (special == end)
  assert len(tokenizer.encode("a<think>b")) == 3


@pytest.mark.parametrize(
  "text, words",
  [
    ("hi hi", ["hi", " hi"]),
    ("1212", ["1", "2", "1", "2"]),  # digits are never joined
    ("\n\n\n\n", ["\n\n", "\n\n"]),
    ("e\u0301", ["Ã", "©"]),  # composed first
  ],
)
def test_words(tiny, text, words):
  tokenizer = tokenizers.load(tiny)
  ids = tokenizer.encode(text)
  assert len(ids) == len(words)
  assert tokenizer.decode(ids) in (text, "\u00e9")


def test_from_tokenizer_json(tiny, tmp_path):
  """What `save` writes loads as the same tokenizer, from tokenizer.json alone."""
  tokenizer = tokenizers.load(tiny)
  tokenizer.save(tmp_path / "saved")
  again = tokenizers.load(tmp_path / "saved")
  assert again == tokenizer and again.fingerprint == tokenizer.fingerprint
  messages = [{"role": "system", "content": "12"}, {"role": "user", "content": "hi <|im_end|>"}]
  assert again.encode_chat(messages) == tokenizer.encode_chat(messages)
  text = qwen3.render([{"role": "system", "content": "12"}])
  assert again.encode(text, specials=True) == again.encode_chat(messages[:1])


def test_without_a_mask_or_frames(tiny):
  config = json.loads((tiny / "tokenizer_config.json").read_text())
  kept = {i: t for i, t in config["added_tokens_decoder"].items() if t["content"] == ADDED[0]}
  (tiny / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": kept}))
  tokenizer = tokenizers.load(tiny)
  assert tokenizer.mask_id == tokenizer.vocab_size == 261
  assert tokenizer.stop_ids == (tokenizer.eos_id,)
  with pytest.raises(InputError, match=r"has no <\|im_start\|>"):
    tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_damaged_added_tokens(tiny):
  config = json.loads((tiny / "tokenizer_config.json").read_text())
  (tiny / "tokenizer_config.json").write_text(
    json.dumps({**config, "added_tokens_decoder": {"x": {"content": "<|endoftext|>"}}})
  )
  with pytest.raises(InputError, match="added_tokens_decoder has 'x', which is no id"):
    tokenizers.load(tiny)
