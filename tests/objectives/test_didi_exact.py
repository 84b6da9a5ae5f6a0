# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct by enumeration (three tokens and a mask, length 2): gradient, score, reward."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.models import DiT, DiTConfig
from dlm_jax.objectives import didi_instruct
from dlm_jax.objectives.didi_instruct.options import Options
from dlm_jax.objectives.didi_instruct.rollout import Path, rollout
from dlm_jax.objectives.setting import Setting
from dlm_jax.process import Absorbing

V, L, MASK, T = 4, 2, 3, 0.45
PROCESS = Absorbing(vocab_size=V, mask_id=MASK)
STATES = np.array(list(itertools.product(range(V), repeat=L)), np.int32)
CLEAN = STATES[np.all(STATES != MASK, axis=1)]


class Table(DiT):
  """Logits looked up by the whole sequence."""

  def setup(self):
    self.logits = self.param("logits", jax.nn.initializers.normal(1.0), (V**L, L, V))

  def trunk(self, tokens, sigma_B, rng_B=None, noise_BLN=None):
    return self.logits[tokens @ V ** jnp.arange(L)[::-1]]

  def head(self, hidden_BKD, sigma_B):
    return hidden_BKD


MODEL = Table(
  DiTConfig(vocab_size=V, dim=4, cond_dim=4, layers=1, heads=1, length=L, dtype="float32")
)
SETTING = Setting(model=MODEL, process=PROCESS)
TEACHER, STUDENT = (
  MODEL.init(jax.random.key(seed), jnp.zeros((1, L), jnp.int32), jnp.zeros(1))["params"]
  for seed in (1, 2)
)


def _paths(two_steps):
  """Return all paths from masks to clean text."""
  if not two_steps:
    return Path(np.full_like(CLEAN, MASK), CLEAN)
  pairs = [(z, x) for z in STATES for x in CLEAN if np.all((z == MASK) | (z == x))]
  return Path(*(np.array(part) for part in zip(*pairs, strict=True)))


def _batch(size):
  return {
    "tokens": jnp.zeros((size, L), jnp.int32),
    "rng": jax.random.split(jax.random.key(0), size),
    "t_mid": jnp.full((size,), T, jnp.float32),
    "t": jnp.full((size,), T, jnp.float32),
  }


def _log_prob(params, path, two_steps):
  """Return the score's log-probabilities of the tokens of every path."""
  path = Path(*map(jnp.asarray, path))
  terms, _ = rollout(
    params,
    _batch(len(path.x0)),
    setting=SETTING,
    options=Options(score_decomposition=two_steps, t0=0.0),
    teacher=TEACHER,
    path=path,
  )
  return terms.log_prob


def _law(params, two_steps):
  """Return P(path), float32 and differentiable: tokens by the network, reveals by the schedule."""
  path = _paths(two_steps)
  log_p = _log_prob(params, path, two_steps)
  if two_steps:
    reveal = PROCESS.reveal_probability(jnp.float32(T), jnp.float32(1.0))
    masks = (path.z == MASK).sum(1)
    log_p += masks * jnp.log(1 - reveal) + (L - masks) * jnp.log(reveal)
  return jnp.exp(log_p)


def _noised(law_paths, path):
  """Return q(z, t) over STATES of x₀'s law: the forward process applied to both positions."""
  alpha = PROCESS.schedule.alpha(jnp.float32(T))
  to = [[(1 - alpha) if z == MASK else alpha * (z == x) for z in range(V)] for x in range(V)]
  rows = jnp.stack([jnp.stack([jnp.asarray(c, jnp.float32) for c in row]) for row in to])
  q_PS = jnp.prod(rows[path.x0[:, None, :], STATES[None, :, :]], axis=-1)
  return law_paths @ q_PS, q_PS


@pytest.fixture(
  scope="module",
  params=[True, pytest.param(False, marks=pytest.mark.slow)],
  ids=["two steps", "one step"],
)
def two_steps(request):
  return request.param


@pytest.mark.slow
def test_paths_sum_to_one(two_steps):
  np.testing.assert_allclose(_law(STUDENT, two_steps).sum(), 1, rtol=1e-5)


