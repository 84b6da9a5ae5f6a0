# SPDX-License-Identifier: Apache-2.0
"""Consistency distillation: recorded states and losses, the rounds, who is updated."""

import functools

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import published_table
import pytest
import recorded
import tiny

from dlm_jax import process
from dlm_jax.objectives import dcd, rounds
from dlm_jax.objectives.setting import Setting

DUALITY = process.GaussianDuality(vocab_size=tiny.V, gamma_min=-4.0, gamma_max=-1.0)
network = functools.partial(tiny.network, time_conditioning=True)
every_variant = pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
every_kind = pytest.mark.parametrize("kind", dcd.DIVERGENCES)

_trajectory = jax.jit(dcd.trajectory, static_argnames=("duality", "chunk"))
_consistency = jax.jit(dcd.consistency, static_argnames=("setting", "divergence"))


# --- recorded values ----------------------------------------------------------------------------


@every_variant
def test_golden_step_sizes(golden, variant):
  vectors, config = golden(f"dcd__{variant}")
  options = {"every": config["update_teacher_every"], "num_steps": config["T"]}
  steps, wanted = vectors["dt_schedule_step"], vectors["dt_schedule_dt"]
  ours = [dcd.step_size(jnp.asarray(n, jnp.int32), **options) for n in steps]
  np.testing.assert_array_equal(ours, wanted)
  ours = dcd.step_size(jnp.asarray(config["global_step"], jnp.int32), **options)
  assert ours == vectors["dt"]
  assert dcd.step_size(jnp.asarray(10**9, jnp.int32), **options) == 1


@every_variant
def test_golden_states(golden, variant):
  """Both states from the recorded noise; the student's time is clipped before δ is taken off."""
  vectors, config = golden(f"dcd__{variant}")
  duality = recorded.Noise(
    vocab_size=config["V"],
    recorded=(vectors["gaussian_noise"],),
    gamma_min=float(config["gamma_min"]),
    gamma_max=float(config["gamma_max"]),
  )
  batch = {"tokens": jnp.asarray(vectors["x0"], jnp.int32), "t": jnp.asarray(vectors["t"])}
  for chunk in (None, 4):
    pair = _trajectory(
      batch, recorded.keys(config["B"]), float(vectors["dt"]), duality=duality, chunk=chunk
    )
    np.testing.assert_array_equal(pair.zt, vectors["xt"])
    np.testing.assert_array_equal(pair.zs, vectors["xs"])
  schedule = duality.process.schedule
  np.testing.assert_allclose(pair.t, vectors["t_clipped"], rtol=1e-6)
  for time, name in ((pair.t, "t"), (pair.s, "s")):
    np.testing.assert_allclose(schedule.gamma(time), vectors[f"gamma_{name}"], rtol=1e-5)
    alpha = vectors[f"alpha_{name}"][:, 0]
    looked_up = published_table.alpha(config["V"], vectors[f"gamma_{name}"].ravel())
    np.testing.assert_allclose(looked_up, alpha, rtol=1e-9)
    np.testing.assert_allclose(schedule.alpha(time), alpha, atol=3e-4)  # a table of 10,000 points


@pytest.mark.parametrize("kind", ["kl-bwd", pytest.param("kl-fwd", marks=pytest.mark.slow)])
@every_variant
def test_golden_loss(golden, variant, kind):
  vectors, config = golden(f"dcd__{variant}")
  trees = ("student", "teacher")
  model, student, teacher = golden_networks.dit(vectors, config, *trees, time_conditioning=True)
  t = jnp.asarray(vectors["t_clipped"])
  s = t - jnp.float32(vectors["dt"])
  alphas = np.concatenate([vectors["alpha_t"], vectors["alpha_s"]])
  schedule = recorded.Schedule(np.concatenate([t, s]), alphas, alphas)
  pair = dcd.Pair(*(jnp.asarray(vectors[k], jnp.int32) for k in ("xt", "xs")), t, s)
  forward = process.Uniform(vocab_size=config["V"], schedule=schedule)
  for chunk in (None, 4):
    setting = Setting(model=model, process=forward, chunk=chunk)
    each = _consistency(student, pair, teacher=teacher, setting=setting, divergence=kind)
    recorded.close(each, vectors[f"loss_per_token/{kind}_f64"], 2e-5)

  log_student, log_teacher = (
    jnp.asarray(vectors[f"{k}_log_probs"]) for k in ("student", "teacher")
  )
  mean = lambda x: rounds.divergence(x, log_teacher, kind).mean()  # noqa: E731
  recorded.close(
    jax.jit(jax.grad(mean))(log_student), vectors[f"grad_mean_loss_wrt_student_log_probs/{kind}"]
  )


