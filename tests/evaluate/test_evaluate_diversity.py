# SPDX-License-Identifier: Apache-2.0
"""Distinct n-grams: by hand, over samples, and only of what was drawn."""

import math

import numpy as np
import pytest

from dlm_jax.errors import InputError
from dlm_jax.evaluate import diversity, generative


def test_distinct_by_hand():
  tokens = np.array([[1, 2, 1, 2, 1], [1, 2, 1, 2, 3]])
  # 1212 2121 | 1212 2123: three of four
  assert diversity.distinct(tokens) == 3 / 4
  assert diversity.distinct(tokens, 1) == 3 / 10
  # 12 21 12 21 | 12 21 12 23
  assert diversity.distinct(tokens, 2) == 3 / 8


def test_samples_that_are_copies_of_each_other_are_seen():
  """Their entropy is that of any one of them."""
  one = np.random.default_rng(0).permutation(64)[None]
  assert diversity.distinct(one) == 1.0
  copies = np.repeat(one, 8, axis=0)
  assert diversity.distinct(copies) == 1 / 8
  assert generative.entropy(copies)["entropy"] == generative.entropy(one)["entropy"]


def test_what_was_given_is_left_out():
  tokens = np.array([[7, 7, 1, 2, 3, 4], [7, 7, 1, 2, 3, 5]])
  valid = np.array([[False, False, True, True, True, True]] * 2)
  assert diversity.distinct(tokens) == 4 / 6
  assert diversity.distinct(tokens, valid_NL=valid) == 1.0
  assert math.isnan(diversity.distinct(tokens, 5, valid_NL=valid))
  assert math.isnan(diversity.distinct(tokens, 7))


def test_rejects():
  with pytest.raises(InputError, match="n=0"):
    diversity.distinct(np.zeros((1, 4), int), 0)
