# SPDX-License-Identifier: Apache-2.0
"""The ELBO against enumeration of every corruption, causal perplexity by hand."""

import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import at_most

from dlm_jax import evaluate, process
from dlm_jax.errors import InputError
from dlm_jax.evaluate import likelihood
from dlm_jax.schedules import Polynomial

V, L, MASK = 3, 3, 2  # two words and the mask
EPS = 1e-3


@flax.struct.dataclass
class Table:
  """A denoiser that looks its logits up by the whole noisy sequence and the noise level."""

  logits_XLV: jax.Array

  def __call__(self, tokens_BL, sigma_B):
    place = jnp.sum(tokens_BL * V ** jnp.arange(L)[None], axis=1)
    return self.logits_XLV[place] * (1 + 0.1 * jnp.tanh(sigma_B))[:, None, None]


@pytest.fixture(scope="module")
def denoiser():
  return Table(2 * jax.random.normal(jax.random.key(5), (V**L, L, V)))


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(0, MASK, (4096, L)).astype(np.int32)


def exact(denoiser, proc, x0, points=2000):
  """Sum over all 2^L masks, integrate over t in [EPS, 1] by the midpoint rule; nats a sequence."""
  t = EPS + (1 - EPS) * (np.arange(points) + 0.5) / points
  schedule, t = proc.schedule, jnp.asarray(t, jnp.float32)
  alpha, weight, sigma = schedule.alpha(t), schedule.weight(t), schedule.sigma(t)
  alpha, weight = np.asarray(alpha, np.float64), np.asarray(weight, np.float64)
  total = np.zeros(points)
  for masked in itertools.product([False, True], repeat=L):
    xt = np.where(masked, MASK, x0)
    logits = denoiser(jnp.tile(jnp.asarray(xt, jnp.int32), (points, 1)), sigma)
    log_p = np.asarray(jax.nn.log_softmax(logits[..., :MASK]), np.float64)
    nats = -sum(log_p[:, l, x0[l]] for l in range(L) if masked[l])
    total += (1 - alpha) ** sum(masked) * alpha ** (L - sum(masked)) * weight * nats
  return total.mean()


@pytest.mark.parametrize("schedule", [None, Polynomial(power=2.0)])
def test_elbo_matches_enumeration(denoiser, tokens, schedule):
  options = {} if schedule is None else {"schedule": schedule}
  proc = process.Absorbing(vocab_size=V, mask_id=MASK, **options)
  kinds, counts = np.unique(tokens, axis=0, return_counts=True)
  truth = np.average([exact(denoiser, proc, x0) for x0 in kinds], weights=counts) / L
  options = {"batch_size": 1024, "samples_per_sequence": 4, "published": True}
  got = evaluate.elbo(denoiser, proc, tokens, jax.random.key(0), **options)
  assert abs(got["nelbo"] - truth) < 3 * got["nelbo_se"]
  assert got["nelbo_se"] < 0.03 * truth
  assert got["perplexity"] == pytest.approx(np.exp(got["nelbo"]))
  assert got["tokens"] == tokens.size and got["evaluations"] == 4 * len(tokens)


def test_elbo_error_is_calibrated(denoiser, tokens):
  """Over repetitions with fresh data, the scatter is what the stated error says, or less."""
  proc = process.Absorbing(vocab_size=V, mask_id=MASK)
  runs = [
    evaluate.elbo(denoiser, proc, tokens[i * 64 : i * 64 + 64], jax.random.key(i), batch_size=64)
    for i in range(64)
  ]
  scatter = np.std([run["nelbo"] for run in runs], ddof=1)
  stated = np.sqrt(np.mean([run["nelbo_se"] ** 2 for run in runs]))
  assert 0.4 < scatter / stated < 1.2


def test_elbo_does_not_depend_on_batch_size(denoiser, tokens):
  proc = process.Absorbing(vocab_size=V, mask_id=MASK)

  def run(size):
    return evaluate.elbo(denoiser, proc, tokens[:10], jax.random.key(1), batch_size=size)

  np.testing.assert_allclose(run(4)["nelbo"], run(10)["nelbo"], rtol=1e-6)
  np.testing.assert_allclose(run(10**9)["nelbo"], run(10)["nelbo"], rtol=1e-6)
  np.testing.assert_allclose(run(1)["nelbo_se"], run(64)["nelbo_se"], rtol=1e-6)


