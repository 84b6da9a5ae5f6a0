# SPDX-License-Identifier: Apache-2.0
"""Likelihood of held-out tokens: a diffusion's bound by Monte Carlo, and an exact causal one."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.arrays import Params, RngKey
from dlm_jax.errors import InputError, check_counts
from dlm_jax.evaluate._ends import ENDS, ends
from dlm_jax.models import next_token_logits
from dlm_jax.models.exported import exportable

Tokens = Int[Array, "N L"] | Int[np.ndarray, "N L"]
Groups = list[Int[Array, "_N _L"]] | list[Int[np.ndarray, "_N _L"]]  # one array per length
Mask = Int[Array, "N L"] | Int[np.ndarray, "N L"] | Bool[Array, "N L"] | Bool[np.ndarray, "N L"]
Valid = Mask | list[Bool[Array, "_N _L"]] | list[Bool[np.ndarray, "_N _L"]] | None


@exportable
@flax.struct.dataclass
class Judge:
  """Bind a next-token model to parameters; a pytree, so the parameters are not compiled in.

  Attributes:
    model: a module that maps tokens to next-token logits; static.
    params: its parameters.
  """

  model: Any = flax.struct.field(pytree_node=False)
  params: Params = None

  def __call__(self, tokens_BL: Int[Array, "B L"], mask_BL=None) -> Float[Array, "B L V"]:
    """Return float32 logits; a mask needs a model that takes `mask_BL`, as `GPT2` does."""
    options = {} if mask_BL is None else {"mask_BL": mask_BL}
    return next_token_logits(self.model, self.params, tokens_BL, **options)


def elbo(
  denoiser,
  process,
  tokens_NL: Tokens | Groups,
  rng: RngKey,
  *,
  batch_size: int = 32,
  samples_per_sequence: int = 1,
  bytes_per_token: float | None = None,
  eps: float = 1e-3,
  valid_NL: Valid = None,
  published: bool = False,
) -> dict[str, float]:
  """Estimate an upper bound of held-out sequences' nats, the negative evidence lower bound.

  Each sequence is corrupted at `samples_per_sequence` times. The times are stratified within a
  sequence and, by a random permutation, over the set: each of the n = N · samples strata of
  [0, 1) is hit once, every time is marginally uniform, and the estimate is unbiased. Times are
  then mapped to [eps, 1]; what noise is left at eps is removed in one step, and what survives all
  noise is paid for at t = 1: see `_ends`. Neither batch size nor order of evaluation changes the
  draws.

  The published convention is no bound: it leaves out what survives, and takes the mean of the times
  above eps for those below. Of an exact model it is too low by α(1), 0.1 % of the nats.

  The standard error is that of a mean over N independent sequences. It covers both the finite
  Monte-Carlo sample and the finite data; since stratification makes the times of different
  sequences repel each other, which it ignores, it is conservative.

  Args:
    denoiser: pytree, `denoiser(tokens_BL, sigma_B) -> logits_BLV`.
    process: forward process, e.g. `process.Absorbing`.
    tokens_NL: clean held-out ids; a list holds one array per length, whose times are stratified
      for themselves.
    rng: key.
    batch_size: sequences per network evaluation.
    samples_per_sequence: times per sequence.
    bytes_per_token: mean bytes of text per valid token; adds `bits_per_byte`.
    eps: smallest time.
    valid_NL: False on what is given: never corrupted, not counted; shaped as the tokens are. None:
      all tokens are valid.
    published: estimate what papers print instead of the bound.

  Returns:
    `nelbo` and `nelbo_se` in nats per token, `perplexity` = exp(nelbo), in expectation at least the
    model's own, with `perplexity_se`, `tokens`, `sequences`, `evaluations` of the denoiser, and
    `bits_per_byte`. With one sequence the standard errors are NaN.

  Raises:
    InputError: no tokens, ids that are no clean data, a count below 1, nats that are not finite, or
      a network whose masks carry noise.
  """
  check_counts(batch_size=batch_size, samples_per_sequence=samples_per_sequence)
  if getattr(denoiser, "mask_noise", 0):
    raise InputError(
      f"masks of this network carry noise (model.mask_noise={denoiser.mask_noise}), and its law is "
      "an average over it, of which no bound is known; score its samples."
    )
  nats, counts, evaluations = [], [], 0
  sizes = {"batch_size": batch_size, "eps": eps}
  for i, (ids_NL, scored_NL) in enumerate(by_length(tokens_NL, valid_NL)):
    check_clean(ids_NL, process)
    rng_group = jax.random.fold_in(rng, i) if isinstance(tokens_NL, list) else rng
    given = (denoiser, process, ids_NL, scored_NL)
    nats_N = _sequence_nelbo(*given, rng_group, samples=samples_per_sequence, **sizes)
    evaluations += len(ids_NL) * samples_per_sequence
    if not published:
      ends_N, more = ends(*given, jax.random.fold_in(rng_group, ENDS), **sizes)
      nats_N, evaluations = (1 - eps) * nats_N + ends_N, evaluations + more
    nats.append(nats_N)
    counts.append(scored_NL.sum(axis=1))
  nats_N, count_N = np.concatenate(nats), np.concatenate(counts)
  check_finite(nats_N, "the denoiser")
  return summary("nelbo", nats_N, count_N, bytes_per_token, evaluations=evaluations)


def by_length(tokens, valid):
  """Yield (ids, whether they count) of every length; complain if nothing counts."""
  groups = tokens if isinstance(tokens, list) else [tokens]
  masks = valid if isinstance(valid, list) else [valid] * (1 if valid is not None else len(groups))
  shapes = [np.shape(group) for group in groups]
  if valid is not None and shapes != [np.shape(mask) for mask in masks]:
    raise InputError(
      f"valid_NL has shape {[np.shape(mask) for mask in masks]} and the tokens {shapes}; one flag "
      "per token."
    )
  for ids, mask in zip(groups, masks, strict=True):
    ids_NL = np.asarray(ids, np.int32)
    valid_NL = np.ones(ids_NL.shape, bool) if mask is None else np.asarray(mask, bool)
    if ids_NL.size and not valid_NL.any():
      raise InputError(f"tokens of shape {ids_NL.shape} are all given: nothing is to be scored.")
    yield ids_NL, valid_NL


def _sequence_nelbo(denoiser, process, tokens_NL, valid_NL, rng, *, batch_size, samples, eps):
  """Return the integrand of every sequence in nats, its mean over so many times."""
  n = len(tokens_NL)
  rng_times, rng_corrupt = jax.random.split(rng)
  t_NK = _times(rng_times, n, samples, eps)
  rngs_NK = jax.vmap(lambda i: jax.random.fold_in(rng_corrupt, i))(jnp.arange(t_NK.size))
  nats_NK = np.empty(t_NK.size, np.float64)
  for rows in batches(t_NK.size, batch_size):
    which = rows // samples
    valid_BL = None if valid_NL.all() else valid_NL[which]
    nats_NK[rows] = _nelbo(denoiser, process, tokens_NL[which], rngs_NK[rows], t_NK[rows], valid_BL)
  return nats_NK.reshape(n, samples).mean(axis=1)


def ar_perplexity(
  judge,
  tokens_NL: Tokens | Groups,
  *,
  batch_size: int = 32,
  bytes_per_token: float | None = None,
  valid_NL: Valid = None,
) -> dict[str, float]:
  """Measure the perplexity of held-out sequences under a next-token model.

  The first token of a sequence is given, never scored; all others count.

  Args:
    judge: a `Judge`, or any `judge(tokens_BL) -> logits_BLV`.
    tokens_NL: held-out ids; a list holds one array per length.
    batch_size: sequences per network evaluation.
    bytes_per_token: mean bytes of text per valid token; adds `bits_per_byte`.
    valid_NL: False on what is given, such as prompts and padding: read, not scored; shaped as the
      tokens are. None: all tokens are valid.

  Returns:
    `nll` and `nll_se` in nats per token, `perplexity`, `perplexity_se`, `tokens` scored,
    `sequences`, and `bits_per_byte`.

  Raises:
    InputError: no token to score, ids outside the judge's vocabulary, or nats that are not finite.
  """
  nats, counts, unscored = [], [], 0
  for ids_NL, scored_NL in by_length(tokens_NL, valid_NL):
    nats_NM = token_nll(judge, ids_NL, batch_size=batch_size)
    nats.append(np.where(scored_NL[:, 1:], nats_NM, 0.0).sum(axis=1))
    counts.append(scored_NL[:, 1:].sum(axis=1))
    unscored += int(scored_NL[:, 0].sum())
  nats_N, count_N = np.concatenate(nats), np.concatenate(counts)
  scored = int(count_N.sum())
  if not scored:
    raise InputError(f"{len(nats_N)} sequences hold nothing to score: only first tokens are valid.")
  check_finite(nats_N, "the network")
  if bytes_per_token is not None:  # it counts all valid tokens, the first one too
    bytes_per_token *= (scored + unscored) / scored
  return summary("nll", nats_N, count_N, bytes_per_token)


def token_nll(
  judge, tokens_NL: Tokens, *, batch_size: int, mask_NL: Mask | None = None
) -> Float[np.ndarray, "N M"]:
  """Return −log p(token l | tokens before l) in nats for l = 1 … L − 1, float64 on the host.

  Args:
    judge: a `Judge`, or any `judge(tokens_BL[, mask_BL]) -> logits_BLV`. A plain function is
      compiled with what it closes over.
    tokens_NL: ids.
    batch_size: sequences per network evaluation.
    mask_NL: nonzero where a token may be attended to; passed on if given.

  Raises:
    InputError: fewer than two tokens a sequence, or ids outside the judge's vocabulary.
  """
  tokens_NL = np.asarray(tokens_NL, np.int32)
  check_counts(batch_size=batch_size)
  if not tokens_NL.shape[0] or tokens_NL.shape[1] < 2:
    raise InputError(
      f"tokens of shape {tokens_NL.shape} hold nothing to judge; give at least one sequence of two."
    )
  judge = _as_pytree(judge)
  mask_NL = None if mask_NL is None else np.asarray(mask_NL)
  vocabulary = jax.eval_shape(_call, judge, tokens_NL[:1], take_rows(mask_NL, [0])).shape[2]
  low, high = tokens_NL.min(), tokens_NL.max()
  if low < 0 or high >= vocabulary:
    raise InputError(
      f"token id {high if high >= vocabulary else low} is outside the judge's vocabulary of "
      f"{vocabulary}; use a judge of the same tokenizer, or retokenise (is a mask left over?)."
    )
  nats_NM = np.empty((tokens_NL.shape[0], tokens_NL.shape[1] - 1), np.float64)
  for rows in batches(len(tokens_NL), batch_size):
    nats_NM[rows] = _token_nll(judge, tokens_NL[rows], take_rows(mask_NL, rows))
  return nats_NM


def ratio_error(total_N: Float[np.ndarray, "N"], count_N: Float[np.ndarray, "N"]) -> float:
  """Return the standard error of Σ total / Σ count over independent sequences (delta method).

  NaN with fewer than two sequences.
  """
  n = len(total_N)
  if n < 2 or not count_N.sum():
    return float("nan")
  residual_N = total_N - total_N.sum() / count_N.sum() * count_N
  return float(np.sqrt(n / (n - 1) * np.sum(residual_N**2)) / count_N.sum())


def summary(name, total_N, count_N, bytes_per_token, **counts) -> dict[str, float]:
  """Return the mean of nats per token with its error, its perplexity, and bits per byte."""
  mean = float(total_N.sum() / count_N.sum())
  error = ratio_error(total_N, count_N.astype(np.float64))
  perplexity = float(np.exp(mean))
  row = {name: mean, f"{name}_se": error}
  row |= {"perplexity": perplexity, "perplexity_se": perplexity * error}
  row |= {"tokens": int(count_N.sum()), "sequences": len(total_N), **counts}
  if bytes_per_token is not None:
    if not bytes_per_token > 0:
      raise InputError(f"bytes_per_token={bytes_per_token} must be positive.")
    row["bits_per_byte"] = mean / np.log(2) / bytes_per_token
  return row


def _times(rng: RngKey, n: int, k: int, eps: float) -> Float[np.ndarray, "NK"]:
  """Draw k stratified times for each of n sequences, the sequences' offsets stratified too."""
  rng_order, rng_inside = jax.random.split(rng)
  stratum_N = np.asarray(jax.random.permutation(rng_order, n))
  inside_NK = np.asarray(jax.random.uniform(rng_inside, (n, k)), np.float64)
  stratum_NK = stratum_N[:, None] + n * np.arange(k)[None]
  u_NK = (stratum_NK + inside_NK) / (n * k)
  return ((1 - eps) * u_NK + eps).astype(np.float32).reshape(-1)


