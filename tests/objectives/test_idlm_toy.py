# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation on a law small enough to enumerate, from an exact teacher.

Three binary tokens that nearly always agree. Drawn at once from the teacher's marginals they often
disagree. Laws are enumerated, not sampled: in total variation to the data, the distilled student
must come closer than the teacher, and move away if its updates have the wrong sign.

Two laws are followed: p_θ of the theorem, one prediction from really corrupted data, and that of
a sampler that takes few ancestral steps from noise. The masked student has nothing but masks to
begin from, so one product of marginals: it gives up the rarer of the two sequences, whose mass is
most of the distance that is left, and with four steps the teacher is the closer one again. A
uniform student tells noise from noise and does better.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dlm_jax.models import DiT
from dlm_jax.objectives import draw_batch, idlm
from dlm_jax.objectives.state import output_params
from dlm_jax.process import Absorbing, GaussianDuality, Uniform

L, TOKENS, MASK = 3, 2, 2
WINDOW = {"gamma_min": -3.0, "gamma_max": 4.0}  # of the Gaussian: α from 0.998 down to 0.08
TAU = 0.1  # of the soft input: nearly hard, and path gradients have little variance
STEPS, BATCH = 400, 256
KNOTS = 9  # of the soft table, over α


def states(vocab_size):
  """Return all sequences, [V^L, L], ordered by their code."""
  return np.array(list(itertools.product(range(vocab_size), repeat=L)), np.int32)


def data_law(vocab_size):
  """Return p_data over all sequences: three equal tokens 0.76 and 0.16, any 0.01 more."""
  tokens = states(vocab_size)
  law = 0.01 * np.all(tokens < TOKENS, axis=1)
  for token, mass in enumerate((0.76, 0.16)):
    law[np.all(tokens == token, axis=1)] += mass
  np.testing.assert_allclose(law.sum(), 1)
  return law


def joint(rows_SLV):
  """Return the law over all sequences, [S, V^L], of independent positions."""
  tokens = states(rows_SLV.shape[-1])
  return np.prod([rows_SLV[:, l, tokens[:, l]] for l in range(L)], axis=0)


def distance(left, right):
  """Return the total variation distance."""
  return np.abs(left - right).sum() / 2


# --- networks: tables over all states, exact at the start ----------------------------------------


class Hard(DiT):
  """Logits looked up by the whole masked state; the exact posterior has no time in it."""

  def setup(self):
    shape = (self.config.vocab_size**L, L, self.config.vocab_size)
    self.logits = self.param("logits", jax.nn.initializers.zeros, shape)

  def trunk(self, tokens, sigma_B, rng_B=None):
    return self.logits[tokens @ self.config.vocab_size ** jnp.arange(L)[::-1]]

  def head(self, hidden_BKD, sigma_B):
    return hidden_BKD


class Soft(DiT):
  """The exact denoiser of a uniform process plus a table over (α, state); embeds by one-hot.

  A soft input is a product of its positions' rows: likelihoods and the table's weights are
  multilinear in it, so gradients pass.

  The loss is least at the posterior given the other positions' tokens, not the own: in xₜ the ratio
  of two tokens at l is that of α f + (1 − α)/V with f = p(x₀ˡ | the rest of xₜ).
  """

  def setup(self):
    vocab_size = self.config.vocab_size
    shape = (KNOTS, vocab_size**L, L, vocab_size)
    self.correction = self.param("correction", jax.nn.initializers.zeros, shape)

  def embedded(self, tokens):
    if jnp.issubdtype(tokens.dtype, jnp.integer):
      return jax.nn.one_hot(tokens, self.config.vocab_size)
    return jax.nn.softmax(tokens, axis=-1)

  def body(self, x_BLD, sigma_B, rng_B=None):
    vocab_size, tokens_SL = self.config.vocab_size, states(self.config.vocab_size)
    alpha_B = jnp.exp(-sigma_B)
    pick = lambda rows_BLV: rows_BLV[:, jnp.arange(L), tokens_SL]  # noqa: E731  [B, S, L]

    alpha_B11 = alpha_B[:, None, None]
    likelihood_BSL = pick(alpha_B11 * x_BLD + (1 - alpha_B11) / vocab_size)
    others_BSL = jnp.stack(
      [jnp.prod(jnp.delete(likelihood_BSL, l, axis=2), axis=2) for l in range(L)], axis=2
    )
    law_S = data_law(vocab_size)
    logits_BLV = jnp.log(
      jnp.einsum("s,bsl,slv->blv", law_S, others_BSL, np.eye(vocab_size)[tokens_SL])
    )

    weights_BS = jnp.prod(pick(x_BLD), axis=-1)
    place_BT = (KNOTS - 1) * alpha_B[:, None] - jnp.arange(KNOTS)[None]
    hat_BT = jnp.maximum(1 - jnp.abs(place_BT), 0)  # piecewise linear in α
    return logits_BLV + jnp.einsum("bt,bs,tslv->blv", hat_BT, weights_BS, self.correction)

  def head(self, hidden_BKD, sigma_B):
    return hidden_BKD

  def trunk(self, tokens, sigma_B, rng_B=None):
    return self.body(self.embedded(tokens), sigma_B, rng_B)


