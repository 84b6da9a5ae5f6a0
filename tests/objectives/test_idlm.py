# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation: recorded losses and gradients, the closed-form gradient, who is updated."""

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
from dlm_jax.objectives import idlm
from dlm_jax.objectives.batch import split_each
from dlm_jax.objectives.idlm.absorbing import HardSample

M = tiny.MASK


class Table(DiT):
  """A network whose parameters are its logits: a gradient on parameters is one on logits."""

  size: int = tiny.B

  def setup(self):
    shape = (self.size, self.config.length, self.config.vocab_size)
    self.logits = self.param("logits", jax.nn.initializers.zeros, shape)

  def trunk(self, tokens, sigma_B, rng_B=None):
    return self.logits

  def head(self, hidden_BKD, sigma_B):
    return hidden_BKD


def _table(logits):
  return {"logits": jnp.asarray(logits, jnp.float32)}


def _states(model, proc=tiny.PROCESS, chunk=None):
  return idlm.HardStates(model=model, process=proc, chunk=chunk)


# --- recorded values ----------------------------------------------------------------------------


class Recorded:
  """One variant of the recorded IDLM quantities, as our arguments."""

  def __init__(self, vectors, config):
    self.vectors, self.vocabulary = vectors, config["V"]
    self.process = process.Absorbing(vocab_size=config["V"], mask_id=config["mask_index"])
    options = golden_networks.dit_config(config)
    self.model, self.table = DiT(options), Table(options, size=config["B"])
    self.params = {
      name: golden_networks.params(self.model, vectors, name)
      for name in ("student", "teacher", "fake")
    }
    self.x_gen, self.z = (jnp.asarray(vectors[k], jnp.int32) for k in ("xt_gen", "xt"))
    self.batch = {k: jnp.asarray(vectors[k]) for k in ("t", "t_gen")}

  def gap(self, student, *, chunk=None):
    """Return (loss, metrics) on the recorded states; differentiate in the parameters."""
    hidden = self.model.apply({"params": student}, self.x_gen, self.batch["t"], method="trunk")
    return idlm.gap(
      student,
      HardSample(self.x_gen, hidden, self.z),
      self.batch,
      states=_states(self.model, self.process, chunk),
      teacher=self.params["teacher"],
      fake=self.params["fake"],
    )

  def cross_entropy(self, fake, *, chunk=None):
    student = self.params["student"]
    hidden = self.model.apply({"params": student}, self.x_gen, self.batch["t"], method="trunk")
    return idlm.cross_entropy(
      fake,
      HardSample(self.x_gen, hidden, self.z),
      self.batch,
      states=_states(self.model, self.process, chunk),
      student=student,
    )


@pytest.fixture(scope="module", params=["a", pytest.param("b", marks=pytest.mark.slow)])
def recorded(request, golden):
  return Recorded(*golden(f"idlm_mdlm__{request.param}"))


def test_golden_log_probabilities(recorded):
  r = recorded
  apply = jax.jit(r.model.apply)
  for name, state in (("student", r.x_gen), ("teacher", r.z), ("fake", r.z)):
    logits = apply({"params": r.params[name]}, state, r.batch["t"])
    quantities.close(logits, r.vectors[f"{name}_logits"], 2e-5)
    log_probs = jax.vmap(r.process.log_x0)(logits, state)
    wanted = r.vectors[f"{name}_log_probs"]
    possible = wanted > -1e5
    np.testing.assert_allclose(log_probs[possible], wanted[possible], rtol=2e-5, atol=2e-5)
    assert np.all(log_probs[~possible] < -1e5)


def test_golden_generator_loss(recorded):
  r = recorded
  (value, metrics), gradient = jax.jit(jax.value_and_grad(r.gap, has_aux=True))(r.params["student"])
  np.testing.assert_allclose(value, r.vectors["generator_loss_per_seq_f64"].mean(), rtol=1e-5)
  ours = convert.to_tensors(r.model, gradient)
  wanted = golden_networks.under(r.vectors, "grad_generator_loss_mean_wrt_student")
  assert len(wanted) == 7
  for name, tensor in wanted.items():
    quantities.close(ours[f"backbone.{name}"], tensor, 3e-5)

  both = (np.asarray(r.x_gen) == r.process.mask_id) & (np.asarray(r.z) == r.process.mask_id)
  p = r.vectors["student_probs"][both].astype(np.float64)
  a = (r.vectors["teacher_log_probs"] - r.vectors["fake_log_probs"])[both].astype(np.float64)
  a[:, r.process.mask_id] = 0
  spread = (p * a**2).sum(-1) - (p * a).sum(-1) ** 2
  entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
  np.testing.assert_allclose(metrics["advantage"], np.sqrt(spread.mean()), rtol=1e-4)
  np.testing.assert_allclose(metrics["entropy"], entropy.mean(), rtol=1e-5)


