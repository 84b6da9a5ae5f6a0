# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct on a law small enough to enumerate: the integral KL falls, coupled times or not.

Three tokens that nearly always agree, from two kinds and a mask. The teacher is exact; student and
discriminator are small Transformers, the student's trained to the teacher's predictions first.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlm_jax.models import DiT, DiTConfig
from dlm_jax.objectives import didi_instruct, draw_batch, mdlm
from dlm_jax.objectives.state import output_params
from dlm_jax.process import Absorbing

L, V, MASK, BATCH, STEPS = 3, 3, 2, 128, 120
STATES = np.array(list(itertools.product(range(V), repeat=L)), np.int32)
CLEAN = np.all(STATES != MASK, axis=1)
PROCESS = Absorbing(vocab_size=V, mask_id=MASK)
MODEL = DiT(
  DiTConfig(
    vocab_size=V, dim=16, cond_dim=8, layers=2, heads=2, length=L, dtype="float32", dropout=0.0
  )
)
LAW = 0.01 * CLEAN + 0.76 * np.all(STATES == 0, axis=1) + 0.16 * np.all(STATES == 1, axis=1)


def _batch(rng):
  rng_tokens, rng = jax.random.split(rng)
  log_law = jnp.log(jnp.asarray(LAW, jnp.float32))
  picked = jax.random.categorical(rng_tokens, log_law, shape=(BATCH,))
  return draw_batch(jnp.asarray(STATES)[picked], rng)


def _train(objective, state, steps, rng):
  def step(state, rng):
    return objective.step(state, _batch(rng))

  return jax.lax.scan(step, state, jax.random.split(rng, steps))


@pytest.fixture(scope="module")
def teacher():
  objective = mdlm.make(
    model=MODEL,
    process=PROCESS,
    optimizers={"model": optax.adam(optax.cosine_decay_schedule(3e-3, 1000))},
  )
  state = objective.init(jax.random.key(0))
  run = jax.jit(functools.partial(_train, objective, steps=1000))
  return output_params(run(state, rng=jax.random.key(1))[0], objective)


def _joint(rows_SLV):
  return np.prod([rows_SLV[:, l, STATES[:, l]] for l in range(L)], axis=0)


@functools.cache
def _predict():
  def predict(params):
    logits = MODEL.apply({"params": params}, jnp.asarray(STATES), jnp.zeros(len(STATES)))
    return jax.vmap(PROCESS.log_x0)(logits, jnp.asarray(STATES))

  return jax.jit(predict)


def _two_step_law(params):
  """Return the student's law of x₀, over intermediate times uniform in [0.02, 0.98]."""
  log_x0, law = _predict()(params), 0
  posterior = jax.vmap(PROCESS.posterior, (0, 0, None, None))
  start = np.all(STATES == MASK, axis=1).astype(float)
  times = np.linspace(0.02, 0.98, 25)
  for t in times:
    one, two = (
      _joint(np.asarray(posterior(log_x0, jnp.asarray(STATES), *pair), np.float64))
      for pair in ((t, 1.0), (0.0, t))
    )
    law = law + start @ one @ two / len(times)
  return law


def _integral_kl(params):
  """Return ∫ ω(t) KL(q_ν(·, t) ‖ q_data(·, t)) dt over [0.02, 0.98], ω = 1/t clipped at 10."""
  student, total = _two_step_law(params), 0.0
  times = np.linspace(0.02, 0.98, 25)
  for t in times:
    alpha = float(PROCESS.schedule.alpha(t))
    noise = _joint(alpha * np.eye(V)[STATES] + (1 - alpha) * np.eye(V)[MASK])
    q, p = student @ noise, LAW @ noise
    seen = q > 1e-300
    total += min(1 / t, 10) * np.sum(q[seen] * np.log(q[seen] / p[seen])) * (0.96 / len(times))
  return total


def _distil(teacher, **options):
  objective = didi_instruct.make(
    model=MODEL, process=PROCESS, ema_decay=0.98, trained_layers=2, t0=0.0,
    optimizers={
      "student": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-4)),
      "discriminator": optax.adam(2e-3),
    },
    **options,
  )  # fmt: skip
  state = objective.init(jax.random.key(2), teacher)
  run = jax.jit(functools.partial(_train, objective, steps=STEPS))
  return output_params(run(state, rng=jax.random.key(3))[0], objective)


def test_the_integral_kl_falls(teacher):
  """With either times; which falls faster, one run cannot tell.

  Runs from the seeds 3, 4 and 5 ended at 0.54, 0.55, 0.60 coupled and 0.62, 0.56, 0.47 decoupled,
  from 0.80. Over 18 seeds (40 steps of warm-up, 160 in all, groups of 8, lr 2e-4) the means were
  0.575 ± 0.015 and 0.593 ± 0.015.
  """
  before = _integral_kl(teacher)
  coupled = _integral_kl(_distil(teacher))
  apart = _integral_kl(_distil(teacher, coupled_time=False))
  print(f"\nintegral KL: {before:.4f} → coupled {coupled:.4f}, decoupled {apart:.4f}")
  assert max(coupled, apart) < 0.8 * before
