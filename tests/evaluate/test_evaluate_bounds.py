# SPDX-License-Identifier: Apache-2.0
"""Bounds are bounds: of an exact denoiser, found by enumeration, they are its data's entropy."""

import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import evaluate, process
from dlm_jax.schedules import LogLinear

V, L, MASK = 3, 2, 3
SURVIVING = LogLinear(eps=0.1)  # a tenth survives all noise: what a bound must not forget
WORDS = np.array(list(itertools.product(range(V), repeat=L)))
N = 12_000


@flax.struct.dataclass
class Exact:
  """p(x₀ at l | the other positions' states) of a joint law over all words."""

  law_X: jax.Array
  masked: bool = flax.struct.field(pytree_node=False)

  def __call__(self, tokens_BL, sigma_B):
    alpha_B111 = jnp.exp(-sigma_B)[:, None, None, None]
    state_BL1 = tokens_BL[..., None]
    same_BLX = (state_BL1 == WORDS.T[None])[:, :, :]
    if self.masked:
      likelihood_BLX = jnp.where(state_BL1 == MASK, 1.0, same_BLX)
    else:
      likelihood_BLX = alpha_B111[..., 0] * same_BLX + (1 - alpha_B111[..., 0]) / V
    others = jnp.stack([jnp.delete(likelihood_BLX, l, axis=1).prod(axis=1) for l in range(L)], 1)
    holds_LVX = jnp.asarray(WORDS.T[:, None] == np.arange(V)[None, :, None])
    p_BLV = jnp.einsum("blx,x,lvx->blv", others, self.law_X, holds_LVX)
    return jnp.log(jnp.pad(p_BLV, ((0, 0), (0, 0), (0, self.masked))) + 1e-30)


def _law(dependent):
  rng = np.random.default_rng(3)
  if dependent:
    return rng.dirichlet(np.full(len(WORDS), 0.7))
  rows = rng.dirichlet(np.ones(V), size=L)
  return np.prod([rows[l, WORDS[:, l]] for l in range(L)], axis=0)


def _process(name):
  if name == "uniform":
    return process.Uniform(vocab_size=V, schedule=SURVIVING)
  return process.Absorbing(vocab_size=V + 1, mask_id=MASK, schedule=SURVIVING)


def _gap_at_noise(name, law):
  """Return KL(q(x₁) ‖ prior) in nats a sequence; masked models start as their data ends."""
  if name == "absorbing":
    return 0.0
  alpha = float(SURVIVING.alpha(1.0))
  one = np.array([[alpha * (a == b) + (1 - alpha) / V for b in range(V)] for a in range(V)])
  each = np.prod([one[WORDS[:, None, l], WORDS[None, :, l]] for l in range(L)], axis=0)
  noisy = law @ each
  return float(np.sum(noisy * np.log(noisy * len(WORDS))))


def _estimate(name, law, **options):
  tokens = WORDS[np.random.default_rng(0).choice(len(WORDS), N, p=law)].astype(np.int32)
  denoiser = Exact(jnp.asarray(law, jnp.float32), name == "absorbing")
  options = {"batch_size": N, "eps": 0.05, "samples_per_sequence": 8, **options}
  row = evaluate.elbo(denoiser, _process(name), tokens, jax.random.key(1), **options)
  return row, float(-np.mean(np.log([law[(word == WORDS).all(1)][0] for word in tokens]))) / L


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_independent_tokens_cost_their_entropy(name):
  """No gap is left but the prior's: the expectation is known exactly."""
  law = _law(dependent=False)
  row, truth = _estimate(name, law)
  wanted = truth + _gap_at_noise(name, law) / L
  assert row["nelbo_se"] < 0.015 * truth
  assert abs(row["nelbo"] - wanted) < 4 * row["nelbo_se"]
  # without its ends it is below the truth, far beyond its error
  published, _ = _estimate(name, law, published=True)
  assert published["nelbo"] < truth - 4 * row["nelbo_se"]
  assert row["evaluations"] > published["evaluations"] == 8 * N


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_dependent_tokens_cost_a_little_more(name):
  """Both ends set tokens independently of each other: a gap of the model, never below its data."""
  law = _law(dependent=True)
  row, truth = _estimate(name, law)
  joint = law.reshape(V, V)
  mutual = np.sum(joint * np.log(joint / (joint.sum(1, keepdims=True) * joint.sum(0))))
  most = _gap_at_noise(name, law) + mutual * (float(SURVIVING.alpha(1.0)) ** 2 + 0.05)
  error = 4 * row["nelbo_se"]
  assert truth - error < row["nelbo"] < truth + most / L + error


def test_what_is_given_is_free():
  """The first of two dependent tokens is given: the bound is that of the second alone."""
  law = _law(dependent=True)
  valid = np.tile(np.array([False, True]), (N, 1))
  row, _ = _estimate("absorbing", law, valid_NL=valid)
  first = law.reshape(V, V).sum(1)
  wanted = -np.sum(law * np.log(law)) + np.sum(first * np.log(first))
  assert row["tokens"] == N
  assert abs(row["nelbo"] - wanted) < 4 * row["nelbo_se"] + 0.01