# --- the loss -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("setting", "duality", "divergence"))
def _loss(params, batch, teacher, delta, **options):
  return jax.value_and_grad(dcd.loss, has_aux=True)(
    params, batch, teacher=teacher, delta=delta, **options
  )


def _run(batch, delta=0.25, teacher=None, divergence="kl-bwd", chunk=None):
  model, params = network(dropout=0.0)
  teacher = tiny.random_params(params, seed=3) if teacher is None else teacher
  setting = Setting(model=model, process=DUALITY.process, chunk=chunk)
  options = {"setting": setting, "duality": DUALITY, "divergence": divergence}
  return _loss(params, batch, teacher, jnp.float32(delta), **options)


@every_kind
def test_gradient_on_logits_in_closed_form(kind):
  """KL(p‖q): p (a − ⟨p, a⟩) with a = log p − log q; KL(q‖p): p − q."""
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=(5, tiny.V)), jnp.float32) for _ in range(2))
  log_q = jax.nn.log_softmax(y)
  gradient = jax.grad(lambda x: rounds.divergence(jax.nn.log_softmax(x), log_q, kind).sum())(x)
  p, q = np.asarray(jax.nn.softmax(x), np.float64), np.asarray(jnp.exp(log_q), np.float64)
  a = np.log(p) - np.log(q)
  wanted = p * (a - (p * a).sum(-1, keepdims=True)) if kind == "kl-bwd" else p - q
  np.testing.assert_allclose(gradient, wanted, atol=1e-6)


@pytest.mark.slow
def test_no_step_no_loss():
  """A student that is its teacher, at the same state, has nothing to learn."""
  _, params = network(dropout=0.0)
  (value, (metrics, _)), gradient = _run(tiny.batch(), 0.0, params)
  assert abs(value) < 1e-6 and metrics["changed"] == 0
  assert optax.tree.norm(gradient) < 1e-5
  assert _run(tiny.batch(), 0.25, params)[0][0] > 1e-3


def test_states_share_noise():
  """Along a trajectory a token that won at t with the clean one stays; nothing else is drawn."""
  batch = tiny.batch(size=256)
  batch["tokens"] = jnp.tile(batch["tokens"], (1, 4))
  pair = _trajectory(batch, batch["rng"], 1 / 64, duality=DUALITY)
  kept = np.asarray(pair.zt == batch["tokens"])
  np.testing.assert_array_equal(np.asarray(pair.zs)[kept], np.asarray(batch["tokens"])[kept])
  changed = np.asarray(pair.zt != pair.zs)
  assert 0 < changed.mean() < 0.1
  np.testing.assert_array_equal(np.asarray(pair.zs)[changed], np.asarray(batch["tokens"])[changed])


@pytest.mark.slow
def test_prompts_are_clean_and_not_scored():
  valid = jnp.asarray(np.random.default_rng(0).random((tiny.B, tiny.L)) < 0.5)
  batch = tiny.batch(valid=valid)
  pair = _trajectory(batch, batch["rng"], 0.25, duality=DUALITY)
  for state in (pair.zt, pair.zs):
    assert np.all(np.asarray(state == batch["tokens"]) | np.asarray(valid))
  nothing = {**batch, "valid": jnp.zeros_like(valid)}
  assert _run(nothing)[0][0] == 0 and _run(batch)[0][0] > 0


@pytest.mark.slow
@every_kind
def test_chunks_change_nothing(kind):
  whole, wanted = _run(tiny.batch(), divergence=kind)
  value, gradient = _run(tiny.batch(), divergence=kind, chunk=2)
  np.testing.assert_allclose(value[0], whole[0], rtol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradient, wanted
  )


# --- rounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"divergence": "mse"}, "divergence='mse' is unknown; use one of kl-bwd, kl-fwd"),
    ({"update_teacher_every": 0}, "at least 1"),
    ({"chunk": 3}, "does not divide"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    tiny.distillation(dcd, **options)
