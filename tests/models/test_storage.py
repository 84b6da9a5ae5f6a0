# SPDX-License-Identifier: Apache-2.0
"""Parameters kept by layer, or fused: the same function, the same bytes, no slices of a stack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny

from dlm_jax import convert, models
from dlm_jax.errors import InputError

DENSE = dataclasses.replace(tiny.DENSE, layers=2)
EXPERTS = dataclasses.replace(DENSE, **tiny.EXPERTS)


@pytest.mark.parametrize("storage", ["layers", "fused"])
@pytest.mark.parametrize(
  "config", [DENSE, pytest.param(EXPERTS, marks=pytest.mark.slow)], ids=["dense", "experts"]
)
def test_the_function_is_the_same(config, storage):
  """Logits, hidden states after a cache, and keys and values."""
  stacked = tiny.make(config)
  other = models.regroup(*stacked, storage)
  tokens = tiny.tokens(2, 7)
  a, b = (tiny.logits(*network, tokens) for network in (stacked, other))
  np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)
  results = []
  for model, params in (stacked, other):
    cache = models.Cache.make(config, 2, 8)
    _, kv = tiny.extend(model, params, tokens[:, :4], None, None, cache)
    cache = models.commit(cache, kv, jnp.asarray([4, 2]))
    results.append(tiny.extend(model, params, tokens[:, 4:], None, None, cache))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-4), *results)


@pytest.mark.parametrize("storage", ["layers", "fused"])
def test_the_tree_is_what_the_network_makes(storage):
  model, params = models.regroup(*tiny.make(), storage)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tiny.tokens(1, 1))["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
  assert count(params) == count(tiny.make()[1])


def test_nothing_of_the_weights_is_sliced():
  """The compiled program of a stack slices it in a loop; that of layers takes them as they are."""
  config = dataclasses.replace(tiny.DENSE, dim=256, mlp_dim=512, layers=4)
  largest = 256 * 512

  def slices(model, params):
    jaxpr = str(jax.make_jaxpr(lambda p, t: tiny.logits(model, p, t))(params, tiny.tokens(1, 2)))
    return "scan[" in jaxpr or f"[1,{largest // 512},512]" in jaxpr

  stacked = tiny.make(config)
  assert slices(*stacked) and not slices(*models.regroup(*stacked, "layers"))


def test_consumed_parameters_are_gone():
  model, params = tiny.make(tiny.DENSE, seed=3)
  params = jax.tree.map(jnp.copy, params)
  _, other = models.regroup(model, params, "fused", consume=True)
  assert all(x.is_deleted() for x in jax.tree.leaves(params["blocks"]))
  assert not any(x.is_deleted() for x in jax.tree.leaves(other))


def test_what_is_refused(tmp_path):
  model, params = tiny.make()
  assert models.regroup(model, params, "stacked") == (model, params)
  with pytest.raises(ValueError, match=r"model\.storage=.flat. is unknown; use stacked, layers"):
    models.regroup(model, params, "flat")
  other = models.regroup(model, params, "layers")
  with pytest.raises(ValueError, match="already; give stacked ones"):
    models.regroup(*other, "fused")
  with pytest.raises(ValueError, match=r"model\.remat=.full. needs"):
    dataclasses.replace(tiny.DENSE, remat="full", storage="layers")
  with pytest.raises(InputError, match="regroup the parameters after loading"):
    convert.save(tmp_path / "out", *other)


def test_a_network_that_knows_no_other_storage():
  config = models.BlockDiTConfig(vocab_size=5, dim=4, cond_dim=2, layers=1, heads=1, length=4)
  model, params = models.BlockDiT(config), {"blocks": jnp.ones(3)}
  for storage in models.STORAGES:
    assert models.regroup(model, params, storage) == (model, params)
