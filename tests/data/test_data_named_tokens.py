# SPDX-License-Identifier: Apache-2.0
"""What the files beside a vocabulary name: stops, added tokens, and what is missing from it."""

import json

import pytest
import tiny_sdar

from dlm_jax.data import tokenizers
from dlm_jax.data.tokenizers.base import check_text
from dlm_jax.errors import InputError

END, TEXT = 258, 256  # of a turn, of a text
FILES = {"map": "special_tokens_map.json", "generation": "generation_config.json"}


@pytest.fixture
def load(tmp_path):
  """Return a function that loads the tiny chat tokenizer with such files beside it."""

  def run(*, config=None, added=None, **files):
    tiny_sdar.words(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), **(config or {})}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    for name, content in (files | ({} if added is None else {"added": added})).items():
      (tmp_path / FILES.get(name, "added_tokens.json")).write_text(json.dumps(content))
    return tokenizers.load(tmp_path)

  return run


@pytest.mark.parametrize(
  "files, stops",
  [
    ({}, (END, TEXT)),
    ({"config": {"eos_token": "<|im_end|>"}}, (END, TEXT)),  # as chat releases of Qwen3
    ({"config": {"eos_token": {"content": "<|im_end|>"}}}, (END, TEXT)),
    ({"config": {"eos_token": None}, "map": {"eos_token": "<|im_end|>"}}, (END, TEXT)),
    ({"config": {"eos_token": None}, "generation": {"eos_token_id": TEXT}}, (END, TEXT)),
    ({"generation": {"eos_token_id": 259}}, (END, TEXT, 259)),
    ({"generation": {"eos_token_id": [END, TEXT, 65]}}, (END, TEXT, 65)),
    ({"map": {"eos_token": "<think>"}}, (END, TEXT, 259)),
  ],
)
def test_every_file_names_stops(load, tmp_path, files, stops):
  """Each once; a saved tokenizer has the same."""
  words = load(**files)
  assert words.stop_ids == stops
  words.save(tmp_path / "saved")
  assert tokenizers.load(tmp_path / "saved").stop_ids == stops


def test_tokens_of_added_tokens_json(load):
  """The older layout: ids there, and what is special in special_tokens_map.json."""
  added = {token: 256 + i for i, token in enumerate(tiny_sdar.ADDED)}
  specials = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<think>"}
  whole = load()
  words = load(config={"added_tokens_decoder": None}, added=added, map=specials)
  assert words.stop_ids == (END, TEXT) and words.mask_id == whole.mask_id == tiny_sdar.MASK
  asked = [{"role": "user", "content": "a<think>"}]
  assert words.encode_chat(asked) != whole.encode_chat(asked)  # there, it is an ordinary word
  assert len(words.encode("<think>")) == 7 and len(words.encode("</think>")) == 1


def test_the_config_goes_before_added_tokens_json(load):
  """Of one id, as public SDAR files have it for the mask; others are added."""
  words = load(added={"<MASK>": tiny_sdar.MASK, "<think>": 7, "<more>": 262})
  assert words.mask_id == tiny_sdar.MASK and words.encode("<more>", specials=True) == [262]
  assert words.encode("<think>") == [259]


def test_tokens_that_only_the_config_has(load, tmp_path):
  """Beside a tokenizer.json without them; and plain tokenizers take stops from all files, too."""
  whole = load()
  content = json.loads(whole.serialised)
  content["added_tokens"] = content["added_tokens"][:3]
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  assert tokenizers.load(tmp_path).mask_id == tiny_sdar.MASK
  (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
  plain = tokenizers.load(tmp_path)
  assert type(plain) is tokenizers.BPE and plain.stop_ids == (TEXT, END)


@pytest.mark.parametrize(
  "files, message",
  [
    ({"config": {"eos_token": "</s>"}}, r"config\.json names the eos_token '</s>', which is miss"),
    ({"map": {"eos_token": "<end>"}}, r"map\.json names the eos_token '<end>', which is missing"),
    ({"config": {"added_tokens_decoder": None}}, r"the eos_token '<\|endoftext\|>', which is miss"),
    ({"generation": {"eos_token_id": 999}}, r"generation_config\.json names the eos_token_id 999"),
    ({"generation": {"eos_token_id": [True]}}, "names the eos_token_id True, which is no id"),
    ({"generation": [1]}, "it holds a list, not an object"),
    ({"config": {"eos_token": 5}}, "eos_token=5 is not a text or an object"),
    (
      {"config": {"added_tokens_decoder": [1]}},
      "added_tokens_decoder must be an object, got a list",
    ),
    (
      {"config": {"added_tokens_decoder": {"256": "a"}}},
      r"decoder\.256 must be an object, got a text",
    ),
    ({"added": {"<far>": 999}}, "the added token '<far>' the id 999, which here is 262"),
    ({"added": {"<odd>": "a"}}, "gives '<odd>' the id 'a'; ids are whole numbers"),
  ],
)
def test_what_is_missing_is_named(load, files, message):
  """Never replaced by another word, though the vocabulary may have one of a usual name."""
  with pytest.raises(InputError, match=message) as error:
    load(**files)
  assert "\n" not in str(error.value)


def test_json_nested_without_end(load, tmp_path):
  load()
  (tmp_path / "special_tokens_map.json").write_text("[" * 200_000)
  with pytest.raises(InputError, match=r"special_tokens_map\.json is not readable JSON"):
    tokenizers.load(tmp_path)


@pytest.mark.parametrize("words", ["bytes", "chat"])
def test_text_that_is_none(load, words):
  """Half a surrogate pair, or bytes that a command line could not decode."""
  words = tokenizers.Bytes() if words == "bytes" else load()
  for specials in (False, True):
    with pytest.raises(InputError, match=r"the text holds \\ud800 at character 2, half a surr"):
      words.encode("a\ud800b", specials=specials)
  with pytest.raises(InputError, match=r"^it holds the byte 0xff at character 1, which is not UTF"):
    check_text("\udcff", "it")


def test_expressions_that_give_up(load, tmp_path):
  """A panic of the library is no Exception."""
  content = json.loads(load().serialised)
  content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(x+x+)+y"
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  words = tokenizers.load(tmp_path)
  for encode in (words.encode, lambda text: words.encode(text, specials=True)):
    with pytest.raises(InputError, match="its regular expression cannot split this text"):
      encode("x" * 40)
