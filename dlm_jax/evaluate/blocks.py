# SPDX-License-Identifier: Apache-2.0
"""Likelihood of held-out tokens under block diffusion: a bound by Monte Carlo."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.arrays import RngKey
from dlm_jax.decode.passes import Bound
from dlm_jax.errors import InputError, check_counts
from dlm_jax.evaluate import likelihood
from dlm_jax.evaluate._ends import ENDS
from dlm_jax.objectives import block_diffusion
from dlm_jax.process import Absorbing, BlockNoise
from dlm_jax.process.block import FULL

_NONE, _LAST, _FIRST = range(3)  # the integral itself, and its ends: see `_ends`


def block_elbo(
  network: Bound,
  process: Absorbing,
  tokens_NL: likelihood.Tokens | likelihood.Groups,
  rng: RngKey,
  *,
  block_length: int,
  batch_size: int = 32,
  samples_per_sequence: int = 1,
  bytes_per_token: float | None = None,
  valid_NL: likelihood.Valid = None,
  first_given: bool = False,
) -> dict[str, float]:
  """Estimate an upper bound of held-out sequences' nats, block after block.

  Every block is noised at a level of its own from the full interval [1e-3, 1], whatever interval
  the network was trained on; levels are stratified over all blocks of the set. What is masked at
  1e-3 is revealed in one step, and what survives all noise is paid for, as in `elbo`: two more
  evaluations of every sequence, or one where nothing survives. Neither batch size nor order changes
  the draws. A block length of 1 gives the exact likelihood instead of a bound.

  Args:
    network: with its parameters.
    process: says what the mask is, which is never predicted.
    tokens_NL: clean held-out ids; a list holds one array per length.
    rng: key.
    block_length: tokens per block.
    batch_size: sequences per network evaluation, of 2 L tokens each.
    samples_per_sequence: noisy copies per sequence.
    bytes_per_token: mean bytes of text per valid token; adds `bits_per_byte`.
    valid_NL: False on what is given: never masked, not counted; shaped as the tokens are. None: all
      tokens are valid.
    first_given: the first token does not count, as in `ar_perplexity`.

  Returns:
    As `elbo`: `nelbo`, `nelbo_se`, `perplexity`, `perplexity_se`, `tokens`, `sequences`,
    `evaluations`, and `bits_per_byte`.

  Raises:
    InputError: no tokens, ids that are no clean data, a count below 1, or nats that are not finite.

  Reference: BD3-LM, arXiv 2503.09573, equation 8.
  """
  check_counts(
    block_length=block_length, batch_size=batch_size, samples_per_sequence=samples_per_sequence
  )
  noised = functools.partial(
    _nats,
    model=network.model,
    noise=BlockNoise(process=process),
    block_length=block_length,
    first_given=first_given,
  )
  survives = float(process.schedule.alpha(1.0))
  ends = {} if block_length == 1 else {_LAST: 1.0} | ({_FIRST: survives} if survives > 0 else {})
  nats, counts, unscored = [], [], 0
  for i, (ids_NL, scored_NL) in enumerate(likelihood.by_length(tokens_NL, valid_NL)):
    likelihood.check_clean(ids_NL, process)
    size, rng_group = len(ids_NL) * samples_per_sequence, jax.random.fold_in(rng, i)
    of = functools.partial(noised, rows=size)
    sizes = {"samples": samples_per_sequence, "batch_size": min(batch_size, size)}
    nats_N = _sequence_nats(of, network.params, ids_NL, scored_NL, rng_group, **sizes)
    if ends:  # levels from [1e-3, 1] leave them out
      nats_N = (FULL[1] - FULL[0]) * nats_N
    for end, weight in ends.items():
      sizes |= {"samples": 1, "end": end}
      rng_end = jax.random.fold_in(rng_group, ENDS + end)
      nats_N += weight * _sequence_nats(of, network.params, ids_NL, scored_NL, rng_end, **sizes)
    nats.append(nats_N)
    counts.append(scored_NL[:, 1 if first_given else 0 :].sum(axis=1))
    unscored += int(scored_NL[:, 0].sum()) if first_given else 0
  nats_N, count_N = np.concatenate(nats), np.concatenate(counts)
  if not count_N.sum():
    raise InputError(f"{len(nats_N)} sequences hold nothing to score; give longer ones.")
  likelihood.check_finite(nats_N, "the network")
  if bytes_per_token is not None:  # it counts all valid tokens, the first one too
    bytes_per_token *= 1 + unscored / count_N.sum()
  evaluations = len(nats_N) * (samples_per_sequence + len(ends))
  return likelihood.summary("nelbo", nats_N, count_N, bytes_per_token, evaluations=evaluations)


def _sequence_nats(noised, params, tokens_NL, valid_NL, rng, *, samples, batch_size, end=_NONE):
  """Return nats of every sequence, a mean over noisy copies: of the integrand, or of an end."""
  rng_NK, row_NK = noised_rows(rng, len(tokens_NL), samples)
  nats_NK = np.empty(row_NK.size, np.float64)
  for start in range(0, row_NK.size, batch_size):
    rows = np.arange(start, start + batch_size) % row_NK.size  # one size for all: one program
    which = rows // samples
    given = tokens_NL[which], valid_NL[which], rng_NK[rows], row_NK[rows]
    nats_NK[rows] = noised(params, *given, end)
  return nats_NK.reshape(len(tokens_NL), -1).mean(axis=1)


def noised_rows(rng: RngKey, n: int, k: int):
  """Return a key and a stratum for each of k copies of n sequences, those of one far apart."""
  rng_order, rng_noise = jax.random.split(rng)
  order_N = np.asarray(jax.random.permutation(rng_order, n))
  rng_NK = jax.vmap(lambda i: jax.random.fold_in(rng_noise, i))(jnp.arange(n * k))
  return rng_NK, (order_N[:, None] + n * np.arange(k)[None]).astype(np.int32).reshape(-1)


@functools.partial(
  jax.jit, static_argnames=("model", "noise", "block_length", "first_given", "rows")
)
def _nats(
  params, tokens_BL, valid_BL, rng_B, row_B, end, *, model, noise, block_length, first_given, rows
):
  batch = {"tokens": tokens_BL, "valid": valid_BL, "rng": rng_B}
  noisy = block_diffusion.with_noise(
    batch,
    noise=noise,
    block_length=block_length,
    interval=jnp.where(end == _LAST, FULL[0], jnp.array(FULL)),
    first_given=first_given,
    row_B=row_B,
    rows=rows,
  )
  masks_BL = jnp.where(noisy["valid"], noise.process.mask_id, tokens_BL)
  noisy["noisy"] = jnp.where(end == _FIRST, masks_BL, noisy["noisy"])
  noisy["weight"] = jnp.where(end == _NONE, noisy["weight"], 1.0)
  nll_BL = block_diffusion.token_nll(
    params, noisy, model=model, process=noise.process, block_length=block_length
  )
  return (nll_BL * noisy["valid"]).sum(axis=1)
