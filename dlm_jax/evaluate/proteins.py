# SPDX-License-Identifier: Apache-2.0
"""What generated proteins are like: composition, novelty, diversity; and a hook for a fold scorer.

Identity of two sequences is 1 − d / max(length, length') with d the Levenshtein distance: the
fewest substitutions, insertions and deletions of residues, each costing 1. It is symmetric, 1 for
equal sequences only, needs no scoring matrix and has no ties to break; it never exceeds the share
of identical pairs in the alignment that d belongs to. Unrelated proteins of 200 residues have
about 0.2, so novelty is to be read beside that of held-out sequences.

d is exact: 64 rows of the dynamic programme are the bits of one word, and one numpy operation does
that for thousands of sequences. A sample against 20,000 sequences takes about a third of a second.

Reference: Myers, J. ACM 46 (1999), doi 10.1145/316542.316550; blocks as in Hyyrö (2003).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt64

from dlm_jax.errors import InputError

LETTERS = "ACDEFGHIKLMNPQRSTVWYBOUXZ"
_CODES = np.full(128, len(LETTERS), np.uint8)  # the last code stands for whatever else there is
_CODES[[ord(letter) for letter in LETTERS]] = np.arange(len(LETTERS))
_CHUNK = 4096  # sequences at a time: the working arrays then fit the processor's cache
_ONE, _ALL = np.uint64(1), ~np.uint64(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """What `measure` found out about a set of samples.

  Attributes:
    composition_kl: KL divergence of residue frequencies, samples from reference, in nats.
    novelty: mean over samples of 1 − identity to the nearest training sequence.
    novelty_se: its standard error; NaN for one sample.
    pairwise_identity: mean identity of two samples: low is diverse; NaN for one sample.
    samples: number of samples.
    compared: number of training sequences.
    score: mean of the scorer; None without one.
    score_se: its standard error.
  """

  composition_kl: float
  novelty: float
  novelty_se: float
  pairwise_identity: float
  samples: int
  compared: int
  score: float | None = None
  score_se: float | None = None

  def __str__(self) -> str:
    text = (
      f"composition KL {self.composition_kl:.4f} nats, novelty {self.novelty:.3f} ± "
      f"{self.novelty_se:.3f} to {self.compared:,} training sequences, pairwise identity "
      f"{self.pairwise_identity:.3f} ({self.samples:,} samples)"
    )
    return text if self.score is None else f"{text}, score {self.score:.2f} ± {self.score_se:.2f}"


def measure(
  samples: Sequence[str],
  *,
  reference: Sequence[str],
  training: Sequence[str],
  scorer: Callable[[list[str]], np.ndarray] | None = None,
  smoothing: float = 1.0,
) -> Scores:
  """Compare generated sequences with real ones.

  Args:
    samples: generated sequences.
    reference: held-out sequences, for the composition.
    training: sequences that the model was trained on, for novelty.
    scorer: one number per sequence, such as the mean pLDDT of a predicted structure:
      `scorer(["MKV…", …]) -> float [N]`. It is called once, with all samples.
    smoothing: see `composition_kl`.

  Raises:
    InputError: a set is empty, or the scorer returns another shape.

  Example:
    >>> measure(["ACDE", "ACDF"], reference=["ACDE"], training=["ACDE", "WWWW"]).novelty
    0.125
  """
  for name, texts in (("samples", samples), ("reference", reference), ("training", training)):
    if not any(texts):
      raise InputError(f"proteins: {name} holds no sequence.")
  novel_N = 1 - nearest_identity(samples, training)
  score_N = None if scorer is None else np.asarray(scorer(list(samples)), np.float64)
  if score_N is not None and score_N.shape != (len(samples),):
    raise InputError(
      f"scorer returned shape {score_N.shape} for {len(samples)} sequences; one number each."
    )
  return Scores(
    composition_kl=composition_kl(samples, reference, smoothing=smoothing),
    novelty=float(novel_N.mean()),
    novelty_se=_error(novel_N),
    pairwise_identity=pairwise_identity(samples),
    samples=len(samples),
    compared=len(training),
    score=None if score_N is None else float(score_N.mean()),
    score_se=None if score_N is None else _error(score_N),
  )


def _error(values_N) -> float:
  n = len(values_N)
  return float(values_N.std(ddof=1) / math.sqrt(n)) if n > 1 else float("nan")


def composition_kl(
  samples: Sequence[str], reference: Sequence[str], *, smoothing: float = 1.0
) -> float:
  """Return KL(samples ‖ reference) between residue frequencies, in nats.

  Frequencies are pooled over all sequences of a set, with `smoothing` added to the count of each
  of the 25 letters and of "anything else", in both sets.
  """
  counts = [
    np.bincount(np.concatenate([_encode(s) for s in texts]), minlength=len(LETTERS) + 1)
    for texts in (samples, reference)
  ]
  p, q = ((c + smoothing) / (c + smoothing).sum() for c in counts)
  return float(np.sum(p * np.log(p / q)))


def identity(a: str, b: str) -> float:
  """Return the identity of two sequences; of two empty ones it is 1."""
  return float(_Set([b]).identities(_encode(a), np.array([0]))[0])


def nearest_identity(samples: Sequence[str], training: Sequence[str]) -> Float[np.ndarray, "N"]:
  """Return every sample's identity to the training sequence that is most identical to it. Exact."""
  known = _Set(training)
  return np.array([known.nearest(_encode(sample)) for sample in samples])


