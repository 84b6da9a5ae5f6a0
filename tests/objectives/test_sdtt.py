# SPDX-License-Identifier: Apache-2.0
"""Self-distillation through time: recorded targets and losses, the teacher's steps, the rounds."""

import functools
import json
import pathlib

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
import tiny
from safetensors import safe_open

from dlm_jax import process
from dlm_jax.objectives import rounds, sdtt
from dlm_jax.objectives.setting import Setting

M = tiny.MASK
TARGETS = "teacher_log_prob_targets"
# These losses see the mask's column, where float32 numbers near −1e6 are 1/16 apart.
ROUNDING = {"mse": 5e-3, "tvd": 5e-3}
every_kind = pytest.mark.parametrize("kind", rounds.DIVERGENCES)


# --- recorded values ----------------------------------------------------------------------------


class Recorded:
  """One variant of the recorded quantities, as our arguments."""

  def __init__(self, vectors, config):
    self.vectors, self.steps = vectors, config["num_distill_steps"]
    self.process = process.Absorbing(vocab_size=config["V"], mask_id=config["mask_index"])
    trees = ("student", "teacher")
    self.model, self.student, self.teacher = golden_networks.dit(vectors, config, *trees)
    self.xt = jnp.asarray(vectors["xt"], jnp.int32)
    self.times = jnp.asarray(vectors["teacher_time_grid"], jnp.float32)
    before = [self.xt]
    for draw in vectors["teacher_step_draws"]:
      masked = before[-1] == self.process.mask_id
      before.append(jnp.where(masked, jnp.asarray(draw, jnp.int32), before[-1]))
    self.before, self.after = before[:-1], tuple(before[1:])

    self.sigma = jnp.zeros(len(self.xt))
    self.apply = jax.jit(self.model.apply, static_argnames="method")

  @functools.cached_property
  def rollout(self):
    hidden = tuple(
      self.apply({"params": self.teacher}, x, self.sigma, method="trunk") for x in self.before
    )
    chosen = sdtt.chosen_steps(self.after, self.process.mask_id)
    return sdtt.Rollout(hidden, self.times, chosen)


@pytest.fixture(scope="module", params=["a", pytest.param("b", marks=pytest.mark.slow)])
def reference(request):
  path = pathlib.Path(__file__).parents[1] / "golden" / f"sdtt__{request.param}.safetensors"
  with safe_open(path, framework="numpy") as file:
    names = list(file.keys())
    return Recorded(
      {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["config"])
    )


def test_golden_times(reference):
  t, delta = jnp.asarray(reference.vectors["t"]), float(reference.vectors["dt"])
  published = sdtt.teacher_times(t, delta, num=reference.steps, published=True)
  np.testing.assert_allclose(published, reference.vectors["teacher_time_grid"], rtol=1e-5)
  ours = sdtt.teacher_times(t, delta, num=reference.steps)
  for i, row in enumerate(np.asarray(ours)):
    np.testing.assert_allclose(row, np.asarray(t) - i * delta, rtol=1e-6)
  once = sdtt.teacher_times(t, delta, num=1, published=True)
  np.testing.assert_array_equal(once.shape, (1, len(t)))


def test_golden_teacher_steps(reference):
  """Reveal probabilities and tokens of every step multiply to the recorded weights."""
  mask, delta = reference.process.mask_id, float(reference.vectors["dt"])
  np.testing.assert_array_equal(reference.after[-1], reference.vectors["teacher_final_tokens"])
  for i, x in enumerate(reference.before):
    t = reference.times[i]
    reveal = jax.vmap(reference.process.reveal_probability)(t - delta, t)[:, None, None]
    logits = reference.apply({"params": reference.teacher}, x, reference.sigma)
    p = jnp.exp(jax.vmap(reference.process.log_x0)(logits, x))
    ours = reveal * p + (1 - reveal) * (jnp.arange(p.shape[-1]) == mask)[None, None]
    weights = reference.vectors["teacher_step_probs"][i]
    weights = weights / weights.sum(-1, keepdims=True)
    masked = np.asarray(x == mask)
    np.testing.assert_allclose(np.asarray(ours)[masked], weights[masked], atol=2e-5)


