# SPDX-License-Identifier: Apache-2.0
"""`dlm_jax.load`: strings in three lines."""

import shutil

import numpy as np
import pytest
import tiny_runs
from tiny_runs import quick  # noqa: F401

import dlm_jax
from dlm_jax.errors import InputError


@pytest.fixture(scope="module")
def pipe():
  return dlm_jax.load(str(tiny_runs.make().teacher))


def test_workdir_and_model_directory_are_the_same(pipe):
  direct = dlm_jax.load(str(tiny_runs.make().teacher / "final"))
  assert direct(steps=2, num=2, seed=3) == pipe(steps=2, num=2, seed=3)


def test_best_goes_before_final(tmp_path, pipe):
  tiny = tiny_runs.make()
  shutil.copytree(tiny.teacher / "final", tmp_path / "final")
  tiny_runs.export(tiny.config("teacher"), tmp_path / "best", seed=9)
  best = dlm_jax.load(str(tmp_path))
  assert best(steps=2, seed=3) == dlm_jax.load(str(tmp_path / "best"))(steps=2, seed=3)
  assert best(steps=2, seed=3) != pipe(steps=2, seed=3)


def test_texts_are_strings_without_masks(pipe):
  texts = pipe(steps=3, num=4)
  assert len(texts) == 4 and all(isinstance(text, str) and text for text in texts)
  tokens = np.asarray(pipe.tokens(steps=3, num=4))
  assert tokens.shape == (4, 16) and (tokens < pipe.tokenizer.vocab_size).all()
  assert texts == [pipe.tokenizer.decode(row) for row in tokens]


def test_text_i_does_not_depend_on_num(pipe):
  five = pipe(steps=3, num=5, seed=7)
  assert pipe(steps=3, num=2, seed=7) == five[:2] and pipe(steps=3, num=1, seed=7) == five[:1]
  assert len(set(five)) == 5
  assert pipe(steps=3, num=2, seed=8) != five[:2]


def test_prompt_is_kept_behind_the_separator(pipe):
  prompt = pipe.tokenizer.encode("def parse")
  tokens = np.asarray(pipe.tokens(steps=2, num=3, prompt="def parse"))
  np.testing.assert_array_equal(tokens[:, 0], pipe.tokenizer.eos_id)
  np.testing.assert_array_equal(tokens[:, 1 : 1 + len(prompt)], [prompt] * 3)


def test_trace_and_length(pipe):
  tokens, trace = pipe.tokens(steps=3, num=2, length=10, return_trace=True)
  assert tokens.shape == (2, 10) and trace.shape == (4, 2, 10)
  np.testing.assert_array_equal(trace[-1], tokens)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"steps": 0}, "steps=0"),
    ({"num": 0}, "batch=0"),
    ({"prompt": "many words " * 30}, "the prompt has"),
    ({"sampler": "euler"}, "sampler='euler' is unknown"),
  ],
)
def test_bad_calls(pipe, options, message):
  with pytest.raises(InputError, match=message):
    pipe(**options)


def test_bad_paths(tmp_path):
  with pytest.raises(InputError, match="holds no network"):
    dlm_jax.load(str(tmp_path))
  with pytest.raises(InputError, match="sampling needs a denoiser"):
    dlm_jax.load(str(tiny_runs.make().judge))
  shutil.copytree(tiny_runs.make().teacher / "final", tmp_path / "model")
  (tmp_path / "model" / "tokenizer.json").unlink()
  with pytest.raises(InputError, match="tokenizer"):
    dlm_jax.load(str(tmp_path / "model"))
