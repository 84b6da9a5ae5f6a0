# SPDX-License-Identifier: Apache-2.0
"""Quality of generated text: a judge's perplexity, always beside the entropy.

Perplexity alone can be gamed by repeating oneself; entropy alone by noise. `Quality` holds both and
prints both.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.errors import InputError
from dlm_jax.evaluate import diversity
from dlm_jax.evaluate.likelihood import Mask, Tokens, batches, check_finite, ratio_error, token_nll


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
  """Generative perplexity and entropy of one set of samples, with standard errors.

  Attributes:
    genppl: the judge's perplexity; NaN if no token was there to judge (all samples were EOS).
    genppl_se: its standard error over samples; NaN for one sample.
    entropy: mean over samples of the entropy of a sample's own token histogram, in nats.
    entropy_se: its standard error.
    samples: number of samples.
    tokens: number of judged tokens.
    correlation: of the errors of log GenPPL and of the entropy; 0 where either is none.
    distinct_4: share of distinct 4-grams over all samples, see `diversity.distinct`.
  """

  genppl: float
  genppl_se: float
  entropy: float
  entropy_se: float
  samples: int
  tokens: int
  correlation: float = 0.0
  distinct_4: float = math.nan

  def __str__(self) -> str:
    return (
      f"GenPPL {plus_minus(self.genppl, self.genppl_se)}, "
      f"entropy {plus_minus(self.entropy, self.entropy_se, 2)} nats "
      f"({self.samples:,} samples, {self.tokens:,} tokens judged)"
    )


def plus_minus(value: float, error: float, digits: int = 1) -> str:
  """Return "42.1 ± 0.8"; no error where it is not finite."""
  text = f"{value:.{digits}f}"
  return f"{text} ± {error:.{digits}f}" if math.isfinite(error) else text


def quality(
  judge,
  tokens_BL: Tokens,
  *,
  eos_id: int | None = None,
  batch_size: int = 8,
  retokenised: tuple[np.ndarray, np.ndarray] | None = None,
  valid_NL: Mask | None = None,
) -> Quality:
  """Measure GenPPL and entropy of samples.

  Args:
    judge: see `genppl`.
    tokens_BL: samples in the generator's own ids; the entropy is theirs.
    eos_id: end-of-text id of the judge's tokenizer.
    batch_size: samples per evaluation of the judge.
    retokenised: what `retokenise` returned, if the judge has another tokenizer.
    valid_NL: False on what was given to the sampler: neither judged nor in the entropy. None:
      nothing was.

  Raises:
    InputError: some is given, and the judge has another tokenizer.
  """
  check_translated(retokenised, valid_NL)
  judged_BL, mask_BL = retokenised or (tokens_BL, None)
  sizes = {"eos_id": eos_id, "batch_size": batch_size}
  nats_BM, counts_BM = _judged(judge, judged_BL, mask_BL=mask_BL, valid_NL=valid_NL, **sizes)
  judged = perplexity(nats_BM, counts_BM)
  judged = {key: judged[key] for key in ("genppl", "genppl_se", "samples", "tokens")}
  spread = entropy(tokens_BL, valid_NL)
  spread = {key: spread[key] for key in ("entropy", "entropy_se")}
  together = _correlation(nats_BM, counts_BM, entropies(tokens_BL, valid_NL))
  varied = diversity.distinct(tokens_BL, 4, valid_NL=valid_NL)
  return Quality(**spread, **judged, correlation=together, distinct_4=varied)


def _correlation(nats_BM, counts_BM, entropy_B) -> float:
  """Return how the errors of log GenPPL and of the mean entropy vary together over samples."""
  count_B = counts_BM.sum(axis=1)
  total_B = np.where(counts_BM, nats_BM, 0.0).sum(axis=1)
  residual_B = total_B - total_B.sum() / max(count_B.sum(), 1) * count_B
  entropy_B = entropy_B - entropy_B.mean()
  spread = math.sqrt(np.sum(residual_B**2) * np.sum(entropy_B**2))
  return float(residual_B @ entropy_B / spread) if spread > 0 else 0.0


TRANSLATED = (
  "the judge has a tokenizer of its own, in which prompts and answers cannot be told apart; use an "
  "autoregressive run on the same data."
)


def check_translated(retokenised, valid_NL) -> None:
  """Raise InputError if samples are given in part, and a judge is to read them in other tokens."""
  if retokenised is not None and valid_NL is not None:
    raise InputError(TRANSLATED)


def genppl(
  judge,
  tokens_BL: Tokens,
  *,
  eos_id: int | None = None,
  batch_size: int = 8,
  mask_BL: Mask | None = None,
  valid_NL: Mask | None = None,
  published: bool = False,
) -> dict[str, float]:
  """Measure the perplexity of samples under an autoregressive judge.

  The published protocol: next-token NLL over targets 1 … L − 1; a target counts unless it is an
  end of text that is not the first one of its sequence, position 0 included. So text after an end
  of text counts. Padding never does: the published code counts one end of text that it pads a
  shorter sample with. Weighted by token over the whole set; no sample is dropped.

  Args:
    judge: a `Judge`, or any `judge(tokens_BL[, mask_BL]) -> logits_BLV`.
    tokens_BL: samples in the judge's ids.
    eos_id: end-of-text id; None counts every target.
    batch_size: samples per evaluation of the judge.
    mask_BL: nonzero where the judge may attend; passed on if given. What it hides is padding.
    valid_NL: False where a token is read and does not count: prompts, frames, padding.
    published: count that one end of text, too.

  Returns:
    `genppl`, `genppl_se` (over samples, by the delta method), `nll` in nats per judged token,
    `tokens` judged, `samples`. GenPPL is NaN if no token counts.

  Raises:
    InputError: nothing to judge, ids outside the judge's vocabulary, or nats that are not finite.

  Reference: MDLM, arXiv 2406.07524, and the public code of its successors.
  """
  options = {"batch_size": batch_size, "mask_BL": mask_BL, "valid_NL": valid_NL}
  return perplexity(*_judged(judge, tokens_BL, eos_id=eos_id, published=published, **options))


def _judged(judge, tokens_BL, *, eos_id, batch_size, mask_BL, valid_NL, published=False):
  """Return nats of targets, and which of them count."""
  tokens_BL = np.asarray(tokens_BL)
  nats_BM = token_nll(judge, tokens_BL, batch_size=batch_size, mask_NL=mask_BL)
  counts_BM = counted(tokens_BL, eos_id) & _valid(tokens_BL, valid_NL)[:, 1:]
  if mask_BL is not None and not published:
    counts_BM &= np.asarray(mask_BL)[:, 1:] != 0
  return nats_BM, counts_BM


def perplexity(
  nats_BM: Float[np.ndarray, "B M"], counts_BM: Bool[np.ndarray, "B M"]
) -> dict[str, float]:
  """Return what `genppl` does, of the targets that count; their nats must be finite."""
  total_B, count_B = (
    np.where(counts_BM, nats_BM, 0.0).sum(axis=1),
    counts_BM.sum(axis=1).astype(np.float64),
  )
  check_finite(total_B, "the judge")
  tokens = int(count_B.sum())
  nll = float(total_B.sum() / tokens) if tokens else float("nan")
  value = math.exp(nll) if nll < 700 else nll * math.inf
  return {
    "genppl": value,
    "genppl_se": value * ratio_error(total_B, count_B),
    "nll": nll,
    "tokens": tokens,
    "samples": len(nats_BM),
  }


def counted(tokens_BL: Tokens, eos_id: int | None) -> Bool[np.ndarray, "B M"]:
  """Return which targets 1 … L − 1 count: all but the ends of text after a sequence's first."""
  if eos_id is None:
    return np.ones((tokens_BL.shape[0], tokens_BL.shape[1] - 1), bool)
  eos_BL = np.asarray(tokens_BL) == eos_id
  return (~eos_BL | (np.cumsum(eos_BL, axis=1) == 1))[:, 1:]


