# SPDX-License-Identifier: Apache-2.0
"""Documents in rows of whole blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import process
from dlm_jax.data.packing import pack_blocks
from dlm_jax.errors import InputError
from dlm_jax.objectives import block_diffusion


def pack(documents, length, block_length, pad_id, prompts=None):
  """Return rows as a batch; `prompts`: leading tokens of each document that are given."""
  prompts = prompts or [0] * len(documents)
  marked = [(d, [i >= p for i in range(len(d))]) for d, p in zip(documents, prompts, strict=True)]
  rows = list(pack_blocks(marked, length, block_length, pad_id))
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_documents_are_padded_to_whole_blocks():
  """1.5: pads up to the block are scored, prompts and the rest of the row are not."""
  rows = pack([[1, 2, 3, 4, 5], [6, 7], [8] * 9], 12, 4, 0, prompts=[2, 0, 8])
  np.testing.assert_array_equal(
    rows["tokens"], [[1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 0, 0], [8] * 9 + [0] * 3]
  )
  np.testing.assert_array_equal(rows["position"][0], [*range(8), *range(4)])
  np.testing.assert_array_equal(rows["segment"][0], [1] * 8 + [2] * 4)
  np.testing.assert_array_equal(rows["segment"][1], [1] * 12)
  np.testing.assert_array_equal(rows["valid"][0], [False] * 2 + [True] * 10)
  np.testing.assert_array_equal(rows["valid"][1], [False] * 8 + [True] * 4)


def test_the_rest_of_a_row_is_a_document():
  rows = pack([[1, 2, 3], [5, 6, 7, 8, 9]], 8, 2, 0)
  assert rows["tokens"].shape == (2, 8)
  np.testing.assert_array_equal(rows["position"][0], [0, 1, 2, 3, 0, 1, 2, 3])
  np.testing.assert_array_equal(rows["segment"], [[1] * 4 + [0] * 4, [1] * 6 + [0] * 2])
  np.testing.assert_array_equal(rows["valid"], [[True] * 4 + [False] * 4, [True] * 6 + [False] * 2])


def test_a_batch_of_rows_is_noised():
  rows = pack([[1, 2, 3], [5, 6, 7, 8, 9]], 8, 2, 0, prompts=[1, 1])
  noise = process.BlockNoise(process=process.Absorbing(vocab_size=11, mask_id=10))
  batch = {key: jnp.asarray(value) for key, value in rows.items()}
  batch["rng"] = jax.random.split(jax.random.key(0), 2)
  noisy = block_diffusion.with_noise(batch, noise=noise, block_length=1)
  np.testing.assert_array_equal(noisy["noisy"] == 10, rows["valid"])
  np.testing.assert_array_equal(noisy["document"][0], [0] * 4 + [1] * 4)
  np.testing.assert_allclose(noisy["count"], rows["valid"].sum() / 2)


@pytest.mark.parametrize(
  "documents, length",
  [([([1] * 5, [True] * 5)], 4), ([([1], [True])], 5), ([([1], [True] * 2)], 4), ([([], [])], 4)],
)
def test_what_does_not_fit(documents, length):
  with pytest.raises(InputError):
    list(pack_blocks(documents, length, 2, 0))
