# SPDX-License-Identifier: Apache-2.0
"""Score entropy: its definition by brute force, its closed-form gradient, its minimiser."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dlm_jax import process, schedules
from dlm_jax.objectives import mdlm, sedd
from dlm_jax.objectives.batch import split_each

M = tiny.MASK


def _score_entropy(logits, xt, x0, schedule, t):
  """Return σ' Σ_{y≠m} [s_y − r x0_y log s_y + K(r x0_y)] per sequence and position, float64.

  The score of the move from the mask to y is s_y = r f_y, r = α/(1 − α), (V − 1) f = e^logits;
  K(a) = a (log a − 1) and K(0) = 0; σ' = −α'/α.
  """
  alpha = np.asarray(schedule.alpha(t), np.float64)
  rate = -np.asarray(schedule.dalpha(t), np.float64) / alpha
  loss = np.zeros(xt.shape)
  for b, i in itertools.product(*map(range, xt.shape)):
    if xt[b, i] != M:
      continue
    r = alpha[b] / (1 - alpha[b])
    for y in (y for y in range(tiny.V) if y != M):
      score = r * np.exp(np.float64(logits[b, i, y])) / (tiny.V - 1)
      ratio = r * (x0[b, i] == y)
      loss[b, i] += rate[b] * (score - ratio * np.log(score))
      loss[b, i] += rate[b] * ratio * (np.log(ratio) - 1) if ratio else 0.0
  return loss


@functools.partial(jax.jit, static_argnames=("model", "process"))
def _loss(params, batch, **options):
  return sedd.loss(params, batch, **options)


@pytest.mark.first_case
@pytest.mark.parametrize(
  "schedule", [schedules.LogLinear(), schedules.Polynomial(power=2.0)], ids=["linear", "square"]
)
@pytest.mark.parametrize("prompted", [False, True])
def test_loss_is_score_entropy(schedule, prompted):
  forward = process.AbsorbingScore(vocab_size=tiny.V, mask_id=M, schedule=schedule)
  model, params = tiny.network(dropout=0.0)
  batch, valid = tiny.prompted_batch(prompted)
  rng_B = split_each(batch["rng"], 2)[0]
  x0, t = batch["tokens"], batch["t"]
  xt = np.where(valid, jax.vmap(forward.corrupt)(rng_B, x0, t), x0)
  logits = np.asarray(model.apply({"params": params}, jnp.asarray(xt), schedule.sigma(t)))
  each = _score_entropy(logits, xt, np.asarray(x0), schedule, t)
  wanted = each.sum() / valid.sum()  # over the batch, as in `mdlm`
  value, _ = _loss(params, batch, model=model, process=forward)
  np.testing.assert_allclose(value, wanted, rtol=2e-5)


def test_gradient_in_closed_form():
  """On logits: −α'/(1 − α) (f − x₀) where masked, 0 for the mask's column and elsewhere."""
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(tiny.L, tiny.V)), jnp.float32)
  x0, t = tiny.tokens()[0], jnp.float32(0.3)
  xt = jnp.asarray([M, x0[1], M, M], jnp.int32)
  forward = tiny.SCORE

  def total(logits):
    return forward.nll(forward.log_estimate(logits, xt), xt, x0, t).sum()

  wanted = (np.exp(logits) / (tiny.V - 1) - np.eye(tiny.V)[x0]) / 0.3
  wanted[:, M] = 0
  wanted[1] = 0
  np.testing.assert_allclose(jax.jit(jax.grad(total))(logits), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_minimiser_is_the_posterior():
  """Two tokens, four sequences: Newton on the exact expected loss ends at p(x₀ | xₜ)."""
  size, mask, t = 3, 2, jnp.float32(0.6)
  forward = process.AbsorbingScore(vocab_size=size, mask_id=mask)
  data = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
  prior = np.array([0.4, 0.3, 0.05, 0.25])
  alpha = float(forward.schedule.alpha(t))
  states = [x for x in itertools.product(range(3), repeat=2) if mask in x]

  def likelihood(state, x0):
    return np.prod(
      [1 - alpha if s == mask else alpha * (s == x) for s, x in zip(state, x0, strict=True)]
    )

  for state in states:
    joint = prior * [likelihood(state, x0) for x0 in data]
    xt = jnp.asarray(state, jnp.int32)

    def expected(logits, joint=joint, xt=xt):
      log_f = forward.log_estimate(logits, xt)
      nll = jax.vmap(lambda x: forward.nll(log_f, xt, x, t).sum())(jnp.asarray(data))
      return jnp.sum(jnp.asarray(joint / joint.sum(), jnp.float32) * nll)

    slope = jax.grad(lambda flat, f=expected: f(flat.reshape(2, size)))
    solve = jax.jit(lambda x, g=slope: x - jnp.linalg.pinv(jax.jacobian(g)(x)) @ g(x))
    flat = jnp.zeros(2 * size)
    for _ in range(12):
      flat = solve(flat)
    for i in (i for i in range(2) if state[i] == mask):
      posterior = [np.sum(joint[data[:, i] == y]) / joint.sum() for y in (0, 1)]
      f = jnp.exp(flat.reshape(2, size)[i, :2]) / (size - 1)
      np.testing.assert_allclose(f, posterior, atol=1e-5)


@pytest.mark.slow
def test_the_loss_exceeds_that_of_masked_diffusion():
  """By −α'/(1 − α) (Σf − 1 − log Σf) per masked position; the two are one method for a simplex."""
  model, params = tiny.network(dropout=0.0)
  batch = tiny.batch()
  score, _ = _loss(params, batch, model=model, process=tiny.SCORE)
  masked, _ = mdlm.loss(params, batch, model=model, process=tiny.PROCESS)
  assert score > masked
  log_x0 = jax.nn.log_softmax(jnp.zeros((2, tiny.V)).at[:, M].set(-1e6))
  arguments = (log_x0, jnp.full(2, M), jnp.arange(2), jnp.float32(0.5))
  np.testing.assert_allclose(tiny.SCORE.nll(*arguments), tiny.PROCESS.nll(*arguments), rtol=1e-6)


def test_a_normalising_process_is_refused():
  model, _ = tiny.network()
  make = getattr(sedd.make, "__wrapped__", sedd.make)  # past the tests' own type checks
  with pytest.raises(ValueError, match="AbsorbingScore"):
    make(model=model, process=tiny.PROCESS, optimizers={"model": optax.sgd(1.0)})
