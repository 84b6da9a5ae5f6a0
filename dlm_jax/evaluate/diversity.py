# SPDX-License-Identifier: Apache-2.0
"""Whether samples differ from each other and in themselves, which no average over samples shows."""

import numpy as np

from dlm_jax.errors import InputError, check_counts
from dlm_jax.evaluate.likelihood import Mask, Tokens


def distinct(tokens_BL: Tokens, n: int = 4, *, valid_NL: Mask | None = None) -> float:
  """Return the share of distinct n-grams among those of all samples.

  1 where none occurs twice. It falls with the number of samples, so compare equal numbers; an
  entropy is of one sample's tokens and does not see that samples, or phrases in them, repeat.

  Args:
    tokens_BL: samples; n-grams lie within one.
    n: tokens of an n-gram.
    valid_NL: False on what was given; an n-gram with such a token is left out. None: nothing was.

  Returns:
    NaN if there is no n-gram.

  Raises:
    InputError: n below 1, or flags of another shape.

  Reference: distinct-n, arXiv 1510.03055.
  """
  check_counts(n=n)
  tokens_BL = np.asarray(tokens_BL)
  valid_BL = np.ones(tokens_BL.shape, bool) if valid_NL is None else np.asarray(valid_NL, bool)
  if valid_BL.shape != tokens_BL.shape:
    raise InputError(
      f"valid_NL has shape {valid_BL.shape} and the samples {tokens_BL.shape}; one flag per token."
    )
  if tokens_BL.shape[1] < n:
    return float("nan")
  whole_BM = np.lib.stride_tricks.sliding_window_view(valid_BL, n, axis=1).all(axis=2)
  grams_Nn = np.lib.stride_tricks.sliding_window_view(tokens_BL, n, axis=1)[whole_BM]
  return len(np.unique(grams_Nn, axis=0)) / len(grams_Nn) if len(grams_Nn) else float("nan")
