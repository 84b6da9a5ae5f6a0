# SPDX-License-Identifier: Apache-2.0
"""`dlm_jax.load`: strings in three lines."""

import dataclasses
import json
import pathlib
import shutil
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from compiled import at_most

import dlm_jax
from dlm_jax import convert, process, sample
from dlm_jax.cli.main import main
from dlm_jax.data.tokenizers import MASK_SYMBOL
from dlm_jax.errors import InputError
from dlm_jax.text import denoiser


@pytest.fixture(scope="module")
def pipe():
  return dlm_jax.load(str(tiny_runs.make().teacher))


def test_workdir_and_model_directory_are_the_same(pipe):
  direct = dlm_jax.load(str(tiny_runs.make().teacher / "final"))
  assert direct(steps=2, num=2, seed=3) == pipe(steps=2, num=2, seed=3)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_second_call_compiles_nothing(pipe, monkeypatch):
  """Nor does the same network, loaded again."""
  monkeypatch.setattr(sample, "generate", at_most(sample.generate))
  denoiser._generate.cache_clear()
  assert pipe(steps=3, num=2, seed=0) != pipe(steps=3, num=2, seed=1)
  dlm_jax.load(str(tiny_runs.make().teacher))(steps=3, num=2, seed=2)
  with pytest.raises(AssertionError, match="traced > 1 times"):
    pipe(steps=4, num=2)
  denoiser._generate.cache_clear()


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
    ({"num": 0}, "num=0 must be at least 1"),
    ({"prompt": "many words " * 30}, "the prompt has"),
    ({"sampler": "euler"}, "sampler='euler' is unknown"),
  ],
)
def test_bad_calls(pipe, options, message):
  with pytest.raises(InputError, match=message):
    pipe(**options)


@pytest.mark.parametrize(
  "options", [{}, {"noise_removal": "greedy"}, {"temperature": 0.0}], ids=str
)
def test_logits_that_overflow_are_said(pipe, options):
  """Finite weights do not make finite logits; no text is made of those."""
  huge = jax.tree.map(lambda x: x * 1e30, pipe.denoiser.params)
  broken = dataclasses.replace(pipe, denoiser=pipe.denoiser.replace(params=huge))
  with pytest.raises(InputError, match=r"of text 1 are NaN or infinite, though its weights") as it:
    broken(num=2, steps=2, **options)
  assert str(pipe.source) in str(it.value)
  with pytest.raises(InputError, match="are NaN or infinite"):
    broken.tokens(steps=2, return_trace=True, **options)


def test_bad_paths(tmp_path):
  with pytest.raises(InputError, match="holds no network"):
    dlm_jax.load(str(tmp_path))
  with pytest.raises(InputError, match="sampling needs a denoiser"):
    denoiser.load_denoiser(str(tiny_runs.make().judge))
  shutil.copytree(tiny_runs.make().teacher / "final", tmp_path / "model")
  (tmp_path / "model" / "tokenizer.json").unlink()
  with pytest.raises(InputError, match="tokenizer"):
    dlm_jax.load(str(tmp_path / "model"))


# --- public checkpoints with GPT-2's files --------------------------------------------------------

PUBLIC = pathlib.Path(__file__).parents[1] / "golden" / "checkpoints"
_NAMES = {"hugging_face": ("vocab.json", "merges.txt"), "openai": ("encoder.json", "vocab.bpe")}


def _write_bpe(directory, size, names="hugging_face"):
  """Write the two files of a byte-level BPE with few of the bytes; the separator comes last."""
  directory.mkdir(exist_ok=True)
  tokens = [*string.ascii_letters[: size - 2], "ab", "<|endoftext|>"]
  vocab, merges = _NAMES[names]
  (directory / vocab).write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (directory / merges).write_text("#version: 0.2\na b\n")
  return directory