class Toy:
  """A process, its network, the exact teacher, and exact laws of any parameters."""

  def __init__(self, name):
    absorbing = name == "absorbing"
    size = TOKENS + absorbing
    shape = {"vocab_size": size, "dim": 4, "layers": 1, "heads": 1, "length": L}
    options = tiny.config(**shape, time_conditioning=not absorbing)
    self.size, self.data, self.states = size, data_law(size), states(size)
    self.model = (Hard if absorbing else Soft)(options)
    self.process = (
      Absorbing(vocab_size=size, mask_id=MASK) if absorbing else Uniform(vocab_size=size)
    )
    # The losses run in the times of the Gaussian's window.
    self.window = self.process if absorbing else GaussianDuality(vocab_size=size, **WINDOW).process
    self.noise = np.eye(size)[MASK] if absorbing else np.full(size, 1 / size)
    zeros = self.model.init(jax.random.key(0), jnp.asarray(self.states[:1]), jnp.zeros(1))
    self.teacher = {"logits": self.marginals()} if absorbing else zeros["params"]

  def marginals(self):
    """Return log p(x₀ | xₜ) of every masked state: of data that agrees with what is revealed."""
    hidden, given = self.states == MASK, self.states
    agree = np.all(hidden[:, None] | (given[:, None] == given[None]), axis=-1)
    weights = agree * self.data
    rows = np.einsum("sx,xlv->slv", weights, np.eye(self.size)[self.states])
    with np.errstate(divide="ignore"):
      logits = np.log(rows / weights.sum(1)[:, None, None])
    return jnp.asarray(np.maximum(logits, -30), jnp.float32)

  def corrupted(self, t):
    """Return p(xₜ | x₀), [V^L, V^L]."""
    alpha = float(self.window.schedule.alpha(t))
    return joint(alpha * np.eye(self.size)[self.states] + (1 - alpha) * self.noise)

  @functools.cached_property
  def _predict(self):
    @jax.jit
    def predict(params, sigma):
      sigma_S = jnp.full(len(self.states), sigma, jnp.float32)
      logits = self.model.apply({"params": params}, jnp.asarray(self.states), sigma_S)
      return jax.vmap(self.process.log_x0)(logits, jnp.asarray(self.states))

    return predict

  def few_step_law(self, params, steps):
    """Return the law after K ancestral steps from noise to data."""
    law = joint(np.tile(self.noise, (1, L, 1)))[0]
    posterior = jax.vmap(self.process.posterior, (0, 0, None, None))
    for t, s in itertools.pairwise(np.linspace(1, 0, steps + 1)):
      log_x0 = self._predict(params, float(self.process.schedule.sigma(t)))
      rows = posterior(log_x0, jnp.asarray(self.states), s, t)
      law = law @ joint(np.asarray(rows, np.float64))
    return law / law.sum()

  def one_shot_law(self, params, count=40):
    """Return p_θ of the theorem: predictions from really corrupted data, over all times."""
    law = 0
    for t in (np.arange(count) + 0.5) / count:
      log_x0 = self._predict(params, float(self.window.schedule.sigma(t)))
      rows = np.exp(np.asarray(log_x0, np.float64))
      law = law + self.data @ self.corrupted(t) @ joint(rows) / count
    return law / law.sum()

  def distances(self, params):
    """Return total variation to the data: of p_θ, and of the sampler with 1 and 2 steps."""
    values = {"p_θ": distance(self.one_shot_law(params), self.data)}
    for steps in (1, 2):
      values[f"{steps}-step"] = distance(self.few_step_law(params, steps), self.data)
    return values

  @functools.cached_property
  def train(self):
    """Return a function of (sign of the student's updates, key): the student's average."""
    window = {} if isinstance(self.process, Absorbing) else {**WINDOW, "tau": TAU}
    tokens, log_data = jnp.asarray(self.states), jnp.log(jnp.asarray(self.data, jnp.float32))

    def batch(rng):
      rng_tokens, rng = jax.random.split(rng)
      drawn = tokens[jax.random.categorical(rng_tokens, log_data, shape=(BATCH,))]
      return draw_batch({"tokens": drawn}, rng)

    @jax.jit
    def train(sign, rng):
      student = optax.chain(optax.adam(1e-2), optax.scale(sign))
      objective = idlm.make(
        model=self.model,
        process=self.process,
        time_coupling="permuted",
        ema_decay=0.98,
        optimizers={"student": student, "fake": optax.adam(3e-2, b1=0.5)},
        **window,
      )

      def step(state, rng):
        return objective.step(state, tuple(map(batch, jax.random.split(rng))))[0], None

      state = objective.init(rng, self.teacher)
      state, _ = jax.lax.scan(step, state, jax.random.split(rng, STEPS))
      return output_params(state, objective)

    return train


