# SPDX-License-Identifier: Apache-2.0
"""Exact denoisers against enumeration, and what samplers of them lose."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.cli.main import main
from dlm_jax.evaluate import chains, oracle

V, L = 3, 4
EVERY = np.array(list(itertools.product(range(V), repeat=L)))
CHAINS = {
  "markov": chains.markov(V, keep=0.7),
  "hidden": chains.hidden(V, states=4, seed=1),
}
BOTH = pytest.mark.parametrize("name", list(CHAINS))
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def _law(chain):
  """Return p of every sequence, [V^L], by summing over hidden paths."""
  start, move, emit = (
    np.asarray(x, np.float64) for x in (chain.start_S, chain.move_SS, chain.emit_SV)
  )
  law = np.zeros(len(EVERY))
  for path in itertools.product(range(len(start)), repeat=L):
    p = start[path[0]] * np.prod([move[a, b] for a, b in itertools.pairwise(path)])
    law += p * np.prod([emit[path[i], EVERY[:, i]] for i in range(L)], axis=0)
  return law


@BOTH
def test_probabilities_of_sequences(name):
  law = _law(CHAINS[name])
  np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
  found = CHAINS[name].log_prob(jnp.asarray(EVERY))
  np.testing.assert_allclose(found, np.log(law), rtol=1e-4, atol=1e-5)


@BOTH
def test_predictions_of_masks(name):
  """Every state, every position that is masked."""
  chain, law = CHAINS[name], _law(CHAINS[name])
  states = np.array(list(itertools.product(range(V + 1), repeat=L)))
  logits_BLV = np.asarray(chain.denoiser()(jnp.asarray(states), jnp.zeros(len(states))))
  probs = np.exp(logits_BLV - np.logaddexp.reduce(logits_BLV, axis=-1, keepdims=True))
  for state, found in zip(states, probs, strict=True):
    weight = law * ((state == EVERY) | (state == V)).all(1)
    for position in np.flatnonzero(state == V):
      wanted = [weight[EVERY[:, position] == token].sum() for token in range(V)]
      np.testing.assert_allclose(found[position, :V], wanted / weight.sum(), atol=2e-5)
      assert found[position, V] == 0


@BOTH
def test_predictions_of_uniform_noise(name):
  """Of each position by the others: the process brings in the position itself."""
  chain, law, alpha = CHAINS[name], _law(CHAINS[name]), 0.6
  sigma = jnp.full(len(EVERY), -np.log(alpha))
  probs = np.exp(np.asarray(chain.uniform_denoiser()(jnp.asarray(EVERY), sigma)))
  seen = (1 - alpha) / V + alpha * (EVERY[:, None] == EVERY[None])  # [clean, noisy, L]
  for noisy, position in itertools.product(range(0, len(EVERY), 7), range(L)):
    weight = law * np.delete(seen[:, noisy], position, axis=1).prod(1)
    wanted = [weight[EVERY[:, position] == token].sum() for token in range(V)]
    np.testing.assert_allclose(probs[noisy, position], wanted / weight.sum(), atol=2e-5)


@BOTH
def test_exact_sequences(name):
  x_BL = np.asarray(CHAINS[name].draw(jax.random.key(0), 40_000, L))
  found = np.bincount(x_BL @ V ** np.arange(L)[::-1], minlength=len(EVERY)) / len(x_BL)
  np.testing.assert_allclose(found, _law(CHAINS[name]), atol=0.01)
  assert abs(chains.divergence(CHAINS[name], jnp.asarray(x_BL))) < 1e-3
  mixed_BL = np.random.default_rng(0).permuted(x_BL, axis=1)
  assert chains.divergence(CHAINS[name], jnp.asarray(mixed_BL)) > 0.003


@BOTH
def test_what_is_lost_is_a_divergence(name):
  """The mean over the true law of `lost` is KL(p ‖ q), q the product of a partition's groups."""
  chain, law = CHAINS[name], _law(CHAINS[name])
  order = (1, 0, 1, 0)
  exact = chain.denoiser()
  log_q = np.zeros(len(EVERY))
  for step in range(2):
    state = np.where(np.array(order) < step, EVERY, V)
    logits_BLV = np.asarray(exact(jnp.asarray(state), jnp.zeros(len(EVERY))))
    each = np.take_along_axis(logits_BLV, EVERY[..., None], axis=-1)[..., 0]
    log_q += each[:, np.array(order) == step].sum(1)
  np.testing.assert_allclose(np.exp(log_q).sum(), 1, rtol=1e-4)
  lost_B = oracle.lost(chain, jax.random.key(0), jnp.asarray(EVERY), steps=2, order=order)
  np.testing.assert_allclose(law @ np.asarray(lost_B), law @ (np.log(law) - log_q), rtol=1e-4)
  assert law @ np.asarray(lost_B) > 0.003


