# SPDX-License-Identifier: Apache-2.0
"""Reward-guided sampling: recorded steps, its law by enumeration, cost, prompts and keys."""

import functools

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dlm_jax import draw, process, sample, schedules
from dlm_jax.errors import InputError
from dlm_jax.models import Critic, Denoiser, Discriminator, DiT, DiTConfig
from dlm_jax.sample import _rgas

every_variant = pytest.mark.parametrize("variant", ["a", pytest.param("b", marks=pytest.mark.slow)])


# --- recorded steps -----------------------------------------------------------------------------


class Recorded:
  """One file: networks, state, times."""

  def __init__(self, vectors, config):
    v = self.vectors = vectors
    self.critic = golden_networks.critic(vectors, config)
    self.mask, self.x = config["mask_index"], jnp.asarray(v["x"], jnp.int32)
    self.process = process.Absorbing(vocab_size=config["V"], mask_id=self.mask)
    self.masked, self.sigma = self.x == self.mask, jnp.asarray(v["sigma"])
    t = jnp.asarray(v["t"][:, 0])
    self.alpha_t = self.process.schedule.alpha(t)
    self.alpha_s = self.process.schedule.alpha(t - jnp.float32(v["dt"]))

  def weights(self, logits):
    """Return the published weights of a step: no normalisation, the mask's column overwritten."""
    q = jax.nn.softmax(logits) * (self.alpha_s - self.alpha_t)[:, None, None]
    return q.at[..., self.mask].set(jnp.broadcast_to(1 - self.alpha_s[:, None], q.shape[:2]))


@pytest.fixture(params=["a", pytest.param("b", marks=pytest.mark.slow)])
def recorded(golden, request):
  return Recorded(*golden(f"didi_rgas__{request.param}"))


def _close(ours, wanted, tolerance=2e-5):
  atol = tolerance * max(np.abs(wanted).max(), 1e-12)
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=atol)


def _tilted(critic, logits, x, masked, sigma, h):
  """Return tilted logits and gradients at all positions; the sampler tilts those that are due."""
  slope = _rgas.slope(critic, critic.embedded(logits), x, masked, sigma)
  slope = jnp.where(masked[..., None], slope, 0)
  return _rgas.tilt(critic, logits, slope, h)


@pytest.mark.parametrize("h", [0.2, 30.0])
def test_golden_tilt(recorded, h):
  """From recorded logits, whose softmax includes the mask, as the released student's does."""
  r, v = recorded, recorded.vectors
  logits = jnp.asarray(v["student_raw_logits"])
  soft = jnp.where(r.masked[..., None], logits, 1e9 * jax.nn.one_hot(r.x, logits.shape[-1]))
  scores = r.critic(soft, r.sigma)
  _close(scores, v[f"tilt_h{h}/discriminator_scores_soft"][..., 0])
  _close(jnp.sum(jnp.where(r.masked, scores, 0)), v[f"tilt_h{h}/reward_sum"], 1e-5)
  tilted, gradient = _tilted(r.critic, logits, r.x, r.masked, r.sigma, h)
  _close(gradient, v[f"tilt_h{h}/grad_clipped"])
  masked = np.asarray(r.masked)
  _close(np.asarray(tilted)[masked], v[f"tilt_h{h}/tilted_logits"][masked])
  weights = np.asarray(r.weights(tilted))[masked]
  _close(weights, v[f"tilt_h{h}/q_xs"][masked])
  np.testing.assert_allclose(weights, v[f"tilt_h{h}/q_xs"][masked], rtol=2e-5, atol=1e-7)
  drawn = draw.race(jnp.asarray(v[f"tilt_h{h}/q_xs"]), jnp.asarray(v["tilt/uniform"]))
  np.testing.assert_array_equal(drawn, v[f"tilt_h{h}/draw"])
  np.testing.assert_array_equal(np.where(masked, drawn, r.x), v[f"tilt_h{h}/x_next"])


