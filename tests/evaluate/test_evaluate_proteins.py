# SPDX-License-Identifier: Apache-2.0
"""Proteins: distances against the textbook's table, scores by hand, likelihood of residues only."""

import dataclasses
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import evaluate, process
from dlm_jax.errors import InputError
from dlm_jax.evaluate import proteins

GIVEN = (0, 1, 2)


def levenshtein(a, b):
  above = list(range(len(b) + 1))
  for i, x in enumerate(a, start=1):
    row = [i]
    for j, y in enumerate(b, start=1):
      row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    above = row
  return above[-1]


def _words(count, letters):
  draw = random.Random(0)
  lengths = (1, 5, 20, 63, 64, 65, 100, 128, 129)
  return ["".join(draw.choices(letters, k=draw.choice(lengths))) for _ in range(count)]


@pytest.mark.first_case
@pytest.mark.parametrize("letters", ["AC", "ACDEFGHIKLMNPQRSTVWYX"])
def test_identity_is_the_textbooks(letters):
  words = _words(26, letters)
  for a in words[:13]:
    for b in words[13:]:
      expected = 1 - levenshtein(a, b) / max(len(a), len(b))
      assert proteins.identity(a, b) == pytest.approx(expected, abs=1e-12)
    near = max(proteins.identity(a, b) for b in words[13:])
    assert proteins.nearest_identity([a], words[13:])[0] == pytest.approx(near, abs=1e-12)


def test_identity_at_its_ends():
  assert proteins.identity("MKT", "MKT") == proteins.identity("", "") == 1
  assert proteins.identity("MKT", "WWWW") == proteins.identity("", "AC") == 0
  assert proteins.identity("ACDE", "CDE") == 0.75  # one deletion
  assert proteins.identity("A-C", "A.C") == 1  # what is no residue is all alike


def test_the_nearest_is_found_wherever_it_is():
  draw = random.Random(1)
  training = ["".join(draw.choices(proteins.LETTERS[:20], k=60)) for _ in range(5000)]
  sample = training[4321]
  changed = sample[:10] + "W" * 5 + sample[12:]
  assert proteins.nearest_identity([sample], training)[0] == 1
  expected = 1 - levenshtein(changed, sample) / len(changed)
  assert proteins.nearest_identity([changed], training)[0] == pytest.approx(expected)
  exhaustive = proteins._Set(training).identities(proteins._encode("ACDEFGHIKL" * 6), range(5000))
  assert proteins.nearest_identity(["ACDEFGHIKL" * 6], training)[0] == exhaustive.max()


def test_composition_by_hand():
  # counts 3 A, 1 C against 1 A, 1 C; 26 classes, 0.5 added to each
  p = np.array([3.5, 1.5] + [0.5] * 24) / 17
  q = np.array([1.5, 1.5] + [0.5] * 24) / 15
  kl = proteins.composition_kl(["AA", "AC"], ["CA"], smoothing=0.5)
  assert kl == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-9)
  assert proteins.composition_kl(["ACD"] * 3, ["DCA"] * 3) == 0
  assert proteins.composition_kl(["-"], ["A"]) > 0


def test_measure_and_its_hook():
  seen = []

  def scorer(texts):
    seen.append(texts)
    return np.array([60.0, 80.0])

  samples = ["ACDE", "ACDF"]
  scores = proteins.measure(samples, reference=["AAAA"], training=["ACDE", "WW"], scorer=scorer)
  assert seen == [samples] and (scores.score, scores.score_se) == (70, pytest.approx(10))
  assert scores.novelty == 0.125 and scores.novelty_se == pytest.approx(0.125)
  assert (scores.pairwise_identity, scores.samples, scores.compared) == (0.75, 2, 2)
  assert "novelty 0.125 ± 0.125 to 2 training" in str(scores) and "score 70.00" in str(scores)
  one = proteins.measure(["ACDE"], reference=["ACDE"], training=["ACDE"])
  assert one.novelty == 0 and math.isnan(one.pairwise_identity) and one.score is None
  assert "score" not in str(one) and dataclasses.asdict(one)["samples"] == 1