def _on_logits(r, prefix=""):
  """Return functions of logits: the generator loss and the fake's."""
  v = r.vectors
  x_gen, z = (jnp.asarray(v[f"{prefix}{k}"], jnp.int32) for k in ("xt_gen", "xt"))
  batch = dict(r.batch)
  if prefix:
    batch["valid"] = jnp.asarray(v[f"{prefix}valid_tokens"] > 0)
  teacher, fake = (
    _table(v[f"{prefix}{k}_log_probs"] if prefix else v[f"{k}_logits"]) for k in ("teacher", "fake")
  )
  shared = {"states": _states(r.table, r.process)}

  def generator(logits):
    sample = HardSample(x_gen, logits, z)
    return idlm.gap(_table(logits), sample, batch, teacher=teacher, fake=fake, **shared)[0]

  def fake_objective(logits):
    student = _table(v["student_logits"])
    sample = HardSample(x_gen, student["logits"], z)
    return idlm.cross_entropy({"logits": logits}, sample, batch, student=student, **shared)

  return generator, fake_objective


def test_golden_gradient_on_student_logits(recorded):
  generator, _ = _on_logits(recorded)
  logits = jnp.asarray(recorded.vectors["student_logits"])
  wanted = recorded.vectors["grad_generator_loss_mean_wrt_student_logits"]
  quantities.close(jax.grad(generator)(logits), wanted, 2e-5)
  with pytest.raises(AssertionError):  # the other sign would be seen
    quantities.close(-jax.grad(generator)(logits), wanted, 2e-5)


def test_golden_fake_objective(recorded):
  """The recorded float32 value holds −1e6 entries; the same sum over masked positions does not."""
  r, v = recorded, recorded.vectors
  value, gradient = jax.jit(jax.value_and_grad(r.cross_entropy))(r.params["fake"])
  masked = v["xt"] == r.process.mask_id
  log_fake = np.where(v["fake_log_probs"] < -1e5, 0, v["fake_log_probs"]).astype(np.float64)
  per_position = -(v["student_probs"] * log_fake).sum(-1) / v["t"][:, None]
  np.testing.assert_allclose(value, (per_position * masked).sum(1).mean(), rtol=1e-5)
  ours = convert.to_tensors(r.model, gradient)
  wanted = golden_networks.under(r.vectors, "grad_fakeobj_loss_mean_wrt_fake")
  assert len(wanted) == 7
  for name, tensor in wanted.items():
    quantities.close(ours[f"backbone.{name}"], tensor, 3e-5)
  _, fake_objective = _on_logits(r)
  on_logits = jax.grad(fake_objective)(jnp.asarray(v["fake_logits"]))
  quantities.close(on_logits, v["grad_fakeobj_loss_mean_wrt_fake_logits"], 2e-5)


def test_golden_prompted(recorded):
  """The recorded loss is a mean over valid tokens; ours is L times that, on the scale of a sum."""
  r, v = recorded, recorded.vectors
  generator, _ = _on_logits(r, "prompted/")
  valid = v["prompted/valid_tokens"] > 0
  # The student saw other inputs here; only its probabilities are recorded, so start from these.
  logits = jnp.log(jnp.maximum(jnp.asarray(v["prompted/student_probs"]), 1e-30))
  value, gradient = jax.value_and_grad(generator)(logits)
  length = valid.shape[1]
  wanted = v["prompted/generator_loss_per_seq_f64"].mean()
  np.testing.assert_allclose(value / length, wanted, rtol=1e-5)
  quantities.close(
    gradient / length, v["prompted/grad_generator_loss_mean_wrt_student_logits"], 2e-5
  )
  assert not np.any(gradient[~valid])


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("chunk", [4, 1, 100])
def test_chunks_change_nothing(golden, chunk):
  r = Recorded(*golden("idlm_mdlm__a"))
  for function, tree in ((r.gap, "student"), (r.cross_entropy, "fake")):
    loss = lambda p, chunk, f=function: jax.tree.leaves(f(p, chunk=chunk))[0]  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    whole, pieces = (run(r.params[tree], size) for size in (None, chunk))
    np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-5)
    jax.tree.map(quantities.close, pieces[1], whole[1])


