# SPDX-License-Identifier: Apache-2.0
"""Judges that write: the law of what they draw, prompts, and what is refused."""

import dataclasses
import itertools
import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tiny_runs
from compiled import at_most

import dlm_jax
from dlm_jax import convert
from dlm_jax.cli.main import main
from dlm_jax.errors import InputError
from dlm_jax.models import GPT2, Causal, CausalConfig, GPT2Config, next_token_logits
from dlm_jax.text import load, next_token

V, L, ROWS = 5, 4, 4  # the last row of the network is no token


@pytest.fixture(scope="module")
def pipe():
  return dlm_jax.load(tiny_runs.make().judge)


def _network():
  """Return a network of four tokens and a row to spare, neither flat nor certain."""
  model = Causal(CausalConfig(vocab_size=V, dim=8, layers=1, heads=2, length=L, dtype="float32"))
  start = model.init(jax.random.key(0), jnp.zeros((1, L), jnp.int32))["params"]
  leaves, tree = jax.tree.flatten(start)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [0.4 * x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return model, tree.unflatten(noisy)


def _probabilities(logits, nucleus, top_k):
  """Return the truncated softmax of logits [..., V] without ties."""
  likely = scipy.special.softmax(logits, axis=-1)
  falling = -np.sort(-likely, axis=-1)[..., : top_k or None]
  kept = np.cumsum(falling, axis=-1) - falling < nucleus * falling.sum(axis=-1, keepdims=True)
  least = np.where(kept, falling, np.inf).min(axis=-1, keepdims=True)
  likely = np.where(likely >= least, likely, 0)
  return likely / likely.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("nucleus, top_k", [(1.0, 0), (0.9, 0), (1.0, 2)])
def test_texts_follow_the_law_of_the_network(nucleus, top_k):
  """Every text of four tokens, the first one given, against its enumerated probability."""
  model, params = _network()
  texts = np.array([(1, *rest) for rest in itertools.product(range(ROWS), repeat=L - 1)], np.int32)
  logits = next_token_logits(model, params, jnp.asarray(texts))[:, :-1, :ROWS]
  likely = _probabilities(np.asarray(logits, np.float64) / 0.8, nucleus, top_k)
  wanted = np.take_along_axis(likely, texts[:, 1:, None], axis=-1)[..., 0].prod(axis=1)
  assert wanted.sum() == pytest.approx(1, abs=1e-6)
  start = jnp.ones((20_000, L), jnp.int32)
  drawn = next_token._write(model, ROWS, top_k, params, start, 1, jax.random.key(2), 0.8, nucleus)
  code = np.asarray(drawn)[:, 1:] @ ROWS ** np.arange(L - 1)[::-1]
  counts = np.bincount(code, minlength=len(texts))
  often = wanted > 5e-4
  assert len(counts) == len(texts) and not counts[wanted == 0].any() and often.sum() > 7
  share = wanted[often] / wanted[often].sum()
  assert counts[often].sum() > 19_500
  result = scipy.stats.chisquare(counts[often], counts[often].sum() * share)
  assert result.pvalue > 1e-4


def test_it_has_the_face_of_all_that_write(pipe):
  assert isinstance(pipe, load.Writer) and "one after the other" in repr(pipe)
  given = [pipe.tokenizer.eos_id, *pipe.tokenizer.encode("def parse")]
  written = pipe.generate("def parse", num=3, seed=1, length=12)
  assert isinstance(written, load.Written) and written.lengths == [12] * 3
  assert [row[: len(given)] for row in written.tokens] == [given] * 3
  assert written.evaluations == 3 * (12 - len(given))
  assert written.texts == [pipe.tokenizer.decode(row) for row in written.tokens]
  assert len(set(written.texts)) == 3
  assert pipe(num=1, seed=1, length=12, prompt="def parse") == written.texts[:1]
  assert pipe.generate(seed=1).lengths == [pipe.length]
  sure = [pipe(top_k=1, seed=seed) for seed in (0, 1)]
  assert sure[0] == sure[1] != pipe(seed=1)
  assert [pipe(temperature=cold, seed=2) for cold in (0.0, 1e-38)] == [sure[0], sure[0]]


def test_other_numbers_and_prompts_compile_nothing(pipe, monkeypatch):
  once = jax.jit(at_most(next_token._write.__wrapped__), static_argnums=(0, 1, 2))
  monkeypatch.setattr(next_token, "_write", once)
  pipe(num=2, seed=1, prompt="a")
  pipe(num=2, seed=2, prompt="def parse", temperature=0.5, nucleus=0.5)


@pytest.mark.slow
def test_a_gpt2_writes(tmp_path):
  tokens = [*string.ascii_letters[:45], "ab", "<|endoftext|>"]
  model = GPT2(GPT2Config(vocab_size=len(tokens), n_positions=8, n_embd=8, n_layer=1, n_head=2))
  params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
  convert.save(tmp_path, model, params, None)
  (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
  (text,) = dlm_jax.load(tmp_path)(prompt="ab")
  assert text.startswith("<|endoftext|>ab")


@pytest.mark.parametrize(
  "options, message",
  [
    ({"steps": 8}, "steps is no option of a network that writes one token after the other"),
    ({"sampler": "psi"}, "sampler is no option of .* it takes num, seed, prompt, length, temp"),
    ({"length": 17}, "length=17: separator and prompt are 1 tokens and this network reads 16"),
    ({"length": 1}, "use 2 … 16"),
    ({"prompt": "many words " * 30}, "this network reads 16; shorten it"),
    ({"num": 0}, "num=0"),
    ({"temperature": -0.5}, "temperature=-0.5 must be 0 or more"),
    ({"nucleus": 0.0}, "nucleus=0.0"),
    ({"top_k": -1}, "top_k=-1"),
  ],
)
def test_refused_calls(pipe, options, message):
  with pytest.raises(InputError, match=message) as caught:
    pipe(**options)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"temperature": 0.0}], ids=str)
def test_logits_that_overflow_are_said(pipe, options):
  huge = dataclasses.replace(pipe, params=jax.tree.map(lambda x: x * 1e30, pipe.params))
  with pytest.raises(
    InputError, match=r"token 2 of text 1 are NaN or infinite, though its weights"
  ):
    huge(num=2, length=4, **options)


def test_refused_networks(pipe, tmp_path):
  with pytest.raises(InputError, match="does not decode blocks, so it takes no draft"):
    dlm_jax.load(pipe.source, draft=pipe.source)
  with pytest.raises(InputError, match="tokenizer"):
    dlm_jax.load(pipe.source, "bytes")


def test_on_the_command_line(pipe, capsys):
  where = f"--checkpoint={tiny_runs.make().judge}"
  main(["sample", where, "--num=2", "--seed=3", "--temperature=0.5", "--top_k=3", "--json"])
  texts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert texts == pipe(num=2, seed=3, temperature=0.5, top_k=3)
  for flag in ("--steps=4", "--show_steps", "--precision=exact"):
    assert main(["sample", where, flag]) == 2
    out, err = capsys.readouterr()
    assert not out and flag[2:].partition("=")[0] in err and len(err.splitlines()) == 1
