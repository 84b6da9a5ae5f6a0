# SPDX-License-Identifier: Apache-2.0
"""`dlm_jax.load` returns one kind of object: of masked, of uniform denoisers and of blocks."""

import json
import pathlib
import string

import pytest
import tiny_sdar

import dlm_jax
from dlm_jax.errors import InputError
from dlm_jax.text import load

PUBLIC = pathlib.Path(__file__).parents[1] / "golden" / "checkpoints"


def _words(directory):
  directory.mkdir()
  tokens = [*string.ascii_letters[:45], "ab", "<|endoftext|>"]
  (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (directory / "merges.txt").write_text("#version: 0.2\na b\n")
  return directory


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("face")
  words = _words(folder / "words")
  tiny_sdar.write(folder / "sdar", layers=1)
  return {
    "absorbing": dlm_jax.load(PUBLIC / "mdlm", words),
    "uniform": dlm_jax.load(PUBLIC / "duo", words),
    "blocks": dlm_jax.load(folder / "sdar"),
  }


_SHORT = {
  "absorbing": {"length": 6},
  "uniform": {"length": 6},
  "blocks": {"max_new_tokens": 6, "stop": (), "temperature": 1.0},
}


@pytest.mark.parametrize("kind", sorted(_SHORT))
def test_the_same_calls(pipes, kind):
  pipe, options = pipes[kind], _SHORT[kind]
  assert isinstance(pipe, load.Writer)
  texts = pipe(steps=2, num=3, seed=1, prompt="ab", **options)
  assert len(texts) == 3 and all(isinstance(text, str) for text in texts)
  written = pipe.generate("ab", steps=2, num=3, seed=1, **options)
  assert isinstance(written, load.Written)
  assert written.texts == texts and written.lengths == [6, 6, 6]
  assert [len(row) for row in written.tokens] == written.lengths
  made = {"absorbing": 3 * 2, "uniform": 3 * (2 + 1)}  # a uniform one removes noise besides
  assert written.evaluations == made.get(kind, written.evaluations)
  assert kind != "blocks" or written.evaluations == written.target_passes
  assert len({tuple(row) for row in written.tokens}) > 1
  assert pipe(steps=2, num=1, seed=1, prompt="ab", **options) == texts[:1]


@pytest.mark.parametrize("kind", sorted(_SHORT))
def test_it_shows_itself_in_a_line(pipes, kind):
  shown = repr(pipes[kind])
  assert len(shown) < 300 and "\n" not in shown and "Array" not in shown
  assert ("blocks of 4" if kind == "blocks" else "on a grid") in shown


@pytest.mark.parametrize(
  "kind, option, allowed",
  [
    ("absorbing", {"max_new_tokens": 4}, "it takes steps, num, seed, prompt, length, sampler"),
    ("uniform", {"threshold": 0.5}, "it takes steps, num, seed, prompt, length, sampler"),
    ("absorbing", {"tempature": 0.5}, r"it has \['bound', 'grid', 'guidance', 'noise_removal',"),
    ("absorbing", {"return_trace": True}, "ask `tokens`"),
    ("blocks", {"sampler": "psi"}, "it takes steps, num, seed, prompt, chat, max_new_tokens"),
    ("blocks", {"length": 4}, "it takes steps, num, seed, prompt, chat, max_new_tokens"),
    ("blocks", {"tresh": 0.5}, "did you mean 'threshold'"),
    ("blocks", {"num": 0}, "num=0"),
  ],
)
def test_options_of_other_kinds_are_refused(pipes, kind, option, allowed):
  for write in (pipes[kind], pipes[kind].generate):
    with pytest.raises(InputError, match=allowed) as caught:
      write(**option)
    assert next(iter(option)) in str(caught.value) and "\n" not in str(caught.value)


def test_evaluations_are_counted(pipes):
  pipe = pipes["absorbing"]
  hit = pipe.generate("ab", num=2, length=6, sampler="first_hitting")
  assert hit.evaluations == 2 * (6 - 2)  # the separator and one token are given
  psi = pipe.generate(num=2, length=6, steps=3, sampler="psi")
  assert psi.evaluations == 6