@pytest.mark.slow
def test_chunks_must_divide(golden):
  r = Recorded(*golden("idlm_mdlm__a"))
  with pytest.raises(ValueError, match=r"chunk=5 does not divide the sequence length 16"):
    r.gap(r.params["student"], chunk=5)


# --- the gradient in closed form ----------------------------------------------------------------


def _random_case(seed=0):
  """Return logits of the three networks, a batch and a table network."""
  model, _ = tiny.network()
  rng = np.random.default_rng(seed)
  shape = (tiny.B, tiny.L, tiny.V)
  student, teacher, fake = (_table(rng.normal(size=shape)) for _ in range(3))
  batch = idlm.couple_times(tiny.batch(), coupling="same_order")
  return Table(model.config), student, teacher, fake, batch


def test_gradient_is_the_advantage():
  """−(1/t) p (a − ⟨p, a⟩) where both states are masked, exactly 0 elsewhere."""
  table, student, teacher, fake, batch = _random_case()
  keys = split_each(batch["rng"], 4)
  states = _states(table)
  sample = states.rollout(student, batch, rngs=keys[:3], dropout_B=None)

  loss = functools.partial(idlm.student_loss, teacher=teacher, fake=fake, states=states)
  gradient = np.asarray(jax.grad(loss, has_aux=True)(student, batch)[0]["logits"], np.float64)

  def log_softmax(tree):
    logits = np.array(tree["logits"], np.float64)
    logits[..., M] = -np.inf
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  p = np.exp(log_softmax(student))
  with np.errstate(invalid="ignore"):
    a = np.nan_to_num(log_softmax(teacher) - log_softmax(fake))
  wanted = -p * (a - (p * a).sum(-1, keepdims=True)) / np.asarray(batch["t"])[:, None, None]
  both = np.asarray((sample.x_gen == M) & (sample.z == M))
  assert 0 < both.sum() < both.size
  wanted = np.where(both[..., None], wanted, 0) / tiny.B
  np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
  assert not np.any(gradient[~both])


def test_descent_moves_towards_the_teacher():
  """One step against the gradient raises p where the teacher is more likely than the fake."""
  table, student, teacher, fake, batch = _random_case()
  loss = functools.partial(idlm.student_loss, teacher=teacher, fake=fake, states=_states(table))
  gradient = jax.grad(loss, has_aux=True)(student, batch)[0]["logits"]
  advantage = jax.nn.log_softmax(teacher["logits"]) - jax.nn.log_softmax(fake["logits"])
  tokens = np.arange(tiny.V) != M
  assert np.sum(np.asarray(-gradient * advantage)[..., tokens]) > 0


# --- rollouts, times, prompts -------------------------------------------------------------------


def _rollout(batch, chunk=None):
  model, params = tiny.network()
  keys = split_each(batch["rng"], 4)[:3]
  run = jax.jit(functools.partial(_states(model, chunk=chunk).rollout, dropout_B=None))
  return run(params, batch, rngs=keys)


def test_rollout_states():
  batch = idlm.couple_times(tiny.batch(size=16), coupling="same_order")
  sample, x0 = _rollout(batch), np.asarray(batch["tokens"])
  x_gen, z = np.asarray(sample.x_gen), np.asarray(sample.z)
  assert np.all((x_gen == x0) | (x_gen == M)) and np.any(x_gen == M)
  kept = (x_gen != M) & (z != M)
  np.testing.assert_array_equal(z[kept], x0[kept])  # what the student saw is copied
  filled = (x_gen == M) & (z != M)
  assert np.any(z[filled] != x0[filled])
  np.testing.assert_array_equal(_rollout(batch, chunk=2).z, z)


@pytest.mark.slow
def test_rollout_draws_from_the_prediction():
  """At t_gen = 1, t = 0: z is distributed as the student's prediction from all masks."""
  count = 4000
  model, params = tiny.network()
  batch = idlm.couple_times(tiny.batch(size=count), coupling="same_order")
  batch = {**batch, "t": jnp.zeros(count), "t_gen": jnp.full(count, 1 / (1 - 1e-3))}
  sample = _rollout(batch)
  assert np.all(sample.x_gen == M)
  logits = model.apply({"params": params}, sample.x_gen[:1], jnp.zeros(1))
  p = np.exp(jax.vmap(tiny.PROCESS.log_x0)(logits, sample.x_gen[:1]))[0]
  for l in range(tiny.L):
    seen = np.bincount(np.asarray(sample.z[:, l]), minlength=tiny.V) / count
    assert seen[M] == 0
    assert np.all(np.abs(seen - p[l]) < 5 * np.sqrt(p[l] * (1 - p[l]) / count) + 1e-9)


