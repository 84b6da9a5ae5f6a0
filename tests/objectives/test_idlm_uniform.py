# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation of uniform-state teachers: recorded losses and gradients, both paths."""

import dataclasses
import functools

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded as quantities
import tiny

from dlm_jax import convert, process
from dlm_jax.models import DiT
from dlm_jax.objectives import draw_batch, idlm
from dlm_jax.objectives.batch import split_each
from dlm_jax.objectives.gaussian_states import Relaxation


class Recorded:
  """One variant of the recorded quantities, as our arguments."""

  def __init__(self, vectors, config):
    v = self.vectors = vectors
    self.size = config["B"]
    trees = ("student", "teacher", "fake")
    self.model, *params = golden_networks.dit(vectors, config, *trees, time_conditioning=True)
    self.params = dict(zip(trees, params, strict=True))
    schedule = quantities.Schedule(
      np.concatenate([v["t"], v["t_gen"]]),
      np.concatenate([v["alpha_t"], v["alpha_gen"]])[:, 0],
      np.concatenate([v["dalpha_t"], np.full_like(v["alpha_gen"], np.nan)])[:, 0],
    )
    self.process = process.Uniform(vocab_size=config["V"], schedule=schedule)
    duality = quantities.Noise(
      vocab_size=config["V"],
      gamma_min=config["gamma_min"],
      gamma_max=config["gamma_max"],
      recorded=(v["gaussian_noise_gen"], v["gaussian_noise"]),
    )
    self.relaxation = Relaxation(duality=duality, tau=float(1 / v["tau_inverse"]))
    self.batch = {"tokens": jnp.asarray(v["x0"], jnp.int32)}
    self.batch |= {k: jnp.asarray(v[k]) for k in ("t", "t_gen")}

  def states(self, chunk=None, **changes):
    relaxation = dataclasses.replace(self.relaxation, **changes)
    return idlm.SoftStates(
      model=self.model, process=self.process, relaxation=relaxation, chunk=chunk
    )

  def rollout(self, student, chunk=None):
    rngs = tuple(quantities.keys(self.size, which) for which in (0, 0, 1))
    return self.states(chunk).rollout(student, self.batch, rngs=rngs, dropout_B=None)

  def generator(self, student, chunk=None, **changes):
    """Return (loss, metrics) from the recorded noise; differentiate in the parameters."""
    sample = self.rollout(student, chunk)
    return idlm.gap(
      student,
      sample,
      self.batch,
      teacher=self.params["teacher"],
      fake=self.params["fake"],
      states=self.states(chunk, **changes),
    )

  def fake(self, fake, chunk=None):
    student = self.params["student"]
    sample = self.rollout(student, chunk)
    states = self.states(chunk)
    return idlm.cross_entropy(fake, sample, self.batch, student=student, states=states)

  @functools.cached_property
  def generator_gradient(self):
    """The generator's ((loss, metrics), gradient)."""
    return _gradient(self.generator, self.params["student"])


@pytest.fixture(scope="module")
def load(golden):
  return functools.cache(lambda name: Recorded(*golden(f"idlm_duo__{name}")))


@pytest.fixture(scope="module", params=["a", pytest.param("b", marks=pytest.mark.slow)])
def recorded(request, load):
  return load(request.param)


def _compare_gradient(r, gradient, prefix, tolerance=2e-5):
  ours = convert.to_tensors(r.model, gradient)
  wanted = golden_networks.under(r.vectors, prefix)
  assert len(wanted) == 7
  for name, tensor in wanted.items():
    scale = max(np.abs(tensor).max(), 1e-12)
    np.testing.assert_allclose(ours[f"backbone.{name}"], tensor, rtol=0, atol=tolerance * scale)


def _gradient(function, params, **options):
  return jax.jit(jax.value_and_grad(functools.partial(function, **options), has_aux=True))(params)


def test_golden_states(recorded):
  r, v = recorded, recorded.vectors
  sample = jax.jit(r.rollout)(r.params["student"])
  np.testing.assert_array_equal(sample.x_gen, v["xt_gen_soft"].argmax(-1))
  sigma = r.process.schedule.sigma(r.batch["t_gen"])
  logits = r.model.apply({"params": r.params["student"]}, sample.hidden, sigma, method="head")
  quantities.close(logits, v["student_logits"], 2e-5)
  z, _ = r.states().read(r.params["student"], sample, r.batch, (r.params["teacher"],), (None,))
  np.testing.assert_array_equal(z, v["xt"])


def test_golden_generator_loss(recorded):
  r = recorded
  (value, _), gradient = r.generator_gradient
  np.testing.assert_allclose(value, r.vectors["generator_loss_mean"], rtol=2e-5)
  _compare_gradient(r, gradient, "grad_generator_loss_mean_wrt_student")


