# SPDX-License-Identifier: Apache-2.0
"""GenPPL and entropy by hand and by the published protocol on a GPT-2."""

import builtins
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dlm_jax import convert, evaluate
from dlm_jax.errors import InputError
from dlm_jax.evaluate import generative

TINY = pathlib.Path(__file__).parents[1] / "golden" / "gpt2_tiny"
EOS = 3


@pytest.fixture(scope="module")
def judge():
  return evaluate.Judge(*convert.load(TINY)[:2])


@pytest.fixture(scope="module")
def example():
  return load_file(TINY / "example_io.safetensors")


def toy(tokens_BL):
  """Give every token id v the probability (v + 1) / 10, whatever came before."""
  log_p_V = jnp.log(jnp.arange(1, 5) / 10)
  return jnp.broadcast_to(log_p_V, (*tokens_BL.shape, 4))


def test_genppl_by_hand():
  samples = np.array(
    [
      [EOS, 0, 1, EOS, 2, EOS],  # EOS at 0 is the first and no target: 0, 1, 2 count
      [0, EOS, 1, EOS, EOS, EOS],  # the first EOS and the text after it: EOS, 1
      [2, 2, 2, 2, 2, 2],  # all five
    ]
  )
  nats = -np.log([0.1, 0.2, 0.3, 0.4, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3])
  got = evaluate.genppl(toy, samples, eos_id=EOS, batch_size=2)  # 3 is no multiple of 2
  assert got["tokens"] == 10 and got["samples"] == 3
  assert got["nll"] == pytest.approx(nats.mean(), rel=1e-6)
  assert got["genppl"] == pytest.approx(math.exp(nats.mean()), rel=1e-6)
  np.testing.assert_array_equal(
    generative.counted(samples, EOS),
    np.array([[1, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool),
  )
  # standard error of the ratio of two sums over three samples
  total, count = np.array([nats[:3].sum(), nats[3:5].sum(), nats[5:].sum()]), np.array([3, 2, 5])
  residual = total - nats.mean() * count
  error = np.sqrt(3 / 2 * (residual**2).sum()) / 10
  assert got["genppl_se"] == pytest.approx(got["genppl"] * error, rel=1e-5)


def test_genppl_without_eos_counts_all():
  got = evaluate.genppl(toy, np.full((1, 4), EOS))
  assert got["tokens"] == 3 and got["genppl"] == pytest.approx(1 / 0.4)
  assert math.isnan(got["genppl_se"])


def test_genppl_of_nothing_is_nan():
  got = evaluate.quality(toy, np.full((2, 4), EOS), eos_id=EOS)
  assert math.isnan(got.genppl) and got.tokens == 0 and got.entropy == 0
  assert str(got).startswith("GenPPL nan, entropy 0.00 ± 0.00 nats")


def test_genppl_error_matches_bootstrap():
  rng = np.random.default_rng(0)
  samples = rng.choice(4, (200, 30), p=[0.4, 0.3, 0.2, 0.1])
  got = evaluate.genppl(toy, samples, eos_id=EOS, batch_size=200)
  again = [
    evaluate.genppl(toy, samples[rng.integers(0, 200, 200)], eos_id=EOS, batch_size=200)["genppl"]
    for _ in range(200)
  ]
  assert np.std(again) == pytest.approx(got["genppl_se"], rel=0.2)


def test_published_protocol(judge, example):
  tokens, mask = example["tokens"].astype(np.int32), example["attention_mask"]
  got = evaluate.genppl(judge, tokens, eos_id=60, batch_size=2, mask_BL=mask, published=True)
  assert got["genppl"] == pytest.approx(example["genppl_f64"][0], rel=2e-5)
  np.testing.assert_array_equal(generative.counted(tokens, 60), example["counted"])
  assert got["tokens"] == example["counted"].sum()
  assert evaluate.entropy(tokens)["entropy"] == pytest.approx(example["entropy_f64"][0], rel=1e-12)
  unmasked = evaluate.genppl(judge, tokens, eos_id=60)["genppl"]
  assert unmasked != pytest.approx(got["genppl"], rel=1e-3)  # the last row's mask has a hole


def test_masking_the_padding_changes_nothing(judge, example):
  """Right padding is all EOS and comes last: a causal judge's counted targets never see it."""
  tokens, mask = example["tokens"][:4].astype(np.int32), example["attention_mask"][:4]
  with_mask = evaluate.genppl(judge, tokens, eos_id=60, mask_BL=mask, published=True)["genppl"]
  assert evaluate.genppl(judge, tokens, eos_id=60)["genppl"] == pytest.approx(with_mask, rel=1e-6)


def test_entropy_by_hand():
  samples = np.array([[1, 1, 2, 3], [5, 5, 5, 5], [0, 1, 0, 1]])
  values = [1.5 * math.log(2), 0.0, math.log(2)]
  np.testing.assert_allclose(evaluate.entropies(samples), values)
  got = evaluate.entropy(samples)
  assert got["entropy"] == pytest.approx(np.mean(values))
  assert got["entropy_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
  assert got["samples"] == 3


def test_quality_prints_the_pair():
  samples = jax.random.randint(jax.random.key(0), (1200, 8), 0, 3)
  got = evaluate.quality(toy, samples, eos_id=EOS, batch_size=600)
  for part in ("GenPPL", "entropy", "nats", "1,200 samples", "8,400 tokens"):
    assert part in str(got)


def test_retokenise_round_trip():
  def encode(text):
    return [ord(c) - 97 for c in text]

  def decode(ids):
    return "".join(chr(97 + i) * 2 for i in ids)

  tokens, mask = evaluate.retokenise(
    np.array([[0, 1, 2], [1, 1, 1]]), encode, eos_id=25, decode=decode, max_length=5
  )
  np.testing.assert_array_equal(tokens, [[0, 0, 1, 1, 2], [1, 1, 1, 1, 1]])
  assert mask.all()
  tokens, mask = evaluate.retokenise(["abc", "", "b"], encode, eos_id=25)
  np.testing.assert_array_equal(tokens, [[0, 1, 2], [25, 25, 25], [1, 25, 25]])
  np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 0], [1, 0, 0]])