@functools.cache
def _lost(chain, name, steps, length=32, sequences=512):
  law = oracle.CHAINS[chain]()
  x_BL = law.draw(jax.random.key(1), sequences, length)
  run = jax.jit(functools.partial(oracle.lost, steps=steps, **oracle.WAYS[name][1]))
  nats_B = np.asarray(run(law, jax.random.key(2), x_BL), np.float64)
  return nats_B.mean(), nats_B.std(ddof=1) / sequences**0.5


@pytest.mark.parametrize(
  "chain, steps", [("markov", 4), ("markov", 8), pytest.param("hidden", 4, marks=pytest.mark.slow)]
)
def test_spaced_orders_lose_less(chain, steps):
  """At K = L/8 and L/4: at most 0.6 times what the random order loses, by two errors."""
  (spaced, spaced_error), (random, random_error) = (
    _lost(chain, name, steps) for name in ("spaced", "random")
  )
  assert spaced + 2 * spaced_error < 0.6 * (random - 2 * random_error)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 6, 16, 32])
@pytest.mark.parametrize("chain", list(oracle.CHAINS))
def test_spaced_orders_never_lose_more(chain, steps):
  (spaced, spaced_error), (random, random_error) = (
    _lost(chain, name, steps) for name in ("spaced", "random")
  )
  assert spaced < random + 2 * np.hypot(spaced_error, random_error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "analytic", "entropy"])
def test_many_steps_lose_nothing(name):
  """Every sampler of an exact denoiser tends to the true law."""
  few, many = (
    next(oracle.compare("markov", [name], steps, length=16, sequences=1024)).pairs
    for steps in (1, 64)
  )
  assert few > 0.1 and many < 0.01


def test_command(tmp_path, capsys):
  files = [f"--json={tmp_path / 'o.json'}", f"--figure={tmp_path / 'o.png'}"]
  sizes = ["--steps=2", "--length=8", "--sequences=64", "--chains=markov"]
  assert main(["bench", "oracle", "--ways=spaced,psi", *sizes, *files]) == 0
  out = capsys.readouterr().out
  assert "| markov | spaced |     2 |           2 |" in out and "64 sequences of 8 tokens" in out
  rows = json.loads((tmp_path / "o.json").read_text())
  assert [(row["name"], row["steps"], row["evaluations"]) for row in rows] == [
    ("spaced", 2, 2),
    ("psi", 2, 2),
  ]
  assert rows[1]["nats"] is None and rows[0]["nats"] > 0
  assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--ways=spiced", "--ways='spiced' is unknown"),
    ("--chains=x", "--chains='x' is unknown"),
    ("--steps=0", "steps=0"),
    ("--figure=/none/x.png", "cannot be written"),
  ],
)
def test_command_refused(capsys, flag, message):
  assert main(["bench", "oracle", flag]) == 2
  out, err = capsys.readouterr()
  assert message in err and err.count("\n") == 1 and not out
