# SPDX-License-Identifier: Apache-2.0
"""Blocked ids: in the vocabulary, never predicted, never drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import convert, models, process, sample, schedules
from dlm_jax.convert.families import dit
from dlm_jax.errors import InputError

V, MASK, BLOCKED = 7, 5, (0, 3)
OPTIONS = {"vocab_size": V, "mask_id": MASK, "schedule": schedules.LogLinear()}
PROCESSES = [process.Absorbing, process.AbsorbingScore]
X = jnp.array([0, 5, 2, 5])  # start, mask, token, mask


def _logits():
  return jnp.asarray(np.random.default_rng(0).normal(size=(4, V)) * 3, jnp.float32)


@pytest.mark.parametrize("kind", PROCESSES)
def test_no_prediction_holds_a_blocked_id(kind):
  logits = _logits().at[:, 0].set(30.0)  # what the network would like best
  proc = kind(**OPTIONS, blocked=BLOCKED)
  probs = np.exp(proc.log_x0(logits, X))
  masked = probs[[1, 3]]
  assert (masked[:, [0, 3, 5]] == 0).all()
  kept = [1, 2, 4, 6]
  np.testing.assert_allclose(
    masked[:, kept], jax.nn.softmax(logits[jnp.array([1, 3])][:, kept]), rtol=1e-5
  )
  # where a blocked id is given it stays
  np.testing.assert_array_equal(probs[0], jax.nn.one_hot(0, V))
  np.testing.assert_array_equal(proc.impossible(jnp.arange(V)), [1, 0, 0, 1, 0, 1, 0])


@pytest.mark.parametrize("kind", PROCESSES)
def test_losses_and_gradients_are_finite(kind):
  proc = kind(**OPTIONS, blocked=BLOCKED)
  p0 = jax.nn.softmax(_logits().at[:, jnp.array([0, 3, 5])].set(-jnp.inf))

  def loss(logits):
    log_x0 = proc.log_estimate(logits, X)
    return (
      proc.nll_soft(log_x0, X, p0, 0.4) + proc.nll(log_x0, X, jnp.array([0, 1, 2, 6]), 0.4)
    ).sum()

  value, gradient = jax.jit(jax.value_and_grad(loss))(_logits())
  assert np.isfinite(value) and np.isfinite(gradient).all()
  assert (np.asarray(gradient)[:, [0, 3, 5]] == 0).all() and np.abs(gradient).max() > 0.1


def test_a_score_network_of_zeros_is_uniform_over_what_may_be_predicted():
  proc = process.AbsorbingScore(**OPTIONS, blocked=BLOCKED)
  f = np.exp(proc.log_estimate(jnp.zeros((4, V)), X))
  np.testing.assert_allclose(f[1], [0, 1 / 4, 1 / 4, 0, 1 / 4, 0, 1 / 4], rtol=1e-6)


@pytest.mark.parametrize("kind", PROCESSES)
def test_nothing_blocked_is_what_it_was(kind):
  plain, empty = kind(**OPTIONS), kind(**OPTIONS, blocked=())
  assert plain == empty and hash(plain) == hash(empty) and plain.blocked == ()
  logits = np.asarray(_logits())
  masked = logits.copy()
  masked[:, MASK] += np.float32(-1e6)
  expected = np.asarray(jax.nn.log_softmax(jnp.asarray(masked), axis=-1))
  np.testing.assert_array_equal(np.asarray(plain.log_x0(_logits(), X))[[1, 3]], expected[[1, 3]])


@pytest.mark.parametrize("blocked", [(7,), (-1,), (5,)])
def test_wrong_ids(blocked):
  with pytest.raises(ValueError, match=r"blocked=\[-?\d\] must be ids of the vocabulary of 7"):
    process.Absorbing(**OPTIONS, blocked=blocked)


def test_something_must_be_left():
  with pytest.raises(ValueError, match="leaves no token to predict"):
    process.Absorbing(**OPTIONS, blocked=(0, 1, 2, 3, 4, 6))


class _Denoiser:
  """Prefers blocked ids by far."""

  def trunk(self, tokens, sigma_B):
    return jnp.zeros((*tokens.shape, 1))

  def head(self, hidden, sigma_B):
    logits = jnp.zeros(V).at[jnp.array(BLOCKED)].set(20.0)
    return jnp.broadcast_to(logits, (*hidden.shape[:2], V))

  def __call__(self, tokens, sigma_B):
    return self.head(self.trunk(tokens, sigma_B), sigma_B)


@pytest.mark.first_case
@pytest.mark.parametrize(
  "kind, options",
  [
    (process.Absorbing, {}),
    (process.Absorbing, {"noise_removal": "greedy"}),
    (process.Absorbing, {"sampler": "first_hitting"}),
    (process.Absorbing, {"sampler": "psi", "kappa": 0.5}),
    (process.Absorbing, {"precision": "legacy"}),
    (process.AbsorbingScore, {}),
    (process.AbsorbingScore, {"sampler": "analytic"}),
  ],
)
def test_no_sampler_draws_one_and_given_ones_stay(kind, options):
  proc = kind(**OPTIONS, blocked=BLOCKED)
  prompt = jnp.array([0, 5, 5, 5, 5, 3, 0, 0])
  shape = {"batch": 64, "length": 8, "steps": 3}
  generate = lambda rng: sample.generate(  # noqa: E731
    _Denoiser(), proc, rng, prompt=prompt, **shape, **options
  )
  tokens = np.asarray(jax.jit(generate)(jax.random.key(0)))
  np.testing.assert_array_equal(tokens[:, [0, 5, 6, 7]], [[0, 3, 0, 0]] * 64)
  assert set(np.unique(tokens[:, 1:5])) <= {1, 2, 4, 6}
  if options.get("noise_removal") != "greedy":
    assert len(np.unique(tokens[:, 1:5])) == 4


@pytest.mark.parametrize("kind", PROCESSES)
def test_checkpoints_keep_them(kind, tmp_path):
  model = models.DiT(models.DiTConfig(vocab_size=V, dim=8, cond_dim=4, heads=2, layers=1, length=8))
  inputs = (jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.zeros(1))
  shapes = jax.eval_shape(model.init, *inputs)["params"]
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  for blocked in (BLOCKED, ()):
    proc = kind(**OPTIONS, blocked=blocked)
    convert.save(tmp_path / str(len(blocked)), model, params, proc)
    assert convert.load(tmp_path / str(len(blocked)))[2] == proc
  stored = convert.read_config(tmp_path / "0")["dlm_jax"]["process"]
  assert "blocked" not in stored  # as before there was such a field
  config = dit.describe(model, kind(**OPTIONS, blocked=BLOCKED))
  config["dlm_jax"]["process"]["blocked"] = [99]
  with pytest.raises(InputError, match=r"process: blocked\[0\]=99 must be at most 6"):
    dit.read(tmp_path, config, {})