def test_golden_ranking(recorded):
  """reward="all" is the published one; its draw is a race, ours an inverse CDF."""
  r, v = recorded, recorded.vectors
  candidates = jnp.asarray(v["rerank/candidates"], jnp.int32)
  t_s = r.process.schedule.inverse(jnp.exp(-jnp.asarray(v["rerank/sigma_s"][0])))
  score = jax.jit(lambda x: _guide(r.critic, r.process, x, reward="all").score(x, t_s))
  one = np.stack([score(candidates[:1, m]) for m in range(candidates.shape[1])])
  _close(one[:, 0], v["rerank/rewards"][0])
  times = [r.process.schedule.inverse(jnp.exp(-jnp.asarray(s))) for s in v["rerank/sigma_s"]]
  rows = [
    [_guide(r.critic, r.process, x[None], reward="all").score(x[None], t)[0] for x in row]
    for row, t in zip(candidates, times, strict=True)
  ]
  _close(rows, v["rerank/rewards"])
  probs = jax.nn.softmax(jnp.asarray(v["rerank/rewards"]).T, axis=0)
  _close(probs.T, v["rerank/probs"])
  choice = draw.race(jnp.asarray(v["rerank/probs"]), jnp.asarray(v["rerank/uniform_choice"]))
  np.testing.assert_array_equal(choice, v["rerank/choice"][:, 0])


def _guide(critic, proc, x, **options):
  request = sample.Request(
    denoiser=None,
    process=proc,
    rng_B=jax.random.split(jax.random.key(0), x.shape[0]),
    x_BL=x,
    frozen_BL=jnp.zeros(x.shape, bool),
    steps=1,
  )
  revealer = _rgas.Revealer(denoiser=None, process=proc, capacity=8, truncation=_rgas.GridSampler())
  options = {"reward": "sum", **options}
  return _rgas._Guide(request=request, revealer=revealer, critic=critic, **options)


def test_picks_follow_their_probabilities():
  reward = jnp.log(jnp.array([1.0, 2.0, 5.0]))[:, None] + 3.0
  u = (jnp.arange(800) + 0.5) / 800
  chosen = _rgas.pick(jnp.broadcast_to(reward, (3, 800)), u)
  np.testing.assert_array_equal(np.bincount(chosen), [100, 200, 500])


@every_variant
@pytest.mark.parametrize("steps", [4, 8, 16])
def test_golden_schedule(golden, variant, steps):
  """Times, tilts and numbers of candidates, step by step."""
  vectors, config = golden(f"didi_rgas__{variant}")
  t, _, h, candidates = vectors[f"schedule{steps}/t_dt_h_M"].T
  ratio, count = config["rerank_steps_ratio"], int(candidates[-1])
  split = _rgas.tilted_steps(steps, ratio)
  ends = (config["guidance_scale_start"], config["guidance_scale_end"])
  np.testing.assert_allclose(sample.grids.make("uniform", steps)[:-1], t, rtol=1e-6)
  np.testing.assert_allclose(_rgas.tilts(split, ends), h[:split], rtol=1e-6)
  assert np.all(h[split:] == 0) and np.all(candidates[:split] == 1)
  assert np.all(candidates[split:] == count)
  assert split + _rgas.ranked_steps(steps, count, ratio, "all") == steps


# --- laws ---------------------------------------------------------------------------------------

L, V, SAMPLES = 2, toy.VOCABULARY, 24_576
PROC = process.Absorbing(vocab_size=V, mask_id=toy.MASK)


class Bored:
  """A critic to which all sequences are worth the same."""

  def __call__(self, tokens, sigma_B):
    return self.body(tokens, sigma_B)

  def embedded(self, tokens):
    return jnp.zeros((*tokens.shape[:2], 1))

  def body(self, x, sigma_B):
    return jnp.full(x.shape[:2], 3.0)


class Taste:
  """A critic by formula: its logit at a position depends on that token and its neighbour."""

  def __init__(self, scale):
    self.table = scale * jnp.asarray(np.random.default_rng(0).normal(size=(V, V)), jnp.float32)

  def __call__(self, tokens, sigma_B):
    return self.body(self.embedded(tokens), sigma_B)

  def embedded(self, tokens):
    ids = tokens.ndim == 2
    return jax.nn.one_hot(tokens, V) if ids else jax.nn.softmax(tokens.astype(jnp.float32))

  def body(self, soft, sigma_B):
    return (
      jnp.einsum("blv,vw,blw->bl", soft, self.table, jnp.roll(soft, 1, axis=1)) + sigma_B[:, None]
    )


def _draw(critic, *, proc=PROC, batch=SAMPLES, **options):
  options |= {"sampler": "rgas", "critic": critic}
  run = functools.partial(sample.generate, toy.make(L), proc, batch=batch, length=L, **options)
  return jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(4)))


def _tilted_rows(critic, scale):
  """Return rows of one tilted step: softmax(ℓ + h clip(∂R/∂ℓ)), revealed at the usual pace."""

  def rows(probs, tokens, s, t):
    x = jnp.asarray(tokens)
    sigma = jnp.full(len(x), PROC.schedule.sigma(t))
    logits = jnp.log(jnp.maximum(jnp.asarray(probs, jnp.float32), 1e-30))
    tilted, _ = _tilted(critic, logits, x, x == toy.MASK, sigma, scale)
    tilted = np.asarray(jax.nn.softmax(tilted), np.float64)
    tilted[..., toy.MASK] = 0
    tilted /= tilted.sum(-1, keepdims=True)
    return toy.posterior_rows(PROC)(
      np.where((tokens == toy.MASK)[..., None], tilted, probs), tokens, s, t
    )

  return rows


