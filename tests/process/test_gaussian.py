# SPDX-License-Identifier: Apache-2.0
"""The Gaussian process and its argmax: survival α(γ), its derivative, the law, the soft state."""

import jax
import jax.numpy as jnp
import numpy as np
import published_table
import pytest
import scipy.stats
from scipy import special

from dlm_jax import process
from dlm_jax.models.layers import Embedding
from dlm_jax.process import gaussian

FOLLOWS, DIFFERS = 1e-4, 1e-6
FULL = process.GaussianDuality(vocab_size=50_258)
SMALL = process.GaussianDuality(vocab_size=5, gamma_min=-2.0, gamma_max=1.5)
VOCABULARIES = (2, 10, 27, 64, 256, 1000, 8192, 32768, 50257, 50258, 151936)


def _survival(win, vocabulary):
  return (vocabulary * win - 1) / (vocabulary - 1)


# --- α(γ) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_golden_quadrature(golden, vocabulary):
  """Adaptive quadrature recorded it to about 2e-11 at V = 8192, better elsewhere."""
  vectors, _ = golden("integral_quad__a")
  alpha, slope = gaussian.quadrature(vocabulary, vectors["gamma"])
  tolerance = 1e-10 if vocabulary == 8192 else 5e-12
  np.testing.assert_allclose(alpha, vectors[f"K{vocabulary}/alpha"], rtol=0, atol=tolerance)
  win_slope = slope * (vocabulary - 1) / vocabulary
  np.testing.assert_allclose(win_slope, vectors[f"K{vocabulary}/grad_pt"], rtol=0, atol=tolerance)