def _valid(tokens_BL, valid_NL) -> Bool[np.ndarray, "B L"]:
  """Return the flags, all True for None; complain about another shape."""
  if valid_NL is None:
    return np.ones(np.shape(tokens_BL), bool)
  if np.shape(valid_NL) != np.shape(tokens_BL):
    raise InputError(
      f"valid_NL has shape {np.shape(valid_NL)} and the samples {np.shape(tokens_BL)}; one flag "
      "per token."
    )
  return np.asarray(valid_NL, bool)


def entropies(tokens_BL: Tokens, valid_NL: Mask | None = None) -> Float[np.ndarray, "B"]:
  """Return each sample's entropy: that of its histogram of ids, in nats, at most log L.

  Tokens that are not valid are left out; a sample of nothing else has entropy 0.
  """
  tokens_BL = np.asarray(tokens_BL)

  def one(tokens_L, valid_L):
    _, counts = np.unique(tokens_L[valid_L], return_counts=True)
    p = counts / counts.sum()
    return -np.sum(p * np.log(p)) + 0.0  # + 0.0: a constant sample has entropy 0, not −0

  rows = zip(tokens_BL, _valid(tokens_BL, valid_NL), strict=True)
  return np.array([one(*row) for row in rows], np.float64)


def entropy(tokens_BL: Tokens, valid_NL: Mask | None = None) -> dict[str, float]:
  """Return the mean `entropy` of samples in nats, its `entropy_se`, and the number of `samples`.

  Raises:
    InputError: there is no token.
  """
  if not np.size(tokens_BL):
    raise InputError(f"tokens of shape {np.shape(tokens_BL)} have no entropy; give samples.")
  values_B = entropies(tokens_BL, valid_NL)
  n = len(values_B)
  error = float(values_B.std(ddof=1) / math.sqrt(n)) if n > 1 else float("nan")
  return {"entropy": float(values_B.mean()), "entropy_se": error, "samples": n}


