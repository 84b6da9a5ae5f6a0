# SPDX-License-Identifier: Apache-2.0
"""Denoising shown as text."""

import numpy as np

from dlm_jax import viz
from dlm_jax.data import tokenizers

BYTES = tokenizers.Bytes()
M = BYTES.mask_id


def _ids(text):
  return [M if c == "_" else ord(c) for c in text]


def test_one_paragraph_per_step():
  trace = np.asarray([_ids("__c_"), _ids("a_c_"), _ids("abcd")])
  assert viz.terminal(trace, BYTES, colour=False) == (
    "step 1: 1 of 4 tokens\n··c·\n\nstep 2: 2 of 4 tokens\na·c·\n\nstep 3: 4 of 4 tokens\nabcd"
  )


def test_new_tokens_are_coloured_and_old_ones_are_not():
  trace = np.asarray([_ids("a___"), _ids("ab_d")])
  first, second = viz.terminal(trace, BYTES, mask="?").split("\n\n")
  new, reset = "\x1b[1;32m", "\x1b[0m"
  assert first.endswith(f"{new}a{reset}???")
  assert second.endswith(f"\na{new}b{reset}?{new}d{reset}")


def test_characters_of_several_tokens_stay_whole():
  """The two bytes of é are revealed together: decoded as one run."""
  trace = np.asarray([[M, *"é".encode(), M]])
  assert viz.terminal(trace, BYTES, colour=False).endswith("·é·")