def test_golden_targets(reference):
  steps, masked = reference.rollout, reference.vectors["loss_mask"]
  target = jax.jit(sdtt.target, static_argnames="setting")
  ours = target(
    reference.teacher,
    steps.hidden,
    steps.times,
    steps.chosen,
    reference.xt,
    setting=Setting(model=reference.model, process=reference.process),
  )
  wanted = reference.vectors[TARGETS]
  possible = np.arange(wanted.shape[-1]) != reference.process.mask_id
  np.testing.assert_array_equal(masked, reference.xt == reference.process.mask_id)
  recorded.close(np.asarray(ours)[masked][:, possible], wanted[masked][:, possible], 2e-5)


_position_loss = jax.jit(sdtt.position_loss, static_argnames=("setting", "divergence"))


@pytest.mark.parametrize(
  "kind",
  [
    "kl-bwd",
    *(pytest.param(k, marks=pytest.mark.slow) for k in rounds.DIVERGENCES if k != "kl-bwd"),
  ],
)
def test_golden_loss(reference, kind):
  masked = reference.vectors["loss_mask"]
  batch = {"xt": reference.xt, "t": jnp.asarray(reference.vectors["t"])}
  for chunk in (None, 4):
    each = _position_loss(
      reference.student,
      batch,
      reference.rollout,
      teacher=reference.teacher,
      setting=Setting(model=reference.model, process=reference.process, chunk=chunk),
      divergence=kind,
    )
    assert not np.any(np.asarray(each)[~masked])
    value = each.sum() / masked.sum()
    wanted = reference.vectors[f"loss/{kind}_f64"]
    np.testing.assert_allclose(value, wanted, rtol=ROUNDING.get(kind, 2e-5))
  rows = (jnp.asarray(reference.vectors[k]) for k in ("student_log_probs", TARGETS))
  each = rounds.divergence(*rows, kind)
  np.testing.assert_allclose(np.asarray(each)[masked].mean(), wanted, rtol=1e-5)
  with jax.enable_x64(True):
    rows = (jnp.asarray(reference.vectors[k], jnp.float64) for k in ("student_log_probs", TARGETS))
    each = rounds.divergence(*rows, kind)
  np.testing.assert_allclose(np.asarray(each)[masked].mean(), wanted, rtol=1e-9)


@every_kind
def test_no_gradient_where_student_equals_teacher(kind):
  """Every run starts there: |x| has the derivative 0 at 0, as the reference's has."""
  log_p = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (6,)))

  def loss(logits):
    return rounds.divergence(jax.nn.log_softmax(logits), log_p, kind)

  value, gradient = jax.value_and_grad(loss)(log_p)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


@every_kind
def test_golden_gradient(reference, kind):
  targets = jnp.asarray(reference.vectors[TARGETS])
  masked = jnp.asarray(reference.vectors["loss_mask"])

  def mean(logits):
    log_student = jax.vmap(reference.process.log_x0)(logits, reference.xt)
    each = rounds.divergence(log_student, targets, kind)
    return jnp.where(masked, each, 0.0).sum() / masked.sum()

  logits = reference.model.apply(
    {"params": reference.student}, reference.xt, jnp.zeros(len(reference.xt))
  )
  gradient, wanted = (
    jax.grad(mean)(logits),
    reference.vectors[f"grad_loss_wrt_student_logits/{kind}"],
  )
  possible = np.arange(wanted.shape[-1]) != reference.process.mask_id
  recorded.close(
    np.asarray(gradient)[..., possible], wanted[..., possible], ROUNDING.get(kind, 2e-5)
  )
  # From the recorded log-probabilities, so with their rounding near −1e6: the mask's column too.
  log_student = jnp.asarray(reference.vectors["student_log_probs"])
  mean = lambda rows: rounds.divergence(rows, targets, kind)[masked].mean()  # noqa: E731
  of_rows = jax.grad(mean)(log_student)
  through_softmax = of_rows - jnp.exp(log_student) * of_rows.sum(-1, keepdims=True)
  through_softmax = jnp.where(masked[..., None], through_softmax, 0.0)
  recorded.close(through_softmax, wanted, 2e-5)


# --- the teacher's steps ------------------------------------------------------------------------


def test_chosen_steps():
  states = ([1, M, M, M], [1, 2, M, M], [1, 2, 3, M])
  chosen = sdtt.chosen_steps(tuple(jnp.asarray([x]) for x in states), M)
  np.testing.assert_array_equal(chosen, [[0, 1, 2, 2]])


@functools.partial(jax.jit, static_argnames=("chunk",))
def _rollout(params, xt, times, delta, rng, chunk=None):
  model, _ = tiny.network()
  setting = Setting(model=model, process=tiny.PROCESS, chunk=chunk)
  return sdtt.rollout(params, xt, times, delta, rng, setting=setting)