def batches(n: int, batch_size: int):
  """Yield index arrays of one size; the last wraps around, so that one program is compiled."""
  size = min(batch_size, n)
  for start in range(0, n, size):
    yield np.arange(start, start + size) % n


def _as_pytree(function):
  """Return the function as something that may be an argument of a jitted function."""
  leaves = jax.tree.leaves(function)
  opaque = len(leaves) == 1 and leaves[0] is function
  return jax.tree_util.Partial(function) if opaque else function


def take_rows(array_N, rows):
  """Return rows of an optional array."""
  return None if array_N is None else array_N[rows]


def _call(judge, tokens_BL, mask_BL) -> Float[Array, "B L V"]:
  return judge(tokens_BL) if mask_BL is None else judge(tokens_BL, mask_BL)


def check_finite(nats_N: Float[np.ndarray, "N"], who: str) -> None:
  """Raise InputError unless all sequences have a finite number of nats.

  Args:
    nats_N: of every sequence.
    who: the network whose they are, for the message.
  """
  wrong = np.flatnonzero(~np.isfinite(nats_N))
  if wrong.size:
    raise InputError(
      f"{who} gives {wrong.size} of {len(nats_N)} sequences {nats_N[wrong[0]]} nats (the first is "
      f"number {wrong[0]}), not a finite number; look for NaN in its weights, and for tokens that "
      "it holds impossible."
    )