# --- what distillation does ----------------------------------------------------------------------


@pytest.fixture(
  scope="module", params=["absorbing", pytest.param("uniform", marks=pytest.mark.slow)]
)
def toy(request):
  return Toy(request.param)


def _report(title, before, after):
  changes = ", ".join(f"{k} {before[k]:.3f} → {after[k]:.3f}" for k in before)
  print(f"\n{title}, total variation to the data: {changes}")


def test_teacher_is_exact(toy):
  """The teacher's loss is least at it, many steps reach the data, and few do not."""
  tokens = jnp.asarray(toy.states)
  nll = jax.vmap(jax.vmap(toy.window.nll, (None, None, 0, None)), (0, 0, None, None))

  @jax.jit
  @jax.grad
  def gradient(logits_SLV, weights, t):  # of the expected loss
    log_estimate = jax.vmap(toy.window.log_estimate)(logits_SLV, tokens)
    return jnp.sum(weights[..., None] * nll(log_estimate, tokens, tokens, t))

  for t in (0.3, 0.7):
    weights = jnp.asarray((toy.data[:, None] * toy.corrupted(t)).T, jnp.float32)
    sigma_S = jnp.full(len(tokens), toy.window.schedule.sigma(t))
    logits = toy.model.apply({"params": toy.teacher}, tokens, sigma_S)
    at, near = (gradient(scale * logits, weights, t) for scale in (1.0, 0.9))
    assert jnp.abs(at).max() < 0.01 * jnp.abs(near).max()

  assert distance(toy.few_step_law(toy.teacher, 64), toy.data) < 0.01
  assert distance(toy.few_step_law(toy.teacher, 1), toy.data) > 0.4


@pytest.mark.slow
def test_student_approaches_the_data(toy):
  before = toy.distances(toy.teacher)
  after = toy.distances(toy.train(1.0, jax.random.key(0)))
  _report(type(toy.process).__name__, before, after)
  assert after["p_θ"] < 0.6 * before["p_θ"]
  assert after["1-step"] < 0.6 * before["1-step"]
  assert after["2-step"] < 0.8 * before["2-step"]


@pytest.mark.slow
def test_wrong_sign_diverges(toy):
  before = toy.distances(toy.teacher)
  after = toy.distances(toy.train(-1.0, jax.random.key(0)))
  _report(f"{type(toy.process).__name__}, wrong sign", before, after)
  assert all(after[k] > before[k] + 0.25 for k in before)