def test_golden_fake_objective(recorded):
  r = recorded
  value, gradient = jax.jit(jax.value_and_grad(r.fake))(r.params["fake"])
  np.testing.assert_allclose(value, r.vectors["fakeobj_loss_mean"], rtol=1e-5)
  _compare_gradient(r, gradient, "grad_fakeobj_loss_mean_wrt_fake")


@pytest.mark.slow
def test_chunks_change_nothing(recorded):
  r = recorded
  whole = r.generator_gradient
  parts = _gradient(r.generator, r.params["student"], chunk=4)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole[1]))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, scale))


@pytest.mark.slow
def test_the_gaussian_path_carries_gradient(load):
  """Spec, acceptance check 6: without the path through w the gradient is another one."""
  r = load("a")
  (value, _), both = r.generator_gradient
  (same, _), direct = _gradient(r.generator, r.params["student"], path_gradient=False)
  np.testing.assert_allclose(value, same, rtol=1e-6)
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, both, direct))
  assert float(difference) > 0.05 * float(optax.tree.norm(both))


def test_direct_gradient_on_probabilities(recorded):
  """The part of the gradient that does not pass through the networks' inputs, on p itself."""
  r, v = recorded, recorded.vectors

  def loss(p_BLV):
    nll = jax.vmap(r.process.nll_soft)
    args = (jnp.asarray(v["xt"], jnp.int32), p_BLV, r.batch["t"])
    gap = nll(v["teacher_log_probs"], *args) - nll(v["fake_log_probs"], *args)
    return gap.sum(1).mean()

  wanted = v["grad_generator_loss_mean_wrt_student_probs_direct_f64"]
  ours = jax.grad(loss)(jnp.asarray(v["student_probs"]))
  # p sums to 1: a constant per row is no gradient, and the published form has another one
  ours, wanted = (x - x.mean(-1, keepdims=True) for x in (np.asarray(ours), wanted))
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_prompted_values(recorded):
  """Prompt positions: p is the token, the soft state is the token without noise."""
  r, v = recorded, recorded.vectors
  valid = jnp.asarray(v["prompted/valid_tokens"] > 0)
  batch = {**r.batch, "valid": valid}
  for name in ("teacher", "fake"):
    logits = r.model.apply(
      {"params": r.params[name]},
      jnp.asarray(v["prompted/xt_soft"]),
      r.process.schedule.sigma(batch["t"]),
    )
    log_x0 = jax.nn.log_softmax(logits)
    nll = jax.vmap(r.process.nll_soft)(
      log_x0,
      jnp.asarray(v["prompted/xt"], jnp.int32),
      jnp.asarray(v["prompted/student_probs"]),
      batch["t"],
    )
    wanted = v[f"prompted/{name}_nll_per_token"]
    np.testing.assert_allclose(nll, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
  # what the reference feeds the networks at the prompt is the token, almost or exactly
  at_prompt = v["prompted/xt_soft"][np.asarray(~valid)]
  x0_at_prompt = v["x0"][np.asarray(~valid)]
  np.testing.assert_array_equal(at_prompt.argmax(-1), x0_at_prompt)


class FromLogits(idlm.SoftStates):
  """States of a student whose hidden states are its logits."""

  def head(self, params, hidden_BKD, t_B):
    return hidden_BKD if params == {} else super().head(params, hidden_BKD, t_B)


def test_golden_prompted(recorded):
  """The recorded loss is a mean over the valid tokens of the batch; ours is L times that."""
  r, v = recorded, recorded.vectors
  valid = v["prompted/valid_tokens"] > 0
  assert len(set(valid.sum(1))) > 1  # else a mean by sequence would be the same
  batch = {**r.batch, "valid": jnp.asarray(valid)}
  states = FromLogits(model=r.model, process=r.process, relaxation=r.relaxation)
  rng_B, trees = quantities.keys(r.size, 1), {k: r.params[k] for k in ("teacher", "fake")}

  @jax.jit
  @jax.value_and_grad
  def generator(logits):
    sample = idlm.uniform.SoftSample(batch["tokens"], logits, rng_B)
    return idlm.gap({}, sample, batch, states=states, **trees)[0] / valid.shape[1]

  # The student saw other inputs here; only its probabilities are recorded, so start from these.
  logits = jnp.log(jnp.maximum(jnp.asarray(v["prompted/student_probs"]), 1e-30))
  value, gradient = generator(logits)
  np.testing.assert_allclose(value, v["prompted/generator_loss"], rtol=2e-5)
  wanted = v["prompted/grad_generator_loss_wrt_student_logits"]
  quantities.close(gradient, wanted, 2e-5)
  assert not np.any(gradient[~valid])


@functools.cache
def _tiny(length=8, size=11, **options):
  shape = {"vocab_size": size, "dim": 16, "cond_dim": 8, "layers": 1, "length": length}
  model = DiT(tiny.config(**shape, time_conditioning=True, **options))
  rng = jax.random.key(0)
  params = jax.jit(model.init)(rng, jnp.zeros((1, length), jnp.int32), jnp.zeros(1))["params"]
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(rng, len(leaves))
  noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
  return model, jax.tree.unflatten(tree, noisy)


def _loss(model, params, batch, fake=None, **options):
  relaxation = Relaxation(duality=process.GaussianDuality(vocab_size=model.config.vocab_size))
  states = idlm.SoftStates(
    model=model, process=relaxation.process, relaxation=relaxation, **options
  )
  loss = functools.partial(idlm.student_loss, teacher=params, fake=fake or params, states=states)
  return lambda p: loss(p, batch)[0]


def _losses(model, params, *given, **options):
  return jax.jit(jax.grad(_loss(model, params, *given, **options)))(params)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4])