@pytest.mark.slow
def test_a_step_reveals_its_share():
  """δ/t of the masks in the first step, δ/(t − δ) of the rest in the second."""
  size, t, delta = 2048, 0.8, 0.2
  _, params = tiny.network()
  xt = jnp.full((size, tiny.L), M)
  times = sdtt.teacher_times(jnp.full(size, t), delta, num=3)
  rng = jax.random.split(jax.random.key(0), size)
  steps = _rollout(params, xt, times, delta, rng)
  share = [np.mean(np.asarray(steps.chosen) == i) for i in range(3)]
  np.testing.assert_allclose(share, [0.25, 0.25, 0.5], atol=4 * 0.5 / np.sqrt(size * tiny.L))
  chunked = _rollout(params, xt, times, delta, rng, chunk=2)
  np.testing.assert_array_equal(steps.chosen, chunked.chosen)


def test_steps_past_the_data_stay_finite():
  """Where t < num·δ the last steps have nothing to reveal."""
  _, params = tiny.network()
  xt = jnp.full((4, tiny.L), M)
  times = sdtt.teacher_times(jnp.asarray([1e-5, 0.01, 0.1, 1.0]), 0.125, num=2)
  rng = jax.random.split(jax.random.key(0), 4)
  steps = _rollout(params, xt, times, 0.125, rng)
  assert all(np.all(np.isfinite(x)) for x in steps.hidden)
  assert np.asarray(steps.times).min() >= np.float32(1e-5)
  np.testing.assert_array_equal(steps.chosen[2], 0)  # everything in one step


# --- the loss -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("divergence", "published_times", "chunk"))
def _loss(params, batch, teacher, chunk=None, **options):
  model, _ = tiny.network(dropout=0.0)
  batch = sdtt.corrupt(batch, process=tiny.PROCESS)
  setting = Setting(model=model, process=tiny.PROCESS, chunk=chunk)
  given = {"teacher": teacher, "delta": 0.125, "options": sdtt.Options(**options)}
  return jax.value_and_grad(sdtt.loss, has_aux=True)(params, batch, setting=setting, **given)


def _run(batch, **options):
  _, params = tiny.network(dropout=0.0)
  return _loss(params, batch, tiny.random_params(params, seed=3), **options)


def test_corrupted_batch():
  batch = tiny.batch()
  ours = sdtt.corrupt(batch, process=tiny.PROCESS)
  np.testing.assert_allclose(
    (np.asarray(ours["t"]) - 1e-5) / (1 - 1e-5),
    (np.asarray(batch["t"]) - 1e-3) / (1 - 1e-3),
    atol=1e-6,
  )
  masked = np.asarray(ours["xt"] == M)
  np.testing.assert_array_equal(np.asarray(ours["xt"])[~masked], batch["tokens"][~masked])
  np.testing.assert_allclose(ours["weight"], tiny.B / masked.sum(), rtol=1e-6)
  assert not np.any(jax.random.key_data(ours["rng"]) == jax.random.key_data(batch["rng"]))
  nothing = tiny.batch(valid=jnp.zeros((tiny.B, tiny.L), bool))
  np.testing.assert_array_equal(
    sdtt.corrupt(nothing, process=tiny.PROCESS)["xt"], nothing["tokens"]
  )
  assert _run(nothing)[0][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [{}, {"divergence": "mse", "published_times": True}],
  ids=str,
)
def test_chunks_change_nothing(options):
  whole, wanted = _run(tiny.batch(), **options)
  value, gradient = _run(tiny.batch(), chunk=2, **options)
  np.testing.assert_allclose(value[0], whole[0], rtol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradient, wanted
  )


# --- rounds -------------------------------------------------------------------------------------


def test_steps_double_until_few_are_left():
  growth = [
    float(rounds.doubled(jnp.asarray(n, jnp.int32), 10, 1024 / 8)) for n in range(0, 120, 5)
  ]
  assert growth[:6] == [1, 1, 2, 2, 4, 4]
  assert growth[14] == growth[-1] == 128


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"divergence": "js"}, "use one of kl-bwd, kl-fwd, mse, tvd"),
    ({"num_distill_steps": 0}, "at least 1"),
    ({"min_num_steps": 2048}, "must lie between"),
    ({"chunk": 3}, "does not divide"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    tiny.distillation(sdtt, **options)