@pytest.mark.slow
def test_law_of_tilted_steps():
  critic = Taste(2.0)
  tokens = _draw(critic, steps=2, ratio=0.0, h=(3.0, 3.0))
  law = toy.chain_law(toy.make(L), PROC, L, 2, rows=_tilted_rows(critic, 3.0))
  assert toy.p_value(tokens, law) > 1e-4
  assert toy.p_value(tokens, toy.chain_law(toy.make(L), PROC, L, 2)) < 1e-6


def test_without_guidance_it_is_ancestral():
  law = toy.chain_law(toy.make(L), PROC, L, 3)
  for options in ({"ratio": 0.0, "h": (0.0, 0.0)}, {"ratio": 1.0, "candidates": 1}):
    assert toy.p_value(_draw(Taste(2.0), steps=3, **options), law) > 1e-4


def test_a_ramp_of_tilts_is_applied_in_order():
  critic = Taste(2.0)
  tokens = _draw(critic, steps=2, ratio=0.0, h=(0.0, 6.0))
  rows = [_tilted_rows(critic, h) for h in (0.0, 6.0)]
  grid = np.asarray(sample.grids.make("uniform", 2), np.float64)
  ramp = lambda probs, x, s, t: rows[int(t < grid[0])](probs, x, s, t)  # noqa: E731
  assert toy.p_value(tokens, toy.chain_law(toy.make(L), PROC, L, 2, rows=ramp)) > 1e-4
  turned = lambda probs, x, s, t: rows[int(t >= grid[0])](probs, x, s, t)  # noqa: E731
  assert toy.p_value(tokens, toy.chain_law(toy.make(L), PROC, L, 2, rows=turned)) < 1e-6


def _first_step():
  """Return states and, per set of revealed positions, the law of the first of two steps."""
  grid = np.asarray(sample.grids.make("uniform", 2), np.float64)
  states, sigma = toy.states(L), float(PROC.schedule.sigma(grid[0]))
  probs = toy._predictions(toy.make(L), PROC, L, sigma, 1.0, 1.0)
  rows = toy.posterior_rows(PROC)(probs, states, grid[1], grid[0])
  start = int(np.flatnonzero(np.all(states == toy.MASK, axis=1))[0])
  q = np.prod([rows[start, i, states[:, i]] for i in range(L)], axis=0)
  return states, q / q.sum(), PROC.schedule.sigma(grid[1])


@pytest.mark.first_case
@pytest.mark.parametrize("reward", ["sum", "mean", "all"])
def test_law_of_ranking(reward):
  """The better of two candidates more often; "sum" and "mean" compare equal sets of masks."""
  critic, (states, q, sigma) = Taste(1.5), _first_step()
  masks = states == toy.MASK
  logits = np.asarray(critic(jnp.asarray(states), jnp.full(len(states), sigma)), np.float64)
  score = logits.sum(1) if reward == "all" else np.where(masks, logits, 0).sum(1)
  score = score / np.maximum(masks.sum(1), 1) if reward == "mean" else score
  lean = 1 / (1 + np.exp(score[None, :] - score[:, None]))  # P(first of a pair)
  if reward == "all":
    ranked = 2 * q * (lean @ q)
  else:  # the second candidate reveals what the first does
    same = np.all(masks[:, None] == masks[None], axis=-1)
    others = same * q[None] / (same @ q)[:, None]
    ranked = 2 * q * np.sum(lean * others, axis=1)
  np.testing.assert_allclose(ranked.sum(), 1, rtol=1e-5)
  options = {"steps": 2, "ratio": 1.0, "candidates": 2, "reward": reward}
  _, trace = _draw(critic, return_trace=True, **options)
  assert toy.p_value(trace[0], ranked) > 1e-4
  assert toy.p_value(trace[0], q) < 1e-6


def test_a_constant_reward_changes_nothing():
  """However large: the number of masks that are left is not rewarded."""
  constant = Bored()
  tokens = _draw(constant, steps=3, ratio=1.0)
  assert toy.p_value(tokens, toy.chain_law(toy.make(L), PROC, L, 3)) > 1e-4