def test_prompts_are_never_masked_and_never_scored():
  valid = jnp.asarray(np.random.default_rng(1).random((16, tiny.L)) < 0.6).at[0].set(False)
  batch = idlm.couple_times(tiny.batch(size=16, valid=valid), coupling="same_order")
  sample = _rollout(batch)
  for state in (sample.x_gen, sample.z):
    np.testing.assert_array_equal(state[~valid], batch["tokens"][~valid])
  _, student, teacher, fake, _ = _random_case()
  table = _random_case()[0]
  shared = {"states": _states(table)}
  loss = functools.partial(idlm.student_loss, teacher=teacher, fake=fake, **shared)
  gradient = jax.grad(loss, has_aux=True)(student, batch)[0]["logits"]
  assert np.any(gradient[valid]) and not np.any(gradient[~valid])
  loss = functools.partial(idlm.fake_loss, student=student, **shared)
  gradient = jax.grad(loss, has_aux=True)(fake, batch)[0]["logits"]
  assert np.any(gradient[valid]) and not np.any(gradient[~valid])


def test_all_valid_is_no_mask():
  table, student, teacher, fake, batch = _random_case()
  loss = functools.partial(idlm.student_loss, states=_states(table), teacher=teacher, fake=fake)
  valid = jnp.ones(batch["tokens"].shape, bool)
  masked, plain = loss(student, {**batch, "valid": valid})[0], loss(student, batch)[0]
  np.testing.assert_allclose(masked, plain, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 8, 512])
def test_same_order_keeps_the_stratum(size):
  batch = tiny.batch(size=size)
  coupled = idlm.couple_times(batch, coupling="same_order")
  t, t_gen = np.asarray(batch["t"]), np.asarray(coupled["t_gen"])
  np.testing.assert_array_equal(coupled["t"], t)
  assert np.all(np.abs(t - t_gen) < 1 / size) and np.all(t != t_gen)
  assert t_gen.min() >= 1e-3 and t_gen.max() <= 1


def test_permuted_is_a_permutation():
  batch = tiny.batch(size=512)
  same, permuted = (idlm.couple_times(batch, coupling=c)["t_gen"] for c in idlm.TIME_COUPLINGS)
  np.testing.assert_array_equal(np.sort(permuted), np.sort(same))
  assert abs(np.corrcoef(permuted, batch["t"])[0, 1]) < 0.2
  other = idlm.couple_times(tiny.batch(1, size=512), coupling="permuted")["t_gen"]
  assert np.any(np.argsort(other) != np.argsort(permuted))


# --- alternation --------------------------------------------------------------------------------


@functools.cache
def _objective(**options):
  """Return (objective, teacher's parameters) of a network without dropout."""
  model, params = tiny.network(dropout=0.0)
  optimizers = {"student": optax.sgd(1.0), "fake": optax.sgd(0.1)}
  made = idlm.make(
    model=model, process=tiny.PROCESS, optimizers=optimizers, **{"ema_decay": 0.5, **options}
  )
  return made._replace(step=jax.jit(made.step)), params


def _student_gradient(trees, batch):
  """Return the gradient of the student's loss on its parameters."""
  model, _ = tiny.network(dropout=0.0)
  loss = functools.partial(
    idlm.student_loss, states=_states(model), teacher=trees["teacher"], fake=trees["fake"]
  )
  batch = idlm.couple_times(batch, coupling="same_order")
  return jax.grad(loss, has_aux=True)(trees["student"], batch)[0]


_compiled_student_gradient = jax.jit(_student_gradient)


