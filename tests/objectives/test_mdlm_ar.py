# SPDX-License-Identifier: Apache-2.0
"""The teacher's and the judge's losses beyond the contract: recorded values, weights, prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dlm_jax import process
from dlm_jax.models import Causal
from dlm_jax.objectives import ar, mdlm

M = tiny.MASK


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_mean_loss(golden_dit, variant):
  """From parameters to nats per counted token, on the recorded corruption."""
  vectors, config, model, params = golden_dit(f"dit_mdlm__{variant}")
  proc = process.Absorbing(vocab_size=config["V"], mask_id=config["mask_index"])
  x0, xt = (jnp.asarray(vectors[k], jnp.int32) for k in ("x0", "xt"))
  t, sigma = jnp.asarray(vectors["t"]), jnp.asarray(vectors["sigma"])
  np.testing.assert_allclose(proc.schedule.sigma(t), sigma, rtol=1e-5)
  log_x0 = jax.vmap(proc.log_x0)(model.apply({"params": params}, xt, sigma), xt)
  nll = np.asarray(jax.vmap(proc.nll)(log_x0, xt, x0, t))
  np.testing.assert_allclose(nll, vectors["nll_per_token"], rtol=1e-4, atol=1e-4)
  mean = np.average(nll, weights=vectors["attention_mask"])
  np.testing.assert_allclose(mean, vectors["mean_token_nll"], rtol=1e-5)
  np.testing.assert_allclose(  # dσ/dt / (e^σ − 1) is our 1/t
    vectors["dsigma"] / np.expm1(vectors["sigma"]), proc.schedule.weight(t), rtol=1e-4
  )


_loss = jax.jit(mdlm.loss, static_argnames=("model", "process"))


def _mdlm(batch, **changes):
  model, params = tiny.network(**{"dropout": 0.0, **changes})
  return _loss(params, batch, model=model, process=tiny.PROCESS)


def _by_hand(batch):
  """Corrupt, weigh and average in numpy, with the keys that the loss uses."""
  model, params = tiny.network(dropout=0.0)
  rng_B = jax.vmap(lambda rng: jax.random.split(rng, 2)[0])(batch["rng"])
  x0, t = np.asarray(batch["tokens"]), np.asarray(batch["t"])
  valid = np.asarray(batch.get("valid", np.ones(x0.shape, bool)))
  xt = np.where(valid, jax.vmap(tiny.PROCESS.corrupt)(rng_B, batch["tokens"], batch["t"]), x0)
  logits = model.apply({"params": params}, jnp.asarray(xt), jnp.zeros(len(t)))
  logits = np.array(logits, np.float64)
  logits[..., M] = -np.inf
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_probs, x0[..., None], -1)[..., 0] * (xt == M) / t[:, None]
  return nll.sum() / valid.sum(), np.mean(xt == M)  # over the batch, as the public code


def test_loss_by_hand():
  batch = tiny.batch()
  value, (metrics, extra) = _mdlm(batch)
  wanted, masked = _by_hand(batch)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(metrics["masked"], masked, rtol=1e-6)
  assert set(metrics) == {"masked"} and extra is None


def test_prompts_are_neither_masked_nor_scored():
  valid = jnp.asarray(np.random.default_rng(0).random((tiny.B, tiny.L)) < 0.5)
  valid = valid.at[0].set(False)
  batch = tiny.batch(valid=valid)
  np.testing.assert_allclose(_mdlm(batch)[0], _by_hand(batch)[0], rtol=1e-5)
  nothing = tiny.batch(valid=jnp.zeros((tiny.B, tiny.L), bool))
  value, (metrics, _) = _mdlm(nothing)
  assert value == 0 and metrics["masked"] == 0


@pytest.mark.slow
def test_the_loss_is_unbiased():
  """Its mean over corruptions is the NELBO, here by enumeration of masks for one position."""
  size = 4096
  batch = tiny.batch(size=size)
  batch["tokens"] = jnp.broadcast_to(tiny.tokens()[:1], (size, tiny.L))
  only = jnp.zeros((size, tiny.L), bool).at[:, 2].set(True)
  value, _ = _mdlm({**batch, "valid": only})
  model, params = tiny.network(dropout=0.0)
  xt = batch["tokens"][:1].at[0, 2].set(M)
  log_x0 = jax.vmap(tiny.PROCESS.log_x0)(model.apply({"params": params}, xt, jnp.zeros(1)), xt)
  nll = -float(log_x0[0, 2, batch["tokens"][0, 2]])
  # ∫ (1 − α(t)) / t dt = 1 − ε: a weight of 0.999 on the one masked state there is
  assert abs(float(value) / nll - 0.999) < 5 * np.sqrt(np.log(1e3) / size)


def test_dropout_follows_the_keys():
  one, other = _mdlm(tiny.batch(), dropout=0.5)[0], _mdlm(tiny.batch(), dropout=0.0)[0]
  assert one != other
  assert one == _mdlm(tiny.batch(), dropout=0.5)[0]


def test_judge_loss_ignores_the_first_token_only():
  model, params = tiny.network(Causal, dropout=0.0)
  loss = functools.partial(ar.loss, params, model=model)
  batch = tiny.batch()
  value = loss(batch)[0]
  first = jnp.zeros((tiny.B, tiny.L), bool).at[:, 0].set(True)
  np.testing.assert_allclose(loss({**batch, "valid": ~first})[0], value, rtol=1e-6)
  assert loss({**batch, "valid": first})[0] == 0