def test_one_program_for_all_batches_and_networks(denoiser, tokens, monkeypatch):
  """The last batch is as large as the others, and parameters are arguments."""
  once = functools.partial(jax.jit, static_argnames="process")
  monkeypatch.setattr(likelihood, "_nelbo", once(at_most(likelihood._nelbo.__wrapped__)))
  monkeypatch.setattr(likelihood, "_token_nll", jax.jit(at_most(likelihood._token_nll.__wrapped__)))
  proc = process.Absorbing(vocab_size=V, mask_id=MASK)
  for scale in (1.0, 2.0):
    table = Table(scale * denoiser.logits_XLV)
    likelihood.elbo(table, proc, tokens[:10], jax.random.key(0), batch_size=4)
    likelihood.ar_perplexity(jax.tree_util.Partial(_next, table), tokens[:10], batch_size=4)


def _next(table, tokens_BL):
  return table(tokens_BL, jnp.ones(len(tokens_BL)))


def test_times_hit_every_stratum():
  n, k = 6, 4
  t_NK = likelihood._times(jax.random.key(0), n, k, EPS).reshape(n, k)
  u_NK = (t_NK - EPS) / (1 - EPS)
  assert sorted(np.floor(u_NK.reshape(-1) * n * k)) == list(range(n * k))
  np.testing.assert_array_equal(np.floor(u_NK * k), np.tile(np.arange(k), (n, 1)))


def test_times_are_uniform_for_every_sequence():
  times = [likelihood._times(jax.random.key(i), 4, 1, EPS) for i in range(400)]
  assert np.abs(np.mean(times, axis=0) - 0.5).max() < 4 / np.sqrt(12 * 400)  # no fixed order


def bigram(tokens_BL):
  """Predict the next id to be the same with odds 3 : 1 : 1."""
  return jnp.log(1.0 + 2.0 * jax.nn.one_hot(tokens_BL, 3))


def test_ar_perplexity_by_hand():
  tokens = np.array([[0, 0, 1], [2, 2, 2]])
  got = evaluate.ar_perplexity(bigram, tokens, batch_size=1, bytes_per_token=2.0)
  nats = [np.log(5 / 3) + np.log(5), 2 * np.log(5 / 3)]
  assert got["nll"] == pytest.approx(sum(nats) / 4)
  assert got["perplexity"] == pytest.approx(np.exp(sum(nats) / 4))
  assert got["nll_se"] == pytest.approx(np.std(np.array(nats) / 2, ddof=1) / np.sqrt(2))
  # all six tokens stand for 12 bytes, also the two that are given, as in the bound's bits per byte
  assert got["bits_per_byte"] == pytest.approx(sum(nats) / 12 / np.log(2))
  assert got["tokens"] == 4 and got["sequences"] == 2


def test_ar_perplexity_of_our_own_judge():
  from dlm_jax import models

  shape = {"vocab_size": 7, "dim": 16, "layers": 1, "heads": 2, "length": 8}
  model = models.Causal(models.CausalConfig(**shape, dtype="float32"))
  tokens = jax.random.randint(jax.random.key(0), (5, 8), 0, 7)
  judge = evaluate.Judge(model, jax.jit(model.init)(jax.random.key(1), tokens)["params"])
  log_p = jax.nn.log_softmax(jax.jit(lambda judge, x: judge(x))(judge, tokens))[:, :-1]
  expected = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()
  assert evaluate.ar_perplexity(judge, tokens, batch_size=2)["nll"] == pytest.approx(
    float(expected), rel=1e-5
  )


@pytest.mark.parametrize(
  ("tokens", "options", "message"),
  [
    ([[0, MASK, 1]], {}, "contain the mask id 2"),
    ([[0, 9, 1]], {}, "token id 9 is outside"),
    ([[0, -1, 1]], {}, "token id -1 is outside"),
    (np.zeros((0, 3)), {}, "are empty"),
    ([[0, 1, 1]], {"batch_size": 0}, "batch_size=0"),
    ([[0, 1, 1]], {"samples_per_sequence": 0}, "samples_per_sequence=0"),
    ([[0, 1, 1]], {"bytes_per_token": 0.0}, "bytes_per_token=0.0"),
  ],
)
def test_elbo_rejects(denoiser, tokens, options, message):
  proc = process.Absorbing(vocab_size=V, mask_id=MASK)
  with pytest.raises(InputError, match=message):
    evaluate.elbo(denoiser, proc, np.array(tokens, np.int32), jax.random.key(0), **options)


def test_judge_rejects():
  with pytest.raises(InputError, match="token id 3 is outside the judge's vocabulary of 3"):
    evaluate.ar_perplexity(bigram, np.array([[0, 3]]))
  with pytest.raises(InputError, match="nothing to judge"):
    evaluate.ar_perplexity(bigram, np.array([[0], [1]]))
