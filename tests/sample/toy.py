# SPDX-License-Identifier: Apache-2.0
"""A denoiser small enough to enumerate, and the exact law of its reverse chain.

Under a uniform process the fourth token is one like the others.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from dlm_jax import process
from dlm_jax.models import Denoiser

VOCABULARY, MASK = 4, 3  # three tokens and the mask
END = 1e-5  # the last time of the sampling grid


@dataclasses.dataclass(frozen=True)
class Table:
  """Stand in for a network: logits looked up by the whole sequence and the position.

  The hidden state of a position is the one-hot index of (sequence, position) and σ, so the head
  works on any gathered positions and a wrong gather shows.
  """

  length: int

  @property
  def rows(self):
    return VOCABULARY**self.length * self.length

  def trunk(self, params, tokens_BL, sigma_B):
    del params
    powers_L = VOCABULARY ** jnp.arange(self.length)[::-1]
    code_B = jnp.sum(tokens_BL * powers_L[None], axis=-1)
    row_BL = code_B[:, None] * self.length + jnp.arange(self.length)[None]
    sigma_BL1 = jnp.broadcast_to(sigma_B[:, None, None], (*row_BL.shape, 1))
    return jnp.concatenate([jax.nn.one_hot(row_BL, self.rows), sigma_BL1], axis=-1)

  def head(self, params, hidden_BKD, sigma_B):
    del sigma_B
    one_hot_BKD, sigma_BK1 = hidden_BKD[..., :-1], hidden_BKD[..., -1:]
    return one_hot_BKD @ params["table"] + sigma_BK1 * (one_hot_BKD @ params["tilt"])

  def apply(self, variables, inputs, sigma_B, method=None, **_):
    params = variables["params"]
    if method == "trunk":
      return self.trunk(params, inputs, sigma_B)
    if method == "head":
      return self.head(params, inputs, sigma_B)
    return self.head(params, self.trunk(params, inputs, sigma_B), sigma_B)


def make(length, *, seed=0, scale=2.0, tilt=0.0):
  """Return a denoiser with random conditionals; `tilt` makes them depend on σ."""
  rng, model = np.random.default_rng(seed), Table(length=length)
  table, slope = rng.normal(size=(2, model.rows, VOCABULARY))
  params = {"table": scale * table, "tilt": tilt * slope}
  return Denoiser(model=model, params=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))


def states(length):
  """Return all sequences, [V^L, L], ordered by their code."""
  return np.array(list(itertools.product(range(VOCABULARY), repeat=length)), np.int32)


def codes(tokens_BL):
  """Return each sequence's row in `states`."""
  tokens_BL = np.asarray(tokens_BL)
  return tokens_BL @ VOCABULARY ** np.arange(tokens_BL.shape[-1])[::-1]


def sharpen_by_hand(probs, temperature, nucleus):
  """Temper, then keep the smallest set of most probable tokens whose mass reaches `nucleus`."""
  probs = np.where(probs > 0, probs, 0.0) ** (1 / temperature)
  probs = probs / probs.sum(axis=-1, keepdims=True)
  if nucleus < 1:
    kept = np.zeros_like(probs)
    for index in np.ndindex(probs.shape[:-1]):
      order = np.argsort(-probs[index])
      count = np.searchsorted(np.cumsum(probs[index][order]), nucleus) + 1
      kept[index][order[:count]] = probs[index][order[:count]]
    probs = kept / kept.sum(axis=-1, keepdims=True)
  return probs


def _predictions(denoiser, proc, length, sigma, temperature, nucleus):
  """Return log p(x₀ | x_t), [V^L, L, V], for every state x_t."""
  tokens = jnp.asarray(states(length))
  logits = denoiser(tokens, jnp.full((len(tokens),), sigma, jnp.float32))
  probs = np.exp(np.asarray(jax.vmap(proc.log_x0)(logits, tokens), np.float64))
  return sharpen_by_hand(probs, temperature, nucleus)


def _apply(law, rows):
  """Move a law over states by independent positions: rows[state, position, token]."""
  length = rows.shape[1]
  moved = np.zeros_like(law)
  for state in np.flatnonzero(law):
    out = np.ones(1)
    for position in range(length):
      out = np.outer(out, rows[state, position]).ravel()
    moved += law[state] * out
  return moved