def test_the_gradient_of_a_jitted_loss(chunk):
  """Either order of `grad` and `jit`, of a loss whose sums have a rule of differentiation."""
  model, params = _tiny(dropout=0.0)
  tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 11)
  batch = draw_batch({"tokens": tokens}, jax.random.key(2))
  batch = idlm.couple_times(batch, coupling="same_order")
  loss = _loss(model, params, batch, fake=jax.tree.map(lambda x: 1.1 * x, params), chunk=chunk)
  wanted, found = jax.jit(jax.grad(loss))(params), jax.grad(jax.jit(loss))(params)
  assert float(optax.tree.norm(wanted)) > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)


@pytest.mark.slow
def test_no_gradient_at_the_start():
  """Spec, acceptance check 4: with three equal networks the student does not move."""
  model, params = _tiny(dropout=0.0)
  tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 11)
  batch = idlm.couple_times(
    draw_batch({"tokens": tokens}, jax.random.key(2)), coupling="same_order"
  )
  gradient = _losses(model, params, batch)
  moved = jax.tree.map(lambda x: x * 1.1, params)
  other = _losses(model, params, batch, fake=moved)
  assert float(optax.tree.norm(gradient)) < 1e-4 * float(optax.tree.norm(other))


def test_prompts_are_kept_clean():
  """Prompt positions are data in the student's input and in the loss state, and score nothing."""
  model, params = _tiny(dropout=0.0)
  tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 11)
  valid = jnp.broadcast_to(jnp.arange(8)[None] >= 3, (4, 8))
  batch = draw_batch({"tokens": tokens, "valid": valid}, jax.random.key(2))
  batch = idlm.couple_times(batch, coupling="permuted")
  relaxation = Relaxation(duality=process.GaussianDuality(vocab_size=11))
  states = idlm.SoftStates(model=model, process=relaxation.process, relaxation=relaxation)
  rngs = split_each(batch["rng"], 3)

  @jax.jit
  def run(params, batch, rngs):
    sample = states.rollout(params, batch, rngs=rngs, dropout_B=None)
    return sample.x_gen, states.read(params, sample, batch, (params,), (None,))[0]

  x_gen, z = run(params, batch, rngs)
  np.testing.assert_array_equal(x_gen[:, :3], tokens[:, :3])
  np.testing.assert_array_equal(z[:, :3], tokens[:, :3])
  assert (z[:, 3:] != tokens[:, 3:]).any()


def test_uniform_states_need_a_time_conditioned_network():
  model, _ = _tiny()
  blind = DiT(dataclasses.replace(model.config, time_conditioning=False))
  txs = {name: optax.sgd(0.1) for name in idlm.TRAINED}
  with pytest.raises(ValueError, match="time_conditioning"):
    idlm.make(model=blind, process=process.Uniform(vocab_size=11), optimizers=txs)


@pytest.mark.slow
def test_memory_stays_below_two_dense_arrays():
  """With chunks the compiled pair never holds two [B, L, V] float32 arrays."""
  length, size, batch = 64, 4096, 4
  model, params = _tiny(length, size)
  txs = {name: optax.sgd(0.1) for name in idlm.TRAINED}
  dense = 4 * batch * length * size

  def temporary(chunk):
    objective = idlm.make(
      model=model, process=process.Uniform(vocab_size=size), optimizers=txs, chunk=chunk
    )
    state = jax.eval_shape(objective.init, jax.random.key(0), params)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def step(state, tokens):
      return objective.step(state, draw_batch({"tokens": tokens}, jax.random.key(0)))

    compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  weights = sum(x.size for x in jax.tree.leaves(params)) * 4
  assert temporary(8) < 2 * dense + 6 * weights
  assert temporary(length) > 2 * dense + 6 * weights
