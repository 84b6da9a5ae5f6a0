# SPDX-License-Identifier: Apache-2.0
"""The bound of block diffusion: exact at block length 1, against enumeration, independent draws."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny

from dlm_jax import evaluate, process, schedules
from dlm_jax.decode.passes import Bound
from dlm_jax.errors import InputError
from dlm_jax.objectives import block_diffusion

L, MASK = 4, tiny.V - 1
CONFIG = dataclasses.replace(tiny.DENSE, layers=1, length=L)
PROCESS = process.Absorbing(vocab_size=tiny.V, mask_id=MASK, schedule=schedules.LogLinear(eps=0.0))
TOKENS = np.asarray(tiny.tokens(5, L) % (tiny.V - 1))


def _bound(tokens=TOKENS, seed=0, **options):
  network = Bound(*tiny.make(CONFIG))
  return evaluate.block_elbo(network, PROCESS, tokens, jax.random.key(seed), **options)


def _masked(tokens, pattern, block_length):
  """Return nats at a pattern of masks, unweighted."""
  model, params = tiny.make(CONFIG)
  noisy = jnp.where(jnp.asarray(pattern)[None], MASK, tokens)
  batch = {"tokens": jnp.asarray(tokens), "noisy": noisy, "weight": jnp.ones(tokens.shape)}
  return np.asarray(
    block_diffusion.token_nll(
      params, batch, model=model, process=PROCESS, block_length=block_length
    )
  )


def test_single_tokens_are_exact():
  """9.2-g: no Monte Carlo is left, so keys change nothing."""
  exact = _masked(TOKENS, [True] * L, 1).mean()
  for seed in range(2):
    row = _bound(seed=seed, block_length=1)
    np.testing.assert_allclose(row["nelbo"], exact, rtol=1e-5)
  given = _bound(block_length=1, first_given=True)
  np.testing.assert_allclose(
    given["nelbo"], _masked(TOKENS, [True] * L, 1)[:, 1:].mean(), rtol=1e-5
  )
  assert given["tokens"] == 5 * (L - 1) and given["perplexity"] == np.exp(given["nelbo"])


def test_the_bound_matches_enumeration():
  """9.2-h: each block's levels cover the full interval; ∫ (1/t) tᵐ (1 − t)ᴮ⁻ᵐ dt by quadrature."""
  size, eps = 2, 1e-3
  t = np.linspace(eps, 1, 20_001)
  exact = 0.0
  for pattern in itertools.product([False, True], repeat=size):
    m = sum(pattern)
    weight = np.trapezoid(t ** (m - 1) * (1 - t) ** (size - m), t) / (1 - eps) if m else 0.0
    exact += weight * _masked(TOKENS, pattern * (L // size), size).mean()
  row = _bound(block_length=size, samples_per_sequence=400, batch_size=500)
  assert abs(row["nelbo"] / exact - 1) < 0.02


@pytest.mark.slow
def test_batches_and_valid_tokens():
  whole = _bound(block_length=2)
  for size in (2, 3):
    np.testing.assert_allclose(
      _bound(block_length=2, batch_size=size)["nelbo"], whole["nelbo"], rtol=1e-5
    )
  assert whole["evaluations"] == 5 * (1 + 1)  # the noise of the smallest level is removed at once
  assert whole["sequences"] == 5 and whole["tokens"] == 5 * L
  valid = ~np.isin(TOKENS, int(TOKENS[0, 1]))
  assert _bound(block_length=2, valid_NL=valid)["tokens"] == valid.sum()
  groups = _bound([TOKENS, TOKENS[:3, :2]], block_length=2)
  assert groups["tokens"] == 5 * L + 6


@pytest.mark.parametrize("options", [{"block_length": 0}, {"block_length": 1, "batch_size": 0}])
def test_bad_counts(options):
  with pytest.raises(InputError, match="must be at least 1"):
    _bound(**options)


def test_masks_are_no_data():
  with pytest.raises(InputError, match="mask id"):
    _bound(np.full((1, L), MASK), block_length=1)


def test_what_survives_all_noise_is_paid_for():
  """A schedule that leaves a tenth: blocks start from masks alone, and the bound says so."""
  surviving = dataclasses.replace(PROCESS, schedule=schedules.LogLinear(eps=0.1))
  network, options = Bound(*tiny.make(CONFIG)), {"samples_per_sequence": 400, "batch_size": 500}
  row = evaluate.block_elbo(
    network, surviving, TOKENS, jax.random.key(0), block_length=2, **options
  )
  alone = 0.1 * _masked(TOKENS, [True] * L, 2).mean()
  t, integral, last = np.linspace(1e-3, 1, 20_001), 0.0, 0.0
  for pattern in itertools.product([False, True], repeat=2):
    m, nats = sum(pattern), _masked(TOKENS, pattern * (L // 2), 2).mean()
    share = (0.9 * t) ** m * (1 - 0.9 * t) ** (2 - m)
    integral += np.trapezoid(share / t, t) * nats
    last += share[0] * nats
  assert abs(row["nelbo"] / (integral + last + alone) - 1) < 0.03
  assert alone > 0.08 * row["nelbo"]
  assert row["evaluations"] == 5 * (400 + 2)


def test_bytes_of_tokens_that_are_given():
  """All nats over all bytes, group by group: the first tokens are charged though not scored."""
  groups = [TOKENS, TOKENS[:3, :2]]
  row = _bound(groups, block_length=2, first_given=True, bytes_per_token=4.0)
  nats = row["nelbo"] * row["tokens"]
  assert row["tokens"] == 5 * (L - 1) + 3
  wanted = nats / np.log(2) / (4.0 * (5 * L + 3 * 2))
  np.testing.assert_allclose(row["bits_per_byte"], wanted, rtol=1e-6)