def test_no_gradient_on_logits_at_the_start():
  table, student, _, _, batch = _random_case()
  loss = functools.partial(idlm.student_loss, teacher=student, fake=student, states=_states(table))
  (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(student, batch)
  assert value == 0 and not np.any(gradient["logits"])


@pytest.mark.slow
def test_no_gradient_at_the_start():
  """Exactly 0 when every operation runs alone."""
  objective, params = _objective()
  state = objective.init(jax.random.key(0), params)
  for leaf in jax.tree.leaves(_student_gradient(state.trees, tiny.batch(7))):
    assert not np.any(leaf)


@pytest.mark.slow
def test_no_gradient_until_the_fake_has_moved():
  """Compiled, teacher and fake may be fused, and so rounded, differently: 0 up to that."""
  objective, params = _objective()
  state = objective.init(jax.random.key(0), params)
  after, metrics = objective.step(state, tiny.batch(1))
  moved = {**state.trees, "fake": after.trees["fake"]}
  before, gradient = (_compiled_student_gradient(t, tiny.batch(7)) for t in (state.trees, moved))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
  assert optax.tree.norm(before) < 1e-5 * optax.tree.norm(gradient)
  assert metrics["student/grad_norm"] > 0  # so the student saw the updated fake


@pytest.mark.slow
def test_fake_first_each_on_its_own_batch():
  objective, params = _objective()
  state = objective.init(jax.random.key(0), params)
  first, second = tiny.batch(1), tiny.batch(2)
  after, metrics = objective.step(state, (first, second))
  jax.tree.map(np.testing.assert_array_equal, after.trees["teacher"], params)

  # the fake: a step of the raw student's cross entropy on the first batch
  model, _ = tiny.network(dropout=0.0)
  loss = functools.partial(idlm.fake_loss, states=_states(model), student=state.trees["student"])
  batch = idlm.couple_times(first, coupling="same_order")
  value, gradient = jax.jit(lambda p: jax.value_and_grad(lambda p: loss(p, batch)[0])(p))(params)
  np.testing.assert_allclose(metrics["fake/loss"], value, rtol=1e-5)
  wanted = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    after.trees["fake"],
    wanted,
  )

  # the student: a step on the second batch against the fake that has just moved
  moved = {**state.trees, "fake": after.trees["fake"]}
  gradient = _compiled_student_gradient(moved, second)
  wanted = jax.tree.map(lambda p, g: p - g, params, gradient)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    after.trees["student"],
    wanted,
  )
  norm = float(optax.tree.norm(gradient))
  np.testing.assert_allclose(metrics["student/grad_norm"], norm, rtol=1e-4)


@pytest.mark.slow
def test_one_batch_serves_both():
  objective, params = _objective()
  state, batch = objective.init(jax.random.key(0), params), tiny.batch(3)
  alone, pair = objective.step(state, batch), objective.step(state, (batch, batch))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), alone, pair)
  assert objective.batches == 2 and objective.output == "student"


@pytest.mark.slow
def test_averages_of_student_and_fake():
  """At step n the rate is min(decay, (1 + n)/(10 + n)): 2/11 at the first."""
  objective, params = _objective()
  state = objective.init(jax.random.key(0), params)
  after, _ = objective.step(state, (tiny.batch(1), tiny.batch(1)))
  assert set(after.ema) == {"student", "fake"}
  for tree in after.ema:
    wanted = jax.tree.map(lambda a, b: a * 2 / 11 + b * 9 / 11, params, after.trees[tree])
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after.ema[tree], wanted
    )


@pytest.mark.slow
def test_dropout_roles():
  """Dropout acts on the tree that is trained, and on no other."""
  model, params = tiny.network(dropout=0.5)
  quiet, _ = tiny.network(dropout=0.0)
  batch = idlm.couple_times(tiny.batch(), coupling="same_order")
  other = jax.tree.map(lambda x: x * 1.1, params)

  def losses(model):
    shared = {"states": _states(model)}
    fake, _ = idlm.fake_loss(params, batch, student=other, **shared)
    student, _ = idlm.student_loss(params, batch, teacher=other, fake=params, **shared)
    return fake, student

  noisy, still = (jax.jit(losses, static_argnums=0)(network) for network in (model, quiet))
  assert all(a != b for a, b in zip(noisy, still, strict=True))
  *rngs, dropout_B = split_each(batch["rng"], 4)
  noisy_states, states = _states(model), _states(quiet)
  sample = noisy_states.rollout(params, batch, rngs=tuple(rngs), dropout_B=dropout_B)
  by_hand, _ = idlm.gap(params, sample, batch, states=states, teacher=other, fake=params)
  np.testing.assert_allclose(noisy[1], by_hand, rtol=1e-5)
  sample = states.rollout(other, batch, rngs=tuple(rngs), dropout_B=None)
  by_hand = idlm.cross_entropy(
    params, sample, batch, states=noisy_states, student=other, dropout_B=dropout_B
  )
  np.testing.assert_allclose(noisy[0], by_hand, rtol=1e-5)


# --- input checks -------------------------------------------------------------------------------


def test_unknown_coupling():
  with pytest.raises(
    ValueError, match=r"time_coupling='random' is unknown; use one of same_order, perm"
  ):
    _objective(time_coupling="random")