@pytest.mark.slow
def test_tails():
  """A schedule that leaves many masks: greedy fills them with the best tokens, none keeps them."""
  proc = process.Absorbing(vocab_size=V, mask_id=toy.MASK, schedule=schedules.Polynomial(power=0.1))
  given = {"batch": 512, "steps": 2, "h": (0.0, 0.0), "candidates": 1}
  draw_with = functools.partial(_draw, Taste(1.0), proc=proc, **given)
  left = draw_with(noise_removal="none")
  assert np.any(left == toy.MASK)
  filled = draw_with(noise_removal="greedy")
  logits = toy.make(L)(jnp.asarray(left), jnp.zeros(len(left)))
  best = np.argmax(np.asarray(logits)[..., : toy.MASK], -1)
  np.testing.assert_array_equal(filled, np.where(left == toy.MASK, best, left))


# --- surface ------------------------------------------------------------------------------------


def test_cost():
  assert sample.evaluations("rgas", steps=8) == {
    "student": 8,
    "discriminator_forward": 4 + 3 * 4,
    "discriminator_backward": 4,
  }
  assert sample.evaluations("rgas", steps=8, reward="all")["discriminator_forward"] == 4 + 4 * 4
  assert sample.evaluations("rgas", steps=5, candidates=1, h=(0.0, 0.0)) == {
    "student": 5,
    "discriminator_forward": 0,
    "discriminator_backward": 0,
  }
  assert sample.evaluations(steps=7)["student"] == 7


@pytest.mark.slow
def test_prompts_keys_and_batches():
  given = {
    "length": 6,
    "steps": 4,
    "sampler": "rgas",
    "critic": Taste(2.0),
    "h": (1.0, 2.0),
    "prompt": jnp.array([1, toy.MASK, 0]),
  }
  denoiser = toy.make(6)
  with jax.debug_key_reuse(True):
    eight = sample.generate(denoiser, PROC, jax.random.key(1), batch=8, **given)
  three = sample.generate(denoiser, PROC, jax.random.key(1), batch=3, **given)
  np.testing.assert_array_equal(eight[:3], three)
  assert np.all(eight[:, 0] == 1) and np.all(eight[:, 2] == 0) and np.all(eight != toy.MASK)


@pytest.mark.slow
def test_tilting_makes_no_dense_array():
  """Peak memory of a tilted step stays below one float32 [B, L, V]."""
  batch, length, vocabulary = 4, 256, 4096
  cfg = DiTConfig(
    vocab_size=vocabulary, dim=8, cond_dim=8, layers=1, heads=1, length=length, dtype="float32"
  )
  tokens, sigma = jnp.zeros((1, length), jnp.int32), jnp.zeros(1)
  model, judge = DiT(cfg), Discriminator(cfg, trained_layers=1)
  denoiser = Denoiser(model, model.init(jax.random.key(0), tokens, sigma)["params"])
  variables = judge.init(jax.random.key(1), tokens, sigma)
  critic = Critic(model=judge, params=variables["params"], spectral=variables["spectral"])
  proc = process.Absorbing(vocab_size=vocabulary, mask_id=vocabulary - 1)

  @jax.jit
  def run(denoiser, critic, rng):
    options = {"steps": 32, "sampler": "rgas", "critic": critic, "ratio": 0.0}
    return sample.generate(denoiser, proc, rng, batch=batch, length=length, **options)

  compiled = run.lower(denoiser, critic, jax.random.key(2)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * batch * length * vocabulary


@pytest.mark.parametrize(
  ("options", "word"),
  [
    ({"critic": None}, "needs a discriminator"),
    ({"h": (1.0, -1.0)}, "h="),
    ({"candidates": 0}, "candidates"),
    ({"ratio": 1.5}, "ratio"),
    ({"reward": "max"}, "reward"),
    ({"kappa": 1.0}, "no option 'kappa'"),
  ],
)
def test_bad_input(options, word):
  options = {"critic": Taste(1.0), **options}
  with pytest.raises(InputError, match=word):
    sample.generate(
      toy.make(L), PROC, jax.random.key(0), batch=1, length=L, steps=2, sampler="rgas", **options
    )


@pytest.mark.parametrize(
  ("options", "word"),
  [
    ({"ratio": "a"}, "ratio='a' is not"),
    ({"h": 30}, "h=30 is not a list of 2"),
    ({"h": (1.0, "x")}, r"h\[1\]='x' is not"),
    ({"candidates": 2.5}, "whole number"),
  ],
)
def test_wrong_types_from_the_command_line(options, word):
  with pytest.raises(InputError, match=word):
    sample.check_options("rgas", PROC, {"critic": Taste(1.0), **options})