def test_bad_sets_and_scorers():
  for empty in ("samples", "reference", "training"):
    sets = {"samples": ["A"], "reference": ["A"], "training": ["A"]} | {empty: [""]}
    with pytest.raises(InputError, match=f"proteins: {empty} holds no sequence"):
      proteins.measure(sets.pop("samples"), **sets)
  with pytest.raises(InputError, match=r"scorer returned shape \(2,\) for 1 sequences"):
    proteins.measure(["A"], reference=["A"], training=["A"], scorer=lambda texts: np.zeros(2))


# --- likelihood and sample quality of residues only -----------------------------------------------

SHORT = np.array([[0, 3, 4, 2], [0, 3, 2, 1]])
LONG = np.array([[0, 3, 3, 4, 5, 2]])
LOG_P = np.log(np.array([0.001, 0.001, 0.001, 0.5, 0.3, 0.197]))


def _valid(*groups):
  return [~np.isin(group, GIVEN) for group in groups]


def _judge(tokens_BL):
  return jnp.broadcast_to(jnp.asarray(LOG_P), (*tokens_BL.shape, 6))


def test_judges_count_residues_only():
  counted = np.concatenate([SHORT.ravel(), LONG.ravel()])
  nll = -LOG_P[counted[counted > 2]].mean()
  valid = _valid(SHORT, LONG)
  scores = evaluate.ar_perplexity(_judge, [SHORT, LONG], valid_NL=valid, bytes_per_token=1.0)
  assert scores["nll"] == pytest.approx(nll, rel=1e-5)
  assert (scores["tokens"], scores["sequences"]) == (7, 3)
  assert scores["bits_per_byte"] == pytest.approx(nll / math.log(2), rel=1e-5)


class _Constant:
  """A denoiser that knows the frequencies, and whether a given token was ever masked."""

  def __init__(self):
    self.seen = []

  def __call__(self, xt_BL, sigma_B):
    jax.debug.callback(lambda x: self.seen.append(np.asarray(x)), xt_BL)
    return jnp.broadcast_to(jnp.append(jnp.asarray(LOG_P), 0.0), (*xt_BL.shape, 7))


def test_bounds_count_residues_only_and_never_mask_what_is_given():
  denoiser = jax.tree_util.Partial(_Constant())
  proc = process.Absorbing(vocab_size=7, mask_id=6, blocked=GIVEN)
  short, long = np.tile(SHORT, (400, 1)), np.tile(LONG, (400, 1))
  scores = evaluate.elbo(
    denoiser, proc, [short, long], jax.random.key(0), valid_NL=_valid(short, long), batch_size=400
  )
  jax.effects_barrier()
  counted = np.concatenate([SHORT.ravel(), LONG.ravel()])
  nll = -(LOG_P[counted[counted > 2]] - math.log(0.997)).mean()  # blocked ids have no share
  assert scores["nelbo"] == pytest.approx(nll, abs=4 * scores["nelbo_se"])
  assert scores["nelbo_se"] < 0.03 and scores["tokens"] == 7 * 400
  for xt in denoiser.func.seen:
    source = np.resize(SHORT if xt.shape[1] == 4 else LONG, xt.shape)
    given = source <= 2
    np.testing.assert_array_equal(xt[given], source[given])
    assert (xt == 6).any()
  tokens = np.zeros((2, 4), np.int32)
  with pytest.raises(InputError, match="are all given"):
    evaluate.elbo(denoiser, proc, tokens, jax.random.key(0), valid_NL=_valid(tokens)[0])


def test_quality_and_entropy_count_residues_only():
  quality = evaluate.quality(_judge, SHORT, eos_id=2, valid_NL=_valid(SHORT)[0])
  assert quality.genppl == pytest.approx(math.exp(-LOG_P[[3, 4, 3]].mean()), rel=1e-5)
  assert quality.tokens == 3
  assert quality.entropy == pytest.approx((math.log(2) + 0) / 2)
  assert evaluate.entropies(np.array([[0, 2, 1]]), np.zeros((1, 3), bool)).tolist() == [0]
