# SPDX-License-Identifier: Apache-2.0
"""Likelihood and quality of answers given their prompts, against enumeration by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import evaluate, process
from dlm_jax.errors import InputError

V, L, MASK = 3, 4, 3
TOKENS = np.array([2, 0, 1, 2])
VALID = np.array([False, True, True, False])
PROC = process.Absorbing(vocab_size=V + 1, mask_id=MASK)
TABLE = np.random.default_rng(0).normal(size=(L, L, V + 1, V + 1))


def _logits(tokens_BL):
  """Every position's prediction depends on every token, the given ones too."""
  seen = jax.nn.one_hot(tokens_BL, V + 1)
  return jnp.einsum("bkv,lkvw->blw", seen, jnp.asarray(TABLE, jnp.float32))


def _denoiser(tokens_BL, sigma_B):
  del sigma_B
  return _logits(tokens_BL)


def _nats(masked, tokens):
  """Return −log p of the masked positions of a state, in nats."""
  state = jnp.asarray(np.where(masked, MASK, tokens), jnp.int32)
  log_x0 = np.asarray(PROC.log_x0(_logits(state[None])[0], state))
  return -sum(log_x0[i, tokens[i]] for i in np.flatnonzero(masked))


def _bound(tokens, eps=1e-3, points=4000):
  """Return the bound in nats per valid token: over all states, the mean over times."""
  t = eps + (1 - eps) * (np.arange(points) + 0.5) / points
  gone = 1 - np.asarray(PROC.schedule.alpha(jnp.asarray(t, jnp.float32)), np.float64)
  weight = np.asarray(PROC.schedule.weight(jnp.asarray(t, jnp.float32)), np.float64)
  total = 0.0
  for choice in itertools.product([False, True], repeat=VALID.sum()):
    masked = np.zeros(L, bool)
    masked[VALID] = choice
    share = gone ** sum(choice) * (1 - gone) ** (len(choice) - sum(choice))
    total += (share * weight).mean() * _nats(masked, tokens)
  return total / VALID.sum()


def test_bound_of_valid_tokens():
  tokens, valid = np.tile(TOKENS, (4000, 1)), np.tile(VALID, (4000, 1))
  options = {"batch_size": 4000, "valid_NL": valid}
  denoiser = jax.tree_util.Partial(_denoiser)
  scores = evaluate.elbo(denoiser, PROC, tokens, jax.random.key(0), **options)
  assert scores["tokens"] == 8000 and scores["nelbo_se"] < 0.05
  assert abs(scores["nelbo"] - _bound(TOKENS)) < 4 * scores["nelbo_se"]
  # Another prompt has another bound: it is read.
  assert abs(_bound(np.array([0, 0, 1, 2])) - _bound(TOKENS)) > 8 * scores["nelbo_se"]


def test_likelihood_of_valid_tokens():
  def causal(tokens_BL):
    earlier = jnp.tril(jnp.ones((L, L)))
    seen = jax.nn.one_hot(tokens_BL, V + 1)
    return jnp.einsum("bkv,lk,lkvw->blw", seen, earlier, jnp.asarray(TABLE, jnp.float32))

  log_p = np.asarray(jax.nn.log_softmax(causal(jnp.asarray(TOKENS)[None])[0]))
  wanted = -(log_p[0, TOKENS[1]] + log_p[1, TOKENS[2]]) / 2
  given = {"valid_NL": VALID[None], "bytes_per_token": 2.0}
  scores = evaluate.ar_perplexity(causal, TOKENS[None], **given)
  assert scores["tokens"] == 2 and scores["nll"] == pytest.approx(wanted, rel=1e-5)
  assert scores["bits_per_byte"] == pytest.approx(wanted / math.log(2) / 2, rel=1e-5)
  judged = evaluate.quality(causal, TOKENS[None], valid_NL=VALID[None])
  assert judged.genppl == pytest.approx(math.exp(wanted), rel=1e-5)
  assert judged.entropy == pytest.approx(math.log(2))


def test_bytes_of_several_lengths():
  """The first tokens of all groups are charged, not of the last one only."""
  flat = lambda tokens_BL: jnp.zeros((*tokens_BL.shape, 7))  # noqa: E731
  groups = [np.zeros((3, 5), np.int32), np.zeros((2, 9), np.int32)]
  scores = evaluate.ar_perplexity(flat, groups, bytes_per_token=4.0)
  bits = (3 * 4 + 2 * 8) * math.log2(7) / (4.0 * (3 * 5 + 2 * 9))
  assert scores["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_masks_that_do_not_fit():
  denoiser, short = jax.tree_util.Partial(_denoiser), [VALID[None, 1:]]
  with pytest.raises(InputError, match=r"valid_NL has shape \[\(1, 3\)\] and the tokens"):
    evaluate.elbo(denoiser, PROC, TOKENS[None], jax.random.key(0), valid_NL=short)
  flat = lambda tokens_BL: jnp.zeros((*tokens_BL.shape, V + 1))  # noqa: E731
  with pytest.raises(InputError, match="only first tokens are valid"):
    evaluate.ar_perplexity(flat, TOKENS[None], valid_NL=np.arange(L)[None] < 1)
  translated = (TOKENS[None], np.ones((1, L), np.int32))
  with pytest.raises(InputError, match="prompts and answers cannot be told apart"):
    evaluate.quality(flat, TOKENS[None], valid_NL=VALID[None], retokenised=translated)