def pairwise_identity(samples: Sequence[str]) -> float:
  """Return the mean identity over all pairs of samples; NaN if there are fewer than two."""
  if len(samples) < 2:
    return float("nan")
  all_ = _Set(samples)
  total, pairs = 0.0, len(samples) * (len(samples) - 1) // 2
  for i in range(len(samples) - 1):
    total += all_.identities(_encode(samples[i]), np.arange(i + 1, len(samples))).sum()
  return float(total / pairs)


def _encode(text: str) -> UInt8[np.ndarray, "L"]:
  return _CODES[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]


class _Set:
  """Sequences to compare with, as one array of codes padded to the longest."""

  def __init__(self, texts: Sequence[str]):
    rows = [_encode(text) for text in texts]
    self._length_N = np.array([len(row) for row in rows])
    self._codes_NL = np.zeros((len(rows), max(1, self._length_N.max())), np.uint8)
    for row, codes in zip(self._codes_NL, rows, strict=True):
      row[: len(codes)] = codes
    size = len(LETTERS) + 1
    self._counts_NV = np.stack([np.bincount(row, minlength=size) for row in rows]).astype(np.int32)

  def identities(self, codes_M: UInt8[np.ndarray, "M"], which_N) -> Float[np.ndarray, "N"]:
    """Return the identity of one sequence to each of the chosen ones."""
    which_N = np.asarray(which_N)
    order_N = np.argsort(-self._length_N[which_N], kind="stable")  # the longest first
    chosen_N = which_N[order_N]
    distance_N = np.empty(len(which_N), np.int64)
    for start in range(0, len(which_N), _CHUNK):
      part = slice(start, start + _CHUNK)
      rows = chosen_N[part]
      distance_N[order_N[part]] = _distances(codes_M, self._codes_NL[rows], self._length_N[rows])
    return 1 - distance_N / np.maximum(1, np.maximum(len(codes_M), self._length_N[which_N]))

  def nearest(self, codes_M: UInt8[np.ndarray, "M"]) -> float:
    """Return the highest identity to any sequence, looking only where it may lie."""
    counts_V = np.bincount(codes_M, minlength=self._counts_NV.shape[1])
    surplus_NV = self._counts_NV - counts_V[None]
    # Each edit removes at most one surplus residue and adds at most one missing residue.
    least_N = np.maximum(surplus_NV.clip(0).sum(1), (-surplus_NV).clip(0).sum(1))
    most_N = 1 - least_N / np.maximum(1, np.maximum(len(codes_M), self._length_N))
    order_N, best, start, size = np.argsort(-most_N, kind="stable"), 0.0, 0, 256
    while start < len(order_N) and most_N[order_N[start]] > best:
      block = order_N[start : start + size]
      block = block[most_N[block] > best]
      best = max(best, float(self.identities(codes_M, block).max()))
      start, size = start + size, _CHUNK
    return best


def _distances(
  codes_M: UInt8[np.ndarray, "M"],
  codes_NL: UInt8[np.ndarray, "N L"],
  length_N: Int[np.ndarray, "N"],
) -> Int[np.ndarray, "N"]:
  """Return the Levenshtein distances of one sequence to several, sorted by falling length.

  The columns of the dynamic programme run over the several, its rows over the one; of a column
  only the steps between rows are kept: +1 in the bits of `plus`, −1 in those of `minus`.
  """
  m, n = len(codes_M), len(length_N)
  if not m:
    return length_N.astype(np.int64)
  words, last = (m + 63) // 64, np.uint64((m - 1) % 64)
  equal_WV = np.zeros((words, len(LETTERS) + 1), np.uint64)
  for i, code in enumerate(codes_M):
    equal_WV[i // 64, code] |= _ONE << np.uint64(i % 64)
  plus_WN, minus_WN = np.full((words, n), _ALL), np.zeros((words, n), np.uint64)
  distance_N = np.full(n, m, np.int64)
  columns_LN = np.ascontiguousarray(codes_NL.T)
  active_L = n - np.searchsorted(length_N[::-1], np.arange(length_N[0]), side="right")
  for column_N, active in zip(columns_LN, active_L, strict=False):
    codes = column_N[:active]
    up, down = np.ones(active, np.uint64), np.zeros(active, np.uint64)  # row 0 is 0, 1, 2, …
    for w in range(words):
      shift = last if w == words - 1 else np.uint64(63)
      plus, minus = plus_WN[w, :active], minus_WN[w, :active]
      up, down = _advance(equal_WV[w][codes], plus, minus, up, down, shift)
    distance_N[:active] += up.astype(np.int64) - down.astype(np.int64)
  return distance_N


def _advance(
  equal: UInt64[np.ndarray, "N"], plus, minus, up, down, shift
) -> tuple[UInt64[np.ndarray, "N"], UInt64[np.ndarray, "N"]]:
  """Move 64 rows to the next column in place; return the step of their last row, up and down."""
  vertical = equal | minus
  equal |= down
  horizontal = (((equal & plus) + plus) ^ plus) | equal
  rise = minus | ~(horizontal | plus)
  fall = plus & horizontal
  out = (rise >> shift) & _ONE, (fall >> shift) & _ONE
  rise = (rise << _ONE) | up
  fall = (fall << _ONE) | down
  np.bitwise_or(fall, ~(vertical | rise), out=plus)
  np.bitwise_and(rise, vertical, out=minus)
  return out
