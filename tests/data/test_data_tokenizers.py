# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: reversible, deterministic, loadable from every layout, and honest about errors."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tokenizer_gpt2.json"
TEXTS = ["def f(x):\n  return x + 1\n", "def g(y):\n\treturn y - 1\n", "Zoë 日本語 🙂\r\n"] * 20


@pytest.fixture(scope="module")
def bpe():
  return tokenizers.train_bpe(TEXTS, 285)


@pytest.fixture(scope="module")
def gpt2_files():
  """The folder gpt2_bpe (encoder.json, vocab.bpe) below $DLM_JAX_TEST_DATA."""
  folder = pathlib.Path(os.environ.get("DLM_JAX_TEST_DATA", "absent")) / "gpt2_bpe"
  if not (folder / "vocab.bpe").is_file():
    pytest.skip("set DLM_JAX_TEST_DATA to a folder that holds gpt2_bpe/{encoder.json,vocab.bpe}")
  return folder


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_survives_the_round_trip(bpe, text):
  for tokenizer in (tokenizers.Bytes(), bpe):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids and tokenizer.mask_id not in ids


def test_bytes_ids_are_the_bytes():
  tokenizer = tokenizers.load("bytes")
  assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.mask_id) == (257, 256, 257)
  assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
  assert tokenizer.encode_batch(["a", "", "b"]) == [[97], [], [98]]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_decode_shows_mask_and_separator(name, bpe):
  tokenizer = tokenizers.Bytes() if name == "bytes" else bpe
  a, mask, eos = tokenizer.encode("x")[0], tokenizer.mask_id, tokenizer.eos_id
  assert tokenizer.decode(np.array([mask, a, mask, mask, eos, a, mask])) == "▯x▯▯<|endoftext|>x▯"
  assert tokenizer.decode(np.array([], np.int32)) == ""
  with pytest.raises(InputError, match=f"outside 0..{mask}"):
    tokenizer.decode([mask + 1])
  with pytest.raises(InputError, match="-1"):
    tokenizer.decode([-1])


def test_decode_tolerates_broken_utf8():
  assert tokenizers.Bytes().decode([0xC3, 257, 97]) == "\ufffd▯a"


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_separator_text_is_ordinary_unless_asked(name, bpe):
  tokenizer = tokenizers.Bytes() if name == "bytes" else bpe
  text = "x<|endoftext|>y"
  assert tokenizer.eos_id not in tokenizer.encode(text)
  x, y = tokenizer.encode("x"), tokenizer.encode("y")
  assert tokenizer.encode(text, specials=True) == [*x, tokenizer.eos_id, *y]


def test_bpe_compresses_and_puts_the_separator_last(bpe):
  assert (bpe.vocab_size, bpe.eos_id, bpe.mask_id) == (285, 284, 285)
  assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bpe_training_is_the_same_in_another_process(bpe):
  program = (
    f"from dlm_jax.data import tokenizers\nprint(tokenizers.train_bpe({TEXTS!r}, 285).fingerprint)"
  )
  environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
  environment["PYTHONPATH"] = os.pathsep.join(sys.path)
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
  )
  assert done.stdout.strip() == bpe.fingerprint


def test_save_and_load(bpe, tmp_path):
  for tokenizer in (tokenizers.Bytes(), bpe):
    folder = tmp_path / type(tokenizer).__name__
    tokenizer.save(folder)
    for path in (folder, folder / "tokenizer.json", str(folder)):
      loaded = tokenizers.load(path)
      assert loaded == tokenizer and loaded.fingerprint == tokenizer.fingerprint
  assert tokenizers.Bytes().fingerprint != bpe.fingerprint


def test_a_changed_merge_changes_the_fingerprint(bpe, tmp_path):
  content = json.loads(bpe.serialised)
  content["model"]["merges"].pop()
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  assert tokenizers.load(tmp_path).fingerprint != bpe.fingerprint


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocab_and_merges_load_as_the_same_tokenizer(names, bpe, tmp_path):
  model = json.loads(bpe.serialised)["model"]
  (tmp_path / names[0]).write_text(json.dumps(model["vocab"]), encoding="utf-8")
  merges = "\n".join(" ".join(pair) for pair in model["merges"])
  (tmp_path / names[1]).write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
  assert tokenizers.load(tmp_path).fingerprint == bpe.fingerprint


def test_separator_is_taken_from_tokenizer_config(bpe, tmp_path):
  bpe.save(tmp_path)
  content = json.loads(bpe.serialised)
  content["model"]["vocab"]["<stop>"] = 285
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
  assert tokenizers.load(tmp_path).eos_id == 285


def test_gpt2_golden_cases(gpt2_files):
  tokenizer = tokenizers.load(gpt2_files)
  golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
  assert (tokenizer.vocab_size, tokenizer.eos_id) == (golden["vocab_size"], 50256)
  for case in golden["cases"]:
    ids = tokenizer.encode(case["text"], specials=case.get("special", False))
    assert ids == case["ids"], case["text"]
    assert tokenizer.decode(ids) == case["decoded"]


def test_loading_nonsense_says_what_is_wanted(bpe, tmp_path):
  with pytest.raises(InputError, match="does not exist"):
    tokenizers.load(tmp_path / "absent")
  with pytest.raises(InputError, match="holds none of"):
    tokenizers.load(tmp_path)
  file = tmp_path / "tokenizer.json"
  file.write_text("{truncated")
  with pytest.raises(InputError, match="not readable JSON"):
    tokenizers.load(file)
  file.write_text("[]")
  with pytest.raises(InputError, match="list"):
    tokenizers.load(file)
  file.write_text('{"model": {"vocab": {"<|endoftext|>": 0}, "type": "Nonsense"}}')
  with pytest.raises(InputError, match=r"not a tokenizer\.json"):
    tokenizers.load(file)
  content = json.loads(bpe.serialised)
  content["added_tokens"] = []
  del content["model"]["vocab"]["<|endoftext|>"]
  file.write_text(json.dumps(content))
  with pytest.raises(InputError, match="names no document separator"):
    tokenizers.load(file)


def test_impossible_vocabularies():
  with pytest.raises(InputError, match="256 bytes and the separator need 257"):
    tokenizers.train_bpe(["abc"], 256)
  with pytest.raises(InputError, match="cannot be reached: the corpus yields 259 tokens"):
    tokenizers.train_bpe(["abc"], 1000)
  with pytest.raises(InputError, match="empty"):
    tokenizers.train_bpe([], 285)


def test_import_is_light():
  program = (
    "import sys, dlm_jax.data.tokenizers\n"
    "print([m for m in ('tensorflow_datasets', 'grain', 'tensorflow') if m in sys.modules])"
  )
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
  )
  assert done.stdout.strip() == "[]"
