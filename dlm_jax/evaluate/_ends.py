# SPDX-License-Identifier: Apache-2.0
"""What a bound owes besides its integral over times: the noise at t = 1 and the last noise.

A diffusion's NELBO over times [ε, 1] is an integral and two ends,

  −log p(x₀) ≤ ∫ n(t) dt + KL(q(x₁ | x₀) ‖ p(x₁)) + E[−log p(x₀ | x_ε)],

and the published convention leaves both ends out. The first is what survives all noise: a masked
model starts from masks alone and reveals each with probability α(1), which costs α(1) times the
nats of the token given masks; a uniform one starts from uniform tokens. The second removes at once
what noise is left at ε, each position by itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dlm_jax.arrays import RngKey
from dlm_jax.process import has_mask

ENDS = 0x656E6473  # folded into a key, it makes that of the ends, apart from that of the times


def ends(
  denoiser, process, tokens_NL, valid_NL, rng: RngKey, *, batch_size: int, eps: float
) -> tuple[Float[np.ndarray, "N"], int]:
  """Return both ends of every sequence in nats, and the evaluations that they took.

  Of masks, sequences without any left at ε cost nothing there, and those without given tokens share
  one evaluation at t = 1.

  Args:
    denoiser: see `elbo`.
    process: forward process.
    tokens_NL: clean ids.
    valid_NL: False on what is given.
    rng: key.
    batch_size: sequences per evaluation.
    eps: smallest time.
  """
  noisy_NL = _corrupt(process, tokens_NL, valid_NL, rng, eps)
  rows = np.arange(len(tokens_NL))
  first_N, count = np.zeros(len(rows)), 0
  if not has_mask(process):
    first_N += _uniform_prior(process) * valid_NL.sum(axis=1)
  elif (alpha := float(process.schedule.alpha(1.0))) > 0:
    first_N, count = _masked_prior(denoiser, process, tokens_NL, valid_NL, batch_size)
    first_N = first_N * alpha
  if has_mask(process):
    rows = np.flatnonzero((noisy_NL == process.mask_id).any(axis=1))
  last_N = np.zeros(len(tokens_NL))
  last_N[rows] = _removal(
    denoiser, process, tokens_NL[rows], noisy_NL[rows], valid_NL[rows], batch_size, eps
  )
  return first_N + last_N, count + len(rows)


def _corrupt(process, tokens_NL, valid_NL, rng, t):
  rngs_N = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(len(tokens_NL)))
  noisy_NL = jax.vmap(process.corrupt, (0, 0, None))(rngs_N, jnp.asarray(tokens_NL), t)
  return np.where(valid_NL, noisy_NL, tokens_NL)


def _uniform_prior(process):
  """Return KL(q(x₁ | x₀) ‖ 1/V) of a token in nats."""
  alpha, size = float(process.schedule.alpha(1.0)), process.vocab_size
  moved = (1 - alpha) / size
  same, others = (alpha + moved) * np.log1p((size - 1) * alpha), 0.0
  if alpha < 1:
    others = (size - 1) * moved * np.log1p(-alpha)
  return same + others


def _masked_prior(denoiser, process, tokens_NL, valid_NL, batch_size):
  """Return −log p(x₀ | masks and what is given), and its evaluations."""
  if valid_NL.all():
    masks_1L = np.full((1, tokens_NL.shape[1]), process.mask_id, np.int32)
    log_x0_LV = np.asarray(_log_x0(denoiser, process, masks_1L, 1.0)[0], np.float64)
    return -log_x0_LV[np.arange(tokens_NL.shape[1]), tokens_NL].sum(axis=1), 1
  noisy_NL = np.where(valid_NL, process.mask_id, tokens_NL)
  nats_N = _removal(denoiser, process, tokens_NL, noisy_NL, valid_NL, batch_size, 1.0)
  return nats_N, len(tokens_NL)


def _removal(denoiser, process, tokens_NL, noisy_NL, valid_NL, batch_size, t):
  """Return −log p(x₀ | xₜ) of every sequence, in batches of one size."""
  nats_N, batch_size = np.empty(len(tokens_NL), np.float64), min(batch_size, len(tokens_NL) or 1)
  for start in range(0, len(tokens_NL), batch_size):
    rows = np.arange(start, start + batch_size) % len(tokens_NL)
    given = tokens_NL[rows], noisy_NL[rows], valid_NL[rows]
    nats_N[rows] = _removal_nats(denoiser, process, *given, t)
  return nats_N


@functools.partial(jax.jit, static_argnames="process")
def _log_x0(denoiser, process, noisy_BL, t) -> Float[Array, "B L V"]:
  sigma_B = jnp.full(noisy_BL.shape[:1], process.schedule.sigma(t))
  return jax.vmap(process.log_x0)(denoiser(noisy_BL, sigma_B), noisy_BL)


@functools.partial(jax.jit, static_argnames="process")
def _removal_nats(denoiser, process, tokens_BL, noisy_BL, valid_BL, t) -> Float[Array, "B"]:
  log_x0_BLV = _log_x0(denoiser, process, noisy_BL, t)
  at = lambda ids_BL: jnp.take_along_axis(log_x0_BLV, ids_BL[..., None], axis=-1)[..., 0]  # noqa: E731
  log_p_BL = at(tokens_BL)
  if not has_mask(process):  # Bayes: p(x₀) q(xₜ | x₀) / Σ p q, both times V
    alpha, size = process.schedule.alpha(t), process.vocab_size
    kept_BL = size * alpha * (tokens_BL == noisy_BL) + 1 - alpha
    log_p_BL += jnp.log(kept_BL) - jnp.log(size * alpha * jnp.exp(at(noisy_BL)) + 1 - alpha)
  return -(log_p_BL * valid_BL).sum(axis=1)