def initial_law(proc, length, start=None, frozen=None):
  """Return the law of the state at t = 1: masks or uniform tokens, `start` where frozen."""
  law = np.ones(1)
  uniform = isinstance(proc, process.Uniform)
  for position in range(length):
    given = start is not None and (not uniform or frozen[position])
    row = np.full(VOCABULARY, 1 / VOCABULARY) if uniform else np.eye(VOCABULARY)[MASK]
    law = np.outer(law, np.eye(VOCABULARY)[start[position]] if given else row).ravel()
  return law


def posterior_rows(proc):
  """Return the rows of an ancestral step: a function of (p(x₀ | xₜ), xₜ, s, t)."""
  posterior = jax.vmap(proc.posterior, (0, 0, None, None))

  def rows(probs, tokens, s, t):
    log_x0 = jnp.asarray(np.log(np.maximum(probs, 1e-300)), jnp.float32)
    return np.asarray(posterior(log_x0, jnp.asarray(tokens), s, t), np.float64)

  return rows


def chain_law(
  denoiser,
  proc,
  length,
  steps,
  *,
  temperature=1.0,
  nucleus=1.0,
  noise_removal="ancestral",
  start=None,
  frozen=None,
  rows=None,
  grid=None,
):
  """Return the exact law over V^L states after K reverse steps and the noise removal.

  The grid is linspace(1, 1e-5, K + 1); each step draws every position from `rows`, by default the
  rows of `process.posterior`. Noise removal is one more ancestral step to α = 1, the likeliest
  token (greedy) or none. Frozen positions stay.
  """
  law = initial_law(proc, length, start, frozen)
  grid = np.linspace(1.0, END, steps + 1) if grid is None else grid
  tokens, identity = states(length), np.eye(VOCABULARY)
  frozen = np.zeros(length, bool) if frozen is None else np.asarray(frozen)
  rows = rows or posterior_rows(proc)

  def predictions(t):
    sigma = float(proc.schedule.sigma(t))
    return _predictions(denoiser, proc, length, sigma, temperature, nucleus)

  def move(law, rows):
    return _apply(law, np.where(frozen[None, :, None], identity[tokens], rows))

  for t, s in itertools.pairwise(grid):
    law = move(law, rows(predictions(t), tokens, s, t))
  if noise_removal == "ancestral":
    law = move(law, posterior_rows(proc)(predictions(END), tokens, 0.0, END))
  if noise_removal == "greedy":
    law = move(law, identity[predictions(END).argmax(axis=-1)])
  return law / law.sum()


def first_hitting_law(denoiser, proc, length, *, start=None):
  """Return the law of revealing one uniformly random masked position at a time.

  The limit of `chain_law` for many steps, for a denoiser that ignores σ.
  """
  rows = _predictions(denoiser, proc, length, 0.0, 1.0, 1.0)
  every = states(length)
  law = np.zeros(len(every))
  law[codes(np.full(length, MASK) if start is None else np.asarray(start))] = 1.0
  for _ in range(length):
    moved = np.zeros_like(law)
    for state in np.flatnonzero(law):
      masked = np.flatnonzero(every[state] == MASK)
      if not len(masked):
        moved[state] += law[state]
      for position in masked:
        for token in range(VOCABULARY - 1):
          after = every[state].copy()
          after[position] = token
          chance = rows[state, position, token] / len(masked)
          moved[codes(after)] += law[state] * chance
    law = moved
  return law


def p_value(tokens_BL, law):
  """Chi-square of draws against a law over states; cells expecting fewer than 10 are pooled."""
  observed = np.bincount(codes(tokens_BL), minlength=len(law)).astype(float)
  if observed[law <= 1e-12].sum() > 2:  # float32 leaves about 1e-5 of masks at most
    return 0.0
  expected = law * observed.sum()
  small = expected < 10
  observed = np.append(observed[~small], observed[small].sum())
  expected = np.append(expected[~small], expected[small].sum())
  if expected[-1] < 10:
    observed[0] += observed[-1]
    expected[0] += expected[-1]
    observed, expected = observed[:-1], expected[:-1]
  if len(expected) == 1:
    return 1.0
  return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue
