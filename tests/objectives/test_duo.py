# SPDX-License-Identifier: Apache-2.0
"""Uniform-state training: recorded losses, the temperature, the switch from soft to hard tokens."""

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
from compiled import at_most

from dlm_jax import process
from dlm_jax.objectives import duo
from dlm_jax.objectives.batch import split_each
from dlm_jax.objectives.gaussian_states import Relaxation
from dlm_jax.objectives.setting import Setting

DUALITY = process.GaussianDuality(vocab_size=tiny.V, gamma_min=-3.5, gamma_max=-1.75)
CURRICULUM = duo.SoftCurriculum(
  duality=DUALITY, start=2, end=5, tau_log10_start=-1.0, tau_log10_end=-2.0
)
network = functools.partial(tiny.network, time_conditioning=True)

_token_nll = jax.jit(duo.token_nll, static_argnames=("setting",))
_soft_inputs = jax.jit(duo.soft_inputs, static_argnames=("setting", "relaxation"))


# --- recorded values ----------------------------------------------------------------------------


def test_golden_temperature(golden):
  vectors, config = golden("duo_tau_schedule__a")
  curriculum = duo.SoftCurriculum(
    duality=DUALITY,
    start=config["curriculum_start"],
    end=config["curriculum_end"],
    tau_log10_start=config["tau_log10_start"],
    tau_log10_end=config["tau_log10_end"],
  )
  tau = curriculum.tau(jnp.asarray(vectors["global_step"], jnp.int32))
  np.testing.assert_allclose(1 / tau, vectors["tau_inverse"], rtol=1e-5)


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_hard_loss(golden, variant):
  """From parameters and the recorded corruption to nats per token."""
  vectors, config = golden(f"udlm_losses__{variant}")
  model, params = golden_networks.dit(vectors, config, "params", time_conditioning=True)
  batch = {"tokens": jnp.asarray(vectors["x0"], jnp.int32), "t": jnp.asarray(vectors["t"])}
  xt = jnp.asarray(vectors["xt"], jnp.int32)
  inputs = (xt, model.apply({"params": params}, xt, method="embedded"))
  forward = process.Uniform(vocab_size=config["V"])
  for chunk in (None, 4):
    setting = Setting(model=model, process=forward, chunk=chunk)
    nll = _token_nll(params, inputs, batch, None, setting=setting)
    recorded.close(nll, vectors["network_nll_per_token"], 2e-5)
  nll, log_x0 = jax.vmap(forward.nll), jax.vmap(forward.log_x0)
  mean = lambda logits: nll(log_x0(logits, xt), xt, batch["tokens"], batch["t"]).mean()  # noqa: E731
  gradient = jax.jit(jax.grad(mean))(jnp.asarray(vectors["logits"]))
  recorded.close(gradient, vectors["grad_mean_nll_wrt_logits"])


@pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_golden_soft_loss(golden, variant):
  """From parameters and the recorded noise, with the recorded α, α' and then with ours."""
  vectors, config = golden(f"duo_curriculum__{variant}")
  model, params = golden_networks.dit(vectors, config, "params", time_conditioning=True)
  window = {k: config[k] for k in ("gamma_min", "gamma_max")}
  duality = recorded.Noise(vocab_size=config["V"], recorded=(vectors["gaussian_noise"],), **window)
  batch = {"tokens": jnp.asarray(vectors["x0"], jnp.int32), "t": jnp.asarray(vectors["t"])}
  tau = 1 / float(vectors["tau_inverse"])
  for chunk in (None, 4):
    setting = Setting(model=model, process=duality.process, chunk=chunk)
    relaxation = Relaxation(duality=duality, tau=tau)
    rng_B = recorded.keys(config["B"])
    inputs = _soft_inputs(params, batch, rng_B, setting=setting, relaxation=relaxation)
    np.testing.assert_array_equal(inputs[0], vectors["xt_argmax"])
    scaled = jnp.asarray(vectors["xt_scaled"])
    recorded.close(inputs[1], model.apply({"params": params}, scaled, method="embedded"))

  schedule = recorded.Schedule(vectors["t"], vectors["alpha_t"], vectors["dalpha_t"])
  exact = process.Uniform(vocab_size=config["V"], schedule=schedule)
  setting = Setting(model=model, process=exact, chunk=4)
  each = _token_nll(params, inputs, batch, None, setting=setting)
  recorded.close(each, vectors["nll_per_token"], 2e-5)
  table = config["V"], vectors["gamma_t"].ravel()
  np.testing.assert_allclose(published_table.alpha(*table), vectors["alpha_t"].ravel(), rtol=1e-9)
  width = config["gamma_max"] - config["gamma_min"]
  slope = published_table.dalpha(table[0], table[1].astype(np.float64), width)
  np.testing.assert_allclose(slope, vectors["dalpha_t"].ravel(), rtol=1e-9)
  ours = duality.process.schedule  # the recorded table has 10,000 nearest points, α' differences
  np.testing.assert_allclose(ours.alpha(batch["t"]), vectors["alpha_t"], atol=3e-4)
  np.testing.assert_allclose(ours.dalpha(batch["t"]), vectors["dalpha_t"], rtol=0.3)

  z = jnp.asarray(vectors["xt_argmax"], jnp.int32)
  mean = lambda log_x0: jax.vmap(exact.nll)(log_x0, z, batch["tokens"], batch["t"]).mean()  # noqa: E731
  gradient = jax.jit(jax.grad(mean))(jnp.asarray(vectors["log_x_theta"]))
  recorded.close(gradient, vectors["grad_mean_nll_wrt_log_x_theta"], 2e-5)


# --- the loss -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("setting", "curriculum"))
def _loss(params, batch, step=None, **options):
  return jax.value_and_grad(duo.loss, has_aux=True)(params, batch, step=step, **options)


def _run(batch, step=None, curriculum=None, chunk=None):
  model, params = network(dropout=0.0)
  setting = Setting(model=model, process=tiny.UNIFORM, chunk=chunk)
  step = step if step is None else jnp.asarray(step)
  return _loss(params, batch, step, setting=setting, curriculum=curriculum)


def _integrand(logits, z, x0, alpha, dalpha):
  """Return the published form of the integrand, float64, [B, L]; α, α' as [B, 1, 1]."""
  size = logits.shape[-1]
  logits = np.asarray(logits, np.float64)
  f = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  alpha, dalpha = (np.asarray(a, np.float64)[:, None, None] for a in (alpha, dalpha))
  x, y = size * alpha * np.eye(size)[x0] + 1 - alpha, size * alpha * f + 1 - alpha
  at = lambda a: np.take_along_axis(a, np.asarray(z)[..., None], -1)  # noqa: E731
  spread = x / at(x) * (np.log(at(y)) - np.log(y) + np.log(x) - np.log(at(x)))
  inner = size / at(x) - size / at(y) - spread.sum(-1, keepdims=True)
  return (dalpha / (size * alpha) * inner)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("prompted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_hard_loss_by_hand(prompted):
  batch, valid = tiny.prompted_batch(prompted)
  (value, (metrics, extra)), _ = _run(batch)
  rng_B = split_each(batch["rng"], 2)[0]
  z = jnp.where(
    valid, jax.vmap(tiny.UNIFORM.corrupt)(rng_B, batch["tokens"], batch["t"]), batch["tokens"]
  )
  schedule = tiny.UNIFORM.schedule
  model, params = network(dropout=0.0)
  logits = model.apply({"params": params}, z, schedule.sigma(batch["t"]))
  nll = _integrand(
    logits, z, batch["tokens"], schedule.alpha(batch["t"]), schedule.dalpha(batch["t"])
  )
  wanted = np.sum(nll * valid) / valid.sum()  # over the batch, as the public code
  np.testing.assert_allclose(value, wanted, rtol=2e-5)
  np.testing.assert_allclose(metrics["changed"], np.mean(z != batch["tokens"]), rtol=1e-6)
  assert extra is None


@pytest.mark.slow
def test_soft_loss_by_hand():
  batch = tiny.batch()
  (value, _), _ = _run(batch, 3, curriculum=CURRICULUM)
  rng_B = split_each(batch["rng"], 2)[0]
  position = jnp.arange(tiny.L)
  noise = np.stack([np.asarray(DUALITY.noise(rng, position), np.float64) for rng in rng_B])
  gamma = -3.5 + 1.75 * np.asarray(batch["t"], np.float64)[:, None, None]
  w = (np.eye(tiny.V)[batch["tokens"]] * np.exp(-gamma / 2) + noise) / np.sqrt(1 + np.exp(-gamma))
  tau = 10 ** (-1 - 1 / 3)
  model, params = network(dropout=0.0)
  schedule = DUALITY.process.schedule
  alpha = schedule.alpha(batch["t"])
  soft = jnp.asarray(w / tau, jnp.float32)
  logits = model.apply({"params": params}, soft, -jnp.log(alpha))
  nll = _integrand(logits, w.argmax(-1), batch["tokens"], alpha, schedule.dalpha(batch["t"]))
  np.testing.assert_allclose(value, nll.mean(), rtol=1e-4)


@pytest.mark.slow
def test_prompts_reach_the_network_clean():
  """Soft or hard, what a prompt holds is seen as its own tokens, and is not scored."""
  nothing = tiny.batch(valid=jnp.zeros((tiny.B, tiny.L), bool))
  for step in (0, 5):
    (value, (metrics, _)), _ = _run(nothing, step, curriculum=CURRICULUM)
    assert value == 0 and metrics["changed"] == 0
  model, params = network()
  setting = Setting(model=model, process=tiny.UNIFORM, chunk=2)
  relaxation = Relaxation(duality=DUALITY, tau=1e-3)
  z, embedded = _soft_inputs(
    params, nothing, nothing["rng"], setting=setting, relaxation=relaxation
  )
  np.testing.assert_array_equal(z, nothing["tokens"])
  recorded.close(embedded, model.apply({"params": params}, z, method="embedded"), 1e-6)


@pytest.mark.slow
def test_the_switch(monkeypatch):
  """Below the curriculum's end the inputs are soft, from it on hard: one compiled function."""
  batch, plain = tiny.batch(), _loss.__wrapped__
  once = jax.jit(at_most(plain), static_argnames=("setting", "curriculum"))
  monkeypatch.setitem(globals(), "_loss", once)
  values = [float(_run(batch, step, curriculum=CURRICULUM)[0][0]) for step in range(8)]
  monkeypatch.undo()
  (hard, _), gradient = _run(batch)
  np.testing.assert_allclose(values[5:], hard, rtol=1e-6)
  assert values[0] == values[2] and len(set(values[2:6])) == 4
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    _run(batch, 5, curriculum=CURRICULUM)[1],
    gradient,
  )


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5])
def test_chunks_change_nothing(step):
  batch = tiny.batch()
  whole, wanted = _run(batch, step, curriculum=CURRICULUM)
  for chunk in (1, 2):
    value, gradient = _run(batch, step, curriculum=CURRICULUM, chunk=chunk)
    np.testing.assert_allclose(value[0], whole[0], rtol=1e-5)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradient, wanted
    )