def test_quality_of_retokenised_samples(judge):
  """The entropy is of the generator's ids, the perplexity of the judge's."""
  tokens = np.array([[0, 1, 2, 3], [1, 1, 1, 1]])
  judged = evaluate.retokenise(
    tokens, lambda text: [int(x) for x in text.split()], eos_id=60, decode=lambda ids: "7 8 9"
  )
  got = evaluate.quality(judge, tokens, eos_id=60, retokenised=judged)
  assert got.entropy == pytest.approx(math.log(4) / 2)
  assert got.tokens == 4
  direct = evaluate.genppl(judge, np.array([[7, 8, 9]]), eos_id=60)
  assert got.genppl == pytest.approx(direct["genppl"], rel=1e-5)


def test_features_are_the_last_real_state(judge, example):
  tokens, mask = example["tokens"][:3].astype(np.int32), example["attention_mask"][:3]
  got = evaluate.features(judge, tokens, batch_size=2, mask_BL=mask)
  assert got.shape == (3, 32)
  length = int(mask[2].sum())
  short = evaluate.features(judge, tokens[2:, :length])
  np.testing.assert_allclose(got[2], short[0], atol=1e-5)


def test_mauve_names_the_extra(monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "mauve":
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(InputError, match=r"pip install 'dlm_jax\[eval\]'"):
    evaluate.mauve(np.zeros((4, 2)), np.zeros((4, 2)))


def test_mauve_of_equal_and_distant_sets():
  pytest.importorskip("mauve")
  text = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
  assert evaluate.mauve(text, text, seeds=1)["mauve"] > 0.99
  assert evaluate.mauve(text + 5, text, seeds=2)["mauve"] < 0.1


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: evaluate.genppl(toy, np.array([[0, 4]])), "token id 4 is outside the judge's"),
    (lambda: evaluate.genppl(toy, np.array([[0], [1]])), "nothing to judge"),
    (lambda: evaluate.genppl(toy, np.array([[0, 1]]), batch_size=0), "batch_size=0"),
    (lambda: evaluate.entropy(np.zeros((0, 4), int)), "no entropy"),
    (lambda: evaluate.retokenise([], list, eos_id=0), "got 0 samples"),
    (lambda: evaluate.retokenise(np.zeros((1, 2), int), list, eos_id=0), "without `decode`"),
    (lambda: evaluate.retokenise(["a"], list, eos_id=0, max_length=1), "max_length=1"),
  ],
)
def test_rejects(call, message):
  with pytest.raises(InputError, match=message):
    call()


@pytest.mark.parametrize("texts", [["ab", "abcd"], ["", "abcd"], [".ab", "ab.cd"]], ids=str)
def test_padding_is_never_judged(texts):
  """Together as alone: no shorter text is charged the end of text that it is padded with."""
  ids, eos = "abcd.", 4
  encode = lambda text: [ids.index(c) for c in text]  # noqa: E731
  dislike = jnp.log(jnp.array([1.0, 1, 1, 1, 1e-4]))  # the end of text, by nine nats

  def judge(tokens_BL, mask_BL):
    del mask_BL
    return jnp.broadcast_to(dislike, (*tokens_BL.shape, 5))

  def measure(texts):
    tokens_BL, mask_BL = evaluate.retokenise(texts, encode, eos_id=eos)
    return evaluate.genppl(judge, tokens_BL, mask_BL=mask_BL, eos_id=eos)

  together = measure(texts)
  assert together["tokens"] == sum(max(len(text) - 1, 0) for text in texts)
  alone = [measure([text]) for text in texts]
  nats = sum(row["nll"] * row["tokens"] for row in alone if row["tokens"])
  assert together["nll"] == pytest.approx(nats / together["tokens"], rel=1e-6)


def test_genppl_and_entropy_vary_together():
  """Over sets of samples, log GenPPL and entropy correlate as one set says of itself."""
  rng = np.random.default_rng(0)
  log_p = jnp.log(jnp.array([0.6, 0.2, 0.1, 0.1]))

  def judge(tokens_BL):
    return jnp.broadcast_to(log_p, (*tokens_BL.shape, 4))

  def measure(count):
    wide = rng.random((count, 1)) < 0.5  # half of the samples keep to two tokens
    tokens_BL = np.where(wide, rng.integers(0, 4, (count, 12)), rng.integers(0, 2, (count, 12)))
    return evaluate.quality(judge, tokens_BL, batch_size=count)

  stated = measure(4000).correlation
  sets = [measure(200) for _ in range(60)]
  found = np.corrcoef([math.log(q.genppl) for q in sets], [q.entropy for q in sets])[0, 1]
  assert 0.5 < stated < 0.99 and found == pytest.approx(stated, abs=0.12)
  assert evaluate.quality(judge, np.zeros((3, 4), int)).correlation == 0