@pytest.mark.slow
def test_the_mean_of_the_estimator_is_the_gradient_of_the_divergence(two_steps):
  """Exact rewards, any baseline: policy_loss has the gradient of ω KL(q_ν(·, t) ‖ q_θ(·, t))."""
  path = _paths(two_steps)
  q_teacher, _ = _noised(_law(TEACHER, two_steps), path)

  def divergence(params):
    q_student, _ = _noised(_law(params, two_steps), path)
    return jnp.sum(q_student * (jnp.log(q_student) - jnp.log(q_teacher)))

  wanted = jax.grad(divergence)(STUDENT)
  law = _law(STUDENT, two_steps)
  q_student, q_PS = _noised(law, path)
  expected_reward = q_PS @ (jnp.log(q_teacher) - jnp.log(q_student))
  for baseline in (0.0, 3.0):
    batch = {"weight": len(law) * law, "advantage": expected_reward - baseline}

    def policy(params, batch=batch):
      terms = rollout(
        params,
        _batch(len(law)),
        setting=SETTING,
        options=Options(score_decomposition=two_steps, t0=0.0),
        teacher=TEACHER,
        path=Path(*map(jnp.asarray, path)),
      )[0]
      return didi_instruct.policy_loss(terms, batch, Options())[0]

    ours = jax.grad(policy)(STUDENT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), ours, wanted)
  assert np.abs(wanted["logits"]).max() > 0.01


@pytest.mark.parametrize("order", [pytest.param("random", marks=pytest.mark.slow), "spaced"])
def test_drawn_paths_follow_their_law(order):
  """A rollout draws what it scores, and the score of a replay is that of the draw."""
  count = 60_000
  options = Options(t0=0.0, order=order)
  run = jax.jit(functools.partial(rollout, setting=SETTING, options=options, teacher=TEACHER))
  terms, path = run(STUDENT, _batch(count))
  replay, _ = run(STUDENT, _batch(count), path=path)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), terms, replay)
  every = _paths(True)
  code = lambda path: np.concatenate(path, axis=1) @ V ** np.arange(2 * L)  # noqa: E731
  place = {int(c): i for i, c in enumerate(code(every))}
  counts = np.bincount([place[int(c)] for c in code(Path(*map(np.asarray, path)))], minlength=36)
  law = np.asarray(_law(STUDENT, True), np.float64)
  if order == "spaced":  # of two positions one is masked, or none: 2 (1 − α) = 0.9 are
    masks, share = (every.z == MASK).sum(1), T * (1 - 1e-3)
    independent = (share**masks) * (1 - share) ** (L - masks)
    law *= np.array([1 - L * share, share, 0])[masks] / independent
  expected = count * law / law.sum()
  possible = expected > 0
  assert not np.any(counts[~possible])
  chi_square = np.sum((counts - expected)[possible] ** 2 / expected[possible])
  assert chi_square < 90, "35 degrees of freedom: beyond 90 has probability 1e-6"


class Logits:
  """A discriminator without structure: a logit for every state and position."""

  def apply(self, variables, tokens, sigma_B, rng_B=None, **options):
    logits = variables["params"][tokens @ V ** jnp.arange(L)[::-1]]
    return (logits, {"spectral": {}}) if "mutable" in options else logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_best_discriminator_is_the_reward(smoothing):
  """Its logit at every masked position is the sequence's log ratio of teacher to student.

  Smoothed labels squash the ratio r to ((1 − s) r + s)/(r + 1) but keep its sign and order.
  """
  path = _paths(True)
  q_real, q_fake = (_noised(_law(p, True), path)[0] for p in (TEACHER, STUDENT))
  states = jnp.asarray(STATES)
  batch = _batch(len(states)) | {
    "real": states,
    "fake": states,
    "real_weight": len(states) * q_real,
    "fake_weight": len(states) * q_fake,
  }
  plain = didi_instruct.discriminator_loss
  plain = getattr(plain, "__wrapped__", plain)  # past the tests' own type checks
  loss = functools.partial(
    plain,
    batch=batch,
    model=Logits(),
    spectral={},
    process=PROCESS,
    smoothing=smoothing,
  )
  gradient = jax.jit(jax.grad(lambda logits: loss(logits)[0]))
  logits = jnp.zeros((V**L, L))
  for _ in range(4000):
    logits -= 8.0 * gradient(logits)
  ratio = np.asarray(q_real / q_fake)
  wanted = ((1 - smoothing) * ratio + smoothing) / (ratio + 1)
  masked = STATES == MASK
  found = np.asarray(jax.nn.sigmoid(logits))
  np.testing.assert_allclose(found[masked], np.stack([wanted] * L, 1)[masked], atol=2e-3)

  critic = lambda tokens, sigma: Logits().apply({"params": logits}, tokens, sigma)  # noqa: E731
  rewards = np.asarray(didi_instruct.reward(critic, batch, PROCESS))
  exact = np.log(ratio)
  some = masked.any(1) & (np.abs(exact) > 0.02)
  assert np.all(np.sign(rewards[some]) == np.sign(exact[some]))
  assert np.all(rewards[~masked.any(1)] == 0)
  if smoothing == 0:
    np.testing.assert_allclose(rewards[masked.any(1)], exact[masked.any(1)], atol=0.02)