def check_clean(tokens_NL, process):
  """Raise an InputError unless these are ids of the process's clean data."""
  if not tokens_NL.size:
    raise InputError(f"tokens of shape {tokens_NL.shape} are empty; give held-out sequences.")
  low, high = tokens_NL.min(), tokens_NL.max()
  if low < 0 or high >= process.vocab_size:
    raise InputError(
      f"token id {low if low < 0 else high} is outside the vocabulary of {process.vocab_size}; "
      "was the data prepared with another tokenizer?"
    )
  mask = getattr(process, "mask_id", None)
  if mask is not None and (tokens_NL == mask).any():
    raise InputError(f"held-out tokens contain the mask id {mask}; give clean data.")


@functools.partial(jax.jit, static_argnames="process")
def _nelbo(denoiser, process, tokens_BL, rngs_B, t_B, valid_BL) -> Float[Array, "B"]:
  xt_BL = jax.vmap(process.corrupt)(rngs_B, tokens_BL, t_B)
  if valid_BL is not None:
    xt_BL = jnp.where(valid_BL, xt_BL, tokens_BL)
  logits_BLV = denoiser(xt_BL, process.schedule.sigma(t_B))

  def nats(logits_LV, xt_L, x0_L, t):
    return process.nll(process.log_x0(logits_LV, xt_L), xt_L, x0_L, t)

  nats_BL = jax.vmap(nats)(logits_BLV, xt_BL, tokens_BL, t_B)
  return (nats_BL if valid_BL is None else nats_BL * valid_BL).sum(axis=1)


@jax.jit
def _token_nll(judge, tokens_BL, mask_BL) -> Float[Array, "B M"]:
  logits_BMV = _call(judge, tokens_BL, mask_BL)[:, :-1].astype(jnp.float32)
  chosen_BM = jnp.take_along_axis(logits_BMV, tokens_BL[:, 1:, None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BMV, axis=-1) - chosen_BM
