# SPDX-License-Identifier: Apache-2.0
"""The public float32 race against recorded weights, draws and a whole trajectory.

The recorded `ddpm_cache` sampler masks with probability t itself: α(t) = 1 − t, ε = 0. `ddpm`
masks with 1 − exp(−σ(t)) = (1 − ε) t.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import draw, process, sample, schedules
from dlm_jax.models import Denoiser
from dlm_jax.sample import _legacy, grids

EPS = {"ddpm": 1e-3, "ddpm_cache": 0.0}


@pytest.fixture(params=["a", pytest.param("b", marks=pytest.mark.slow)])
def recorded(request, golden_dit):
  """Return (vectors, config, denoiser, process with ε = 0) of one variant."""
  vectors, config, model, params = golden_dit(f"mdlm_sampler__{request.param}")
  return vectors, config, Denoiser(model, params), _process(config, 0.0)


def _process(config, eps):
  schedule = schedules.LogLinear(eps=eps)
  return process.Absorbing(vocab_size=config["V"], mask_id=config["mask_index"], schedule=schedule)


def _update(vectors, denoiser, proc):
  """Return our weights for the recorded state: everything before the draw."""
  x, t = jnp.asarray(vectors["x"], jnp.int32), jnp.asarray(vectors["t"][:, 0])
  log_x0 = jax.vmap(proc.log_x0)(denoiser(x, jnp.zeros(x.shape[0])), x)
  s = t - jnp.float32(vectors["dt"])
  return x, log_x0, jax.vmap(functools.partial(_legacy.race_weights, proc))(log_x0, s, t)


@pytest.mark.parametrize("name", sorted(EPS))
def test_golden_weights_and_draws(recorded, name):
  vectors, config, denoiser, _ = recorded
  x, _, weights = _update(vectors, denoiser, _process(config, EPS[name]))
  np.testing.assert_allclose(weights, vectors[f"{name}_probs"], rtol=2e-5, atol=1e-7)
  drawn = draw.race(weights, jnp.asarray(vectors["uniform"]))
  np.testing.assert_array_equal(
    jnp.where(x == config["mask_index"], drawn, x), vectors[f"{name}_next"]
  )


def test_the_schedule_matters(recorded):
  """A check of the check: ε = 1e-3 is not what `ddpm_cache` records."""
  vectors, config, denoiser, _ = recorded
  _, _, weights = _update(vectors, denoiser, _process(config, 1e-3))
  error = np.abs(weights - vectors["ddpm_cache_probs"])
  assert error.max() > 1e-4


def test_golden_noise_removal(recorded):
  """The last, "denoiser" update draws from the prediction itself, the mask left out."""
  vectors, config, denoiser, proc = recorded
  x, log_x0, _ = _update(vectors, denoiser, proc)
  masked = np.asarray(x) == config["mask_index"]
  wanted = vectors["denoiser_probs"][masked]
  ours = np.asarray(jnp.exp(log_x0))[masked]
  wanted = wanted / wanted.sum(-1, keepdims=True)
  np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=1e-7)
  drawn = draw.race(jnp.exp(log_x0), jnp.asarray(vectors["uniform"]))
  np.testing.assert_array_equal(drawn[masked], vectors["denoiser_next"][masked])


def _trajectory(recorded, noise_removal):
  vectors, config, denoiser, proc = recorded
  uniforms = jnp.asarray(vectors["traj_uniforms"])
  start = jnp.full((config["B"], config["L"]), config["mask_index"], jnp.int32)
  request = sample.Request(
    denoiser=denoiser,
    process=proc,
    rng_B=jax.random.split(jax.random.key(0), config["B"]),
    x_BL=start,
    frozen_BL=jnp.zeros(start.shape, bool),
    steps=config["num_steps"],
  )
  sampler = _legacy.Legacy(noise_removal=noise_removal, logits_dtype="float32")
  times = grids.uniform(config["num_steps"], config["eps"])
  return sampler.race(request, lambda k: uniforms[k], times)


def test_golden_trajectory(recorded):
  vectors, config, _, _ = recorded
  states = np.asarray(_trajectory(recorded, "greedy"))
  assert states.shape == (config["num_steps"] + 1, config["B"], config["L"])
  state = np.full(states.shape[1:], config["mask_index"])
  for ours, raw in zip(states[:-1], vectors["traj_raw_draws"], strict=True):
    state = np.where(state == config["mask_index"], raw, state)
    np.testing.assert_array_equal(ours, state)
  np.testing.assert_array_equal(states[-1], vectors["traj_final"])


def test_run_feeds_one_uniform_per_key_step_position_and_token(recorded):
  """`run` is `race` on uniforms of fold_in(key, step)."""
  _, config, denoiser, proc = recorded
  keys = jax.random.split(jax.random.key(0), config["B"])
  start = jnp.full((config["B"], config["L"]), config["mask_index"], jnp.int32)
  frozen = jnp.zeros(start.shape, bool).at[0, 0].set(True)
  options = {"noise_removal": "ancestral", "logits_dtype": "bfloat16"}

  def uniform(k):
    shape, rows = (config["L"], config["V"]), range(config["B"])
    return jnp.stack([jax.random.uniform(jax.random.fold_in(keys[i], k), shape) for i in rows])

  request = sample.Request(
    denoiser=denoiser, process=proc, rng_B=keys, x_BL=start, frozen_BL=frozen, steps=3
  )
  sampler = _legacy.Legacy(**options)
  ours, wanted = sampler.run(request), sampler.race(request, uniform, grids.uniform(3))
  np.testing.assert_array_equal(ours, wanted)
  assert ours[-1, 0, 0] == config["mask_index"]
  assert np.sum(np.asarray(ours[-1]) == config["mask_index"]) == 1