def retokenise(
  samples: Sequence[str] | Tokens,
  encode: Callable[[str], Sequence[int]],
  *,
  eos_id: int,
  decode: Callable[[Sequence[int]], str] | None = None,
  max_length: int = 1024,
) -> tuple[Int[np.ndarray, "N M"], Int[np.ndarray, "N M"]]:
  """Turn samples into a judge's tokens: decode, encode, truncate, pad with end of text.

  ```python
  judged, mask = retokenise(tokens_BL, gpt2.encode, decode=bpe.decode, eos_id=50256)
  genppl(judge, judged, mask_BL=mask, eos_id=50256)
  ```

  Args:
    samples: texts, or the generator's ids together with `decode`.
    encode: text to the judge's ids; it should map the end-of-text marker back to `eos_id`.
    eos_id: end-of-text id of the judge.
    decode: ids to text, special tokens kept; needed for ids.
    max_length: the judge's context, in tokens.

  Returns:
    Ids and attention mask, int32, as long as the longest sample.

  Raises:
    InputError: no samples, ids without `decode`, or `max_length` below 2.
  """
  if len(samples) == 0 or max_length < 2:
    raise InputError(
      f"retokenise got {len(samples)} samples and max_length={max_length}; it needs at least one "
      "sample and a length of 2."
    )
  if decode is not None:
    samples = [decode([int(token) for token in row]) for row in samples]
  elif not isinstance(samples[0], str):
    raise InputError("retokenise got ids without `decode`; give texts, or the decoder of the ids.")
  rows = [list(encode(text))[:max_length] for text in samples]
  length = max(2, *(len(row) for row in rows))  # two: also empty samples must have a target
  tokens_BL = np.full((len(rows), length), eos_id, np.int32)
  mask_BL = np.zeros((len(rows), length), np.int32)
  for i, row in enumerate(rows):
    tokens_BL[i, : len(row)] = row
    mask_BL[i, : len(row)] = 1
  return tokens_BL, mask_BL


def features(
  judge, tokens_BL: Tokens, *, batch_size: int = 8, mask_BL: Mask | None = None
) -> Float[np.ndarray, "B D"]:
  """Return a judge's hidden state at each sample's last attended token, for `mauve`.

  Args:
    judge: a `Judge` whose model has a `trunk`, such as `GPT2`.
    tokens_BL: samples in the judge's ids.
    batch_size: samples per evaluation.
    mask_BL: nonzero where tokens are no padding; None is everywhere.

  Raises:
    InputError: the judge's model has no `trunk`.
  """
  if not hasattr(judge.model, "trunk"):
    raise InputError(f"{type(judge.model).__name__} has no trunk to take features from; use GPT-2.")
  tokens_BL = np.asarray(tokens_BL, np.int32)
  n, length = tokens_BL.shape
  mask_BL = np.ones_like(tokens_BL) if mask_BL is None else np.asarray(mask_BL)
  last_B = np.maximum(length - 1 - np.argmax(mask_BL[:, ::-1] != 0, axis=1), 0)
  states = [
    np.asarray(_last_state(judge, tokens_BL[rows], mask_BL[rows], last_B[rows]))
    for rows in batches(n, batch_size)
  ]
  return np.concatenate(states)[:n]


@jax.jit
def _last_state(judge, tokens_BL, mask_BL, last_B) -> Float[Array, "B D"]:
  hidden_BLD = judge.model.apply(
    {"params": judge.params}, tokens_BL, mask_BL=mask_BL, method="trunk"
  )
  return jnp.take_along_axis(hidden_BLD, last_B[:, None, None], axis=1)[:, 0]


def mauve(
  generated_ND: Float[np.ndarray, "N D"],
  reference_MD: Float[np.ndarray, "M D"],
  *,
  scaling: float = 5.0,
  seeds: int = 5,
) -> dict[str, float]:
  """Return MAUVE between two sets of `features`: mean and spread over clustering seeds.

  Published numbers for these models do not say how they were measured; state sample counts and
  lengths with yours. Below about a thousand samples a side the value depends on their number.

  Args:
    generated_ND: features of samples.
    reference_MD: features of held-out text.
    scaling: the factor c of the divergence curve.
    seeds: number of k-means seeds.

  Returns:
    `mauve`, `mauve_std` over seeds, `samples`.

  Raises:
    InputError: the extra is not installed, or there are no seeds.

  Reference: MAUVE, arXiv 2102.01454.
  """
  if seeds < 1:
    raise InputError(f"seeds={seeds} must be at least 1.")
  try:
    import mauve as package
  except ImportError as error:
    raise InputError("MAUVE needs an extra: pip install 'dlm_jax[eval]'.") from error
  generated, reference = np.asarray(generated_ND), np.asarray(reference_MD)
  values = [
    package.compute_mauve(
      p_features=reference,
      q_features=generated,
      mauve_scaling_factor=scaling,
      seed=seed,
      verbose=False,
    ).mauve
    for seed in range(seeds)
  ]
  return {
    "mauve": float(np.mean(values)),
    "mauve_std": float(np.std(values)),
    "samples": len(generated),
  }
