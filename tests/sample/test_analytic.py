# SPDX-License-Identifier: Apache-2.0
"""The analytic sampler: recorded weights, its law, what a score that is not normalised does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dlm_jax import draw, process, sample
from dlm_jax.models import Denoiser
from dlm_jax.sample import _analytic

FOLLOWS, DIFFERS = 1e-4, 1e-6
SAMPLES, L, V = 24_576, 2, toy.VOCABULARY
SCORE = process.AbsorbingScore(vocab_size=V, mask_id=toy.MASK)
PLAIN = process.Absorbing(vocab_size=V, mask_id=toy.MASK)


def dense(log_f_LV, x_L, alpha_s, alpha_t, mask):
  """Spell out over the vocabulary the weights that the sampler draws from in two stages."""
  reveal_L1 = _analytic.reveal_probability(log_f_LV, alpha_s, alpha_t)[:, None]
  p_LV = jax.nn.softmax(log_f_LV, axis=-1)
  mask_1V = jax.nn.one_hot(mask, p_LV.shape[-1])[None]
  masked_LV = reveal_L1 * p_LV + (1 - reveal_L1) * mask_1V
  return jnp.where(x_L[:, None] == mask, masked_LV, jax.nn.one_hot(x_L, p_LV.shape[-1]))


def _rows_by_hand(denoiser):
  """Return rows of staggered score × transposed transition, as published, for normalised steps."""
  logits = np.asarray(denoiser(jnp.asarray(toy.states(L)), jnp.zeros(V**L)), np.float64)

  def rows(_, tokens, s, t):
    alpha_s, alpha_t = (float(SCORE.schedule.alpha(time)) for time in (s, t))
    grow = alpha_s / alpha_t  # e^δ, δ = σ(t) − σ(s)
    score = np.exp(logits) / (V - 1) * alpha_t / (1 - alpha_t)
    score[..., toy.MASK] = 1.0
    staggered = grow * score
    staggered[..., toy.MASK] += (1 - grow) * score.sum(-1)
    to_mask = (1 - 1 / grow) * np.ones(V) + np.eye(V)[toy.MASK] / grow
    weights = np.maximum(staggered * to_mask, 0.0)
    weights /= weights.sum(-1, keepdims=True)
    return np.where((tokens == toy.MASK)[..., None], weights, np.eye(V)[tokens])

  return rows


def _generate(denoiser, proc, seed=4, batch=SAMPLES, **options):
  generate = functools.partial(
    sample.generate, batch=batch, length=L, sampler="analytic", **options
  )
  found = jax.jit(generate, static_argnums=1)(denoiser, proc, jax.random.key(seed))
  return jax.tree.map(np.asarray, found)


def _denoiser():
  """Return a score network whose f sums to about 0.4 … 2."""
  denoiser = toy.make(L, scale=1.0)
  shifted = jax.tree.map(lambda x: x - 1.2, denoiser.params)
  return denoiser.replace(params={**shifted, "tilt": denoiser.params["tilt"]})


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_law_of_a_score_that_is_not_normalised(steps):
  tokens = _generate(_denoiser(), SCORE, steps=steps)
  law = toy.chain_law(_denoiser(), SCORE, L, steps, rows=_rows_by_hand(_denoiser()))
  assert toy.p_value(tokens, law) > FOLLOWS
  if steps > 1:
    ancestral = toy.chain_law(_denoiser(), SCORE, L, steps)
    assert toy.p_value(tokens, ancestral) < DIFFERS


def test_normalised_it_is_ancestral():
  tokens = _generate(_denoiser(), PLAIN, steps=3)
  assert toy.p_value(tokens, toy.chain_law(_denoiser(), PLAIN, L, 3)) > FOLLOWS


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy"])
def test_no_mask_is_left_and_given_tokens_stay(noise_removal):
  options = {"steps": 2, "prompt": jnp.array([1]), "noise_removal": noise_removal, "nucleus": 0.9}
  tokens, trace = _generate(_denoiser(), SCORE, 2, 64, return_trace=True, **options)
  assert trace.shape == (3, 64, L) and np.all(trace[..., 0] == 1)
  assert np.all(tokens != toy.MASK)


@pytest.mark.slow
def test_a_sequence_depends_on_its_own_key_only_and_no_key_is_used_twice():
  given = {"length": L, "steps": 3, "sampler": "analytic"}
  with jax.debug_key_reuse(True):
    eight = sample.generate(_denoiser(), SCORE, jax.random.key(1), batch=8, **given)
  three = sample.generate(_denoiser(), SCORE, jax.random.key(1), batch=3, **given)
  np.testing.assert_array_equal(three, eight[:3])


# --- recorded numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "entry,names",
  [
    ("mdlm_sampler", ("x", "t", "dt", "")),
    pytest.param("mdlm_losses", ("xt", "update_t", "update_dt", "update_"), marks=pytest.mark.slow),
  ],
)
def test_golden_weights_and_draws(golden_dit, entry, names, variant):
  """Both public implementations; their weights of the last step need not sum to 1."""
  vectors, config, model, params = golden_dit(f"{entry}__{variant}")
  mask = config["mask_index"]
  proc = process.Absorbing(vocab_size=config["V"], mask_id=mask)
  x, t_B = jnp.asarray(vectors[names[0]], jnp.int32), jnp.asarray(vectors[names[1]][:, 0])
  log_f = jax.vmap(proc.log_estimate)(Denoiser(model, params)(x, jnp.zeros(x.shape[0])), x)
  uniform = jnp.asarray(vectors[f"{names[3]}uniform"])
  alpha_t = proc.schedule.alpha(t_B)
  alpha_s = proc.schedule.alpha(t_B - jnp.float32(vectors[names[2]]))
  spell = jax.vmap(lambda *row: dense(*row, mask))
  for name, after in (("analytic", alpha_s), ("denoiser", jnp.ones_like(alpha_t))):
    ours = spell(log_f, x, after, alpha_t)
    wanted = vectors[f"{name}_probs"]
    wanted = wanted / wanted.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours, wanted, rtol=3e-4, atol=3e-6)
    np.testing.assert_array_equal(draw.race(ours, uniform), vectors[f"{name}_next"])