# --- make ---------------------------------------------------------------------------------------


def _make(tx=None, **options):
  model, params = network()
  tx = tx or optax.adam(1e-2, eps=1e-3)
  objective = duo.make(model=model, process=tiny.UNIFORM, optimizers={"model": tx}, **options)
  return objective, objective.init(jax.random.key(0), params)


@pytest.mark.slow
def test_micro_batches_across_the_switch():
  """Two steps, one soft and one hard."""
  options = {"curriculum_start": 0, "curriculum_end": 1}
  ends = []
  for count in (1, 4):
    objective, state = _make(accumulate=count, **options)
    step = jax.jit(objective.step)
    for n in range(2):
      state, _ = step(state, tiny.batch(n))
    ends.append(state.trees)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *ends)


@pytest.mark.slow
def test_no_curriculum_is_plain_training():
  objective, state = _make(curriculum_start=0, curriculum_end=0)
  _, metrics = jax.jit(objective.step)(state, tiny.batch())
  model, params = network()
  setting = Setting(model=model, process=tiny.UNIFORM)
  (value, _), _ = _loss(params, tiny.batch(), None, setting=setting, curriculum=None)
  np.testing.assert_allclose(metrics["model/loss"], value, rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"chunk": 3}, "does not divide"),
    ({"curriculum_start": 7, "curriculum_end": 5}, "must lie between"),
    ({"gamma_min": -1.0}, "must be below"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    _make(**options)


def test_the_network_must_know_the_time():
  model, _ = tiny.network()
  with pytest.raises(ValueError, match="time_conditioning"):
    duo.make(model=model, process=tiny.UNIFORM, optimizers={"model": optax.sgd(1.0)})