@pytest.mark.parametrize(
  "family, names",
  [("mdlm", "hugging_face"), ("mdlm", "openai"), ("duo", "openai"), ("didi_instruct", "openai")],
)
def test_public_checkpoints_with_a_tokenizer_given_by_path(tmp_path, family, names):
  words = _write_bpe(tmp_path / "words", 47, names)
  public = dlm_jax.load(PUBLIC / family, words)
  assert public.tokenizer.vocab_size == 47 and public.length == 24
  texts = public(steps=2, num=2, length=8)
  assert texts == dlm_jax.load(str(PUBLIC / family), tokenizer=str(words))(steps=2, num=2, length=8)
  assert len(texts) == 2 and all(texts)


def _keep_the_start(request):
  """Return what a sampler gets instead of sampling: the state, token 9 where nothing is given."""
  return jnp.where(request.frozen_BL, request.x_BL, 9)[None]


@pytest.mark.parametrize("family", ["mdlm", "duo"])
def test_a_prompt_is_given_whatever_the_process(tmp_path, family):
  public = dlm_jax.load(PUBLIC / family, _write_bpe(tmp_path / "words", 47))
  tokens = np.asarray(public.tokens(num=2, length=8, prompt="abc", sampler=_keep_the_start))
  given = [46, *public.tokenizer.encode("abc")]
  assert given == [46, 45, 2]
  np.testing.assert_array_equal(tokens, [given + [9] * 5] * 2)


def test_uniform_samples_keep_their_prompt(tmp_path):
  public = dlm_jax.load(PUBLIC / "duo", _write_bpe(tmp_path / "words", 47))
  for removal in ("greedy", "ancestral"):
    tokens = np.asarray(
      public.tokens(steps=2, num=3, length=8, prompt="abc", noise_removal=removal)
    )
    np.testing.assert_array_equal(tokens[:, :3], [[46, 45, 2]] * 3)
    assert ((tokens >= 0) & (tokens < 48)).all()


def test_padding_that_is_drawn_can_be_read(tmp_path):
  public = dlm_jax.load(PUBLIC / "duo", _write_bpe(tmp_path / "words", 47))
  assert public.tokenizer.decode([0, 47, 45]) == f"a{MASK_SYMBOL}ab"


def test_vocabularies_must_fit(tmp_path):
  for family, sizes in {"mdlm": (47,), "duo": (47, 48), "didi_instruct": (47,)}.items():
    for size in (46, 47, 48, 49):
      words = _write_bpe(tmp_path / f"words{size}", size)
      if size in sizes:
        assert dlm_jax.load(PUBLIC / family, words).tokenizer.vocab_size == size
      else:
        with pytest.raises(InputError, match=f"the tokenizer has {size} tokens and the network 4"):
          dlm_jax.load(PUBLIC / family, words)


def test_sample_and_convert_a_public_directory(capsys, tmp_path):
  words, out = _write_bpe(tmp_path / "words", 47, "openai"), tmp_path / "out"
  arguments = [f"--checkpoint={PUBLIC / 'mdlm'}", f"--tokenizer={words}"]
  assert main(["sample", *arguments, "--steps=2", "--length=8", "--json"]) == 0
  text = json.loads(capsys.readouterr().out)
  assert main(["convert", *arguments, f"--out={out}"]) == 0
  capsys.readouterr()
  assert main(["sample", f"--checkpoint={out}", "--steps=2", "--length=8", "--json"]) == 0
  assert json.loads(capsys.readouterr().out) == text
  assert (
    main(
      [
        "convert",
        f"--checkpoint={PUBLIC / 'duo'}",
        f"--tokenizer={words}",
        f"--out={tmp_path / 'duo'}",
      ]
    )
    == 0
  )
  assert convert.load(tmp_path / "duo")[2] == process.Uniform(vocab_size=48)
  _write_bpe(words, 45, "openai")
  assert main(["convert", *arguments, f"--out={tmp_path / 'no'}"]) == 2
  assert not (tmp_path / "no").exists() and "45 tokens" in capsys.readouterr().err