def test_golden_series(golden):
  vectors, config = golden("integral_series__a")
  alpha, slope = gaussian.quadrature(config["vocab_size"], vectors["gamma"])
  np.testing.assert_allclose(alpha, vectors["alpha"], rtol=0, atol=1e-12)
  slope *= config["gamma_max"] - config["gamma_min"]
  np.testing.assert_allclose(slope, vectors["dalpha_dt"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
  "name,size,worst", [("gpt2", 50_257, 1e-9), ("bert_base_uncased", 30_523, 1e-11)]
)
def test_golden_published_tables(golden, name, size, worst):
  """The table named after 30,522 tokens holds P for 30,523; there we agree to 3e-13.

  In the other one the adaptive quadrature stopped early at two of 225 entries (off by up to 7e-10):
  a finer step does not move our values there.
  """
  vectors, _ = golden(f"integral_{name}__a")
  gamma = vectors["gamma"]
  alpha, slope = gaussian.quadrature(size, gamma)
  win, win_slope = (1 + alpha * (size - 1)) / size, slope * (size - 1) / size
  for ours, recorded in ((win, vectors["pt"]), (win_slope, vectors["grad_pt"])):
    error = np.abs(ours - recorded)
    assert np.quantile(error, 0.98) < 1e-11
    assert error.max() < worst
  odd = np.argsort(-np.abs(win - vectors["pt"]))[:4]
  np.testing.assert_allclose(win[odd], _finely(size, gamma[odd]), rtol=0, atol=1e-12)


def _finely(vocabulary, gamma):
  """Return P(γ) with a third of the step over ±10 deviations."""
  u = np.linspace(-10, 10, 13_337)[None] + np.exp(-gamma / 2)[:, None]
  density = scipy.stats.norm.pdf(u, np.exp(-gamma / 2)[:, None])
  return np.trapezoid(density * np.exp((vocabulary - 1) * special.log_ndtr(u)), u, axis=1)


def test_golden_queries(golden):
  """The published lookup takes the nearest of 100,000 points and differences over Δγ = 1e-3."""
  for name, steep in (("gpt2", 0.05), ("bert_base_uncased", 0.12)):
    vectors, config = golden(f"integral_{name}__a")
    size, gamma = config["vocab_size"], vectors["query_gamma"].astype(np.float64)
    alpha, slope = gaussian.quadrature(size, gamma)
    cell = (config["gamma_max"] - config["gamma_min"]) / (config["num_points"] - 1)
    half = np.abs(slope).max() * cell / 2
    np.testing.assert_allclose(alpha, vectors["query_alpha"], rtol=0, atol=1.02 * half + 5e-6)
    width = config["schedule_gamma_max"] - config["schedule_gamma_min"]
    np.testing.assert_allclose(width * slope, vectors["query_dalpha_dt"], rtol=steep, atol=2e-3)


@pytest.mark.parametrize("name, tokens", [("gpt2", None), ("bert_base_uncased", 30_523)])
def test_golden_lookups(golden, name, tokens):
  """The same lookup over our quadrature gives the recorded values, all but no difference left."""
  vectors, config = golden(f"integral_{name}__a")
  table = {"points": config["num_points"], "tokens": tokens}
  table |= {"low": config["gamma_min"], "high": config["gamma_max"]}
  alpha = published_table.alpha(config["vocab_size"], vectors["query_gamma"], **table)
  np.testing.assert_allclose(alpha, vectors["query_alpha"], rtol=0, atol=1e-9)
  width = config["schedule_gamma_max"] - config["schedule_gamma_min"]
  slope = published_table.dalpha(config["vocab_size"], vectors["query_gamma"], width, **table)
  error = np.abs(slope - vectors["query_dalpha_dt"])
  # One of 64 lies half-way between two points of the table, where rounding decides.
  assert np.sort(error)[-2] < 2e-8 and error.max() < 0.1


def test_table_of_survival_values():
  """IDLM's values at V = 50,258, as the published lookup gives them: two differences from ours.

  It reads P at the nearest of 100,000 points over [−5, −1] (γ off by up to 2e-5, α by 1.5e-5), and
  its P was computed for V = 50,257 while α = (V P − 1)/(V − 1) uses 50,258 (1.7e-6 in α).
  """
  gamma = np.array([-4, -3.55, -3.5, -3.0, -2.7, -2.5, -2.0, -1.85, -1.0])
  wanted = np.array(
    [0.998694, 0.945470, 0.928342, 0.596236, 0.360138, 0.237973, 0.072032, 0.049319, 0.006186]
  )
  grid = np.linspace(-5, -1, 100_000)
  nearest = grid[np.rint((gamma + 5) / 4 * 99_999).astype(int)]
  alpha, _ = gaussian.quadrature(50_257, nearest)
  looked_up = _survival((1 + alpha * 50_256) / 50_257, 50_258)
  np.testing.assert_allclose(looked_up, wanted, rtol=0, atol=6e-7)
  exact, _ = gaussian.quadrature(50_258, gamma)
  np.testing.assert_allclose(exact, wanted, rtol=0, atol=2e-5)
  sigma = [0.00131, 0.05607, 0.07436, 0.51712, 1.02127, 1.43560, 2.63065, 3.00945, 5.08542]
  np.testing.assert_allclose(-np.log(looked_up), sigma, rtol=0, atol=6e-5)
  wide = process.GaussianDuality(vocab_size=50_258, gamma_min=-5.0, gamma_max=-1.0)
  np.testing.assert_allclose(wide.alpha(jnp.asarray(gamma)), wanted, rtol=0, atol=2e-5)


def test_derivative_in_the_training_window():
  """dα/dt of IDLM's window; the recorded values are differences over one thousandth of γ."""
  times = jnp.array([0.01, 0.25, 0.5, 0.75, 0.99])
  wanted = [-0.566, -1.357, -1.184, -0.576, -0.221]
  np.testing.assert_allclose(FULL.process.schedule.dalpha(times), wanted, rtol=4e-3)
  gamma = -3.55 + 1.7 * np.asarray(times, np.float64)
  ahead, _ = gaussian.quadrature(50_258, gamma + 1e-3)
  here, _ = gaussian.quadrature(50_258, gamma)
  np.testing.assert_allclose(1.7 * (ahead - here) / 1e-3, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("vocabulary", [2, 64, 50_258])
def test_slope_is_the_derivative(vocabulary):
  gamma, step = np.linspace(-4.5, 2, 14), 1e-4
  _, slope = gaussian.quadrature(vocabulary, gamma)
  ahead, behind = (gaussian.quadrature(vocabulary, gamma + d)[0] for d in (step, -step))
  np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
  assert np.all(slope < 0)


def test_survival_of_two_tokens_by_hand():
  """V = 2: the clean token wins if N(0, 2) stays below μ; α = 2 Φ(μ/√2) − 1."""
  gamma = np.linspace(-4, 4, 9)
  alpha, _ = gaussian.quadrature(2, gamma)
  wanted = 2 * special.ndtr(np.exp(-gamma / 2) / np.sqrt(2)) - 1
  np.testing.assert_allclose(alpha, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("duality", [FULL, SMALL], ids=["full", "small"])
def test_float32_interpolation(duality):
  """The jitted schedule against quadrature between its nodes."""
  schedule = duality.process.schedule
  times = np.random.default_rng(0).uniform(size=2000).astype(np.float32)
  times[:2] = 0.0, 1.0
  gamma = duality.gamma_min + times.astype(np.float64) * (duality.gamma_max - duality.gamma_min)
  alpha, slope = gaussian.quadrature(duality.vocab_size, gamma)
  slope *= duality.gamma_max - duality.gamma_min
  single = jnp.asarray(times)
  np.testing.assert_allclose(jax.jit(schedule.alpha)(single), alpha, rtol=3e-7)
  np.testing.assert_allclose(jax.jit(schedule.dalpha)(single), slope, rtol=6e-7)
  with jax.enable_x64(True):
    times = jnp.asarray(times, jnp.float64)
    np.testing.assert_allclose(schedule.alpha(times), alpha, rtol=1e-12)
    np.testing.assert_allclose(schedule.dalpha(times), slope, rtol=1e-6)


def test_schedule_is_the_window_and_clamps():
  schedule = FULL.process.schedule
  np.testing.assert_allclose(schedule.gamma(jnp.array([0.0, 0.5, 1.0])), [-3.55, -2.7, -1.85])
  ends, _ = gaussian.quadrature(50_258, np.array([-3.55, -1.85]))
  np.testing.assert_allclose(FULL.alpha(jnp.array([-9.0, 9.0])), ends, rtol=1e-6)
  np.testing.assert_allclose(FULL.alpha(-2.7), schedule.alpha(0.5), rtol=2e-6)
  np.testing.assert_allclose(schedule.sigma(0.5), -np.log(schedule.alpha(0.5)), rtol=1e-6)


# --- noise and states ---------------------------------------------------------------------------


def test_noise_is_normal_and_the_same_in_any_chunks():
  rng, places = jax.random.key(3), jnp.arange(12)
  whole = SMALL.noise(rng, places)
  assert whole.dtype == jnp.float32 and whole.shape == (12, 5)
  parts = [SMALL.noise(rng, places[i : i + 5]) for i in range(0, 12, 5)]
  np.testing.assert_array_equal(jnp.concatenate(parts), whole)
  np.testing.assert_array_equal(SMALL.noise(rng, places[::-1]), whole[::-1])
  assert not np.array_equal(whole, SMALL.noise(jax.random.key(4), places))
  sample = np.asarray(SMALL.noise(rng, jnp.arange(8000)))
  assert scipy.stats.kstest(sample.ravel(), "norm").pvalue > FOLLOWS
  correlation = np.corrcoef(sample.T) - np.eye(5)
  assert np.abs(correlation).max() < 5 / np.sqrt(8000)
  assert abs(np.corrcoef(sample[:-1, 0], sample[1:, 0])[0, 1]) < 5 / np.sqrt(8000)


@pytest.mark.parametrize("t", [0.1, 0.6, 1.0])
def test_diffusion_coefficients(t):
  """α̃² + σ̃² = 1 and α̃²/σ̃² = e^(−γ)."""
  one, zero = jnp.ones((1, 5)), jnp.zeros((1, 5))
  signal = float(SMALL.diffuse(one, zero, t)[0, 0])
  spread = float(SMALL.diffuse(zero, one, t)[0, 0])
  np.testing.assert_allclose(signal**2 + spread**2, 1, rtol=1e-6)
  np.testing.assert_allclose((signal / spread) ** 2, np.exp(2.0 - 3.5 * t), rtol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_argmax_follows_the_uniform_process(t):
  """200,000 draws: survival α(γ), the replacement uniform; `process.corrupt` has the same law."""
  draws, clean = 200_000, 3
  x0 = jnp.full((draws,), clean)
  noise = SMALL.noise(jax.random.key(7), jnp.arange(draws))
  states = SMALL.diffuse(jax.nn.one_hot(x0, 5), noise, t).argmax(-1)
  alpha, _ = gaussian.quadrature(5, np.array([-2.0 + 3.5 * t]))
  corrupted = SMALL.process.corrupt(jax.random.key(8), x0, t)
  for tokens in (states, corrupted):
    counts = np.bincount(np.asarray(tokens), minlength=5)
    for shift, follows in ((0.0, True), (0.02, False)):
      a = alpha[0] - shift
      law = a * np.eye(5)[clean] + (1 - a) / 5
      pvalue = scipy.stats.chisquare(counts, law * draws).pvalue
      assert pvalue > FOLLOWS if follows else pvalue < DIFFERS


def test_diffuse_is_differentiable_in_the_data():
  """dw/dp₀ = α̃ times the identity, whatever the noise."""
  noise = SMALL.noise(jax.random.key(0), jnp.arange(2))
  cotangent = jnp.arange(10.0).reshape(2, 5)
  p0 = jnp.full((2, 5), 0.2)
  gradient = jax.grad(lambda p0: jnp.sum(cotangent * SMALL.diffuse(p0, noise, 0.4)))(p0)
  gamma = -2.0 + 3.5 * 0.4
  np.testing.assert_allclose(gradient, cotangent / np.sqrt(1 + np.exp(gamma)), rtol=1e-6)


def test_tempered_states_become_hard_tokens():
  """softmax(w/τ) mixes embeddings; as τ → 0 it is the embedding of argmax w."""
  table = jax.random.normal(jax.random.key(0), (5, 8))
  embedded = lambda x: Embedding(5, 8).apply({"params": {"embedding": table}}, x)  # noqa: E731
  noise = SMALL.noise(jax.random.key(1), jnp.arange(6))
  w = SMALL.diffuse(jax.nn.one_hot(jnp.array([0, 1, 2, 3, 4, 0]), 5), noise, 0.5)[None]
  hard = embedded(w.argmax(-1).astype(jnp.int32))
  distance = [float(jnp.abs(embedded(w / tau) - hard).max()) for tau in (1.0, 0.1, 1e-3, 1e-6)]
  assert distance[0] > distance[1] > 1e-3
  assert distance[2] < distance[1]
  assert distance[3] < 1e-6
  by_hand = jax.nn.softmax(w / 0.1) @ table
  np.testing.assert_allclose(embedded(w / 0.1), by_hand, rtol=0, atol=1e-6)


def test_a_window_that_is_empty():
  with pytest.raises(ValueError, match="gamma_min") as error:
    process.GaussianDuality(vocab_size=5, gamma_min=-1.0, gamma_max=-1.0)
  assert "\n" not in str(error.value)
