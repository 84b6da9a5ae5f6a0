# SPDX-License-Identifier: Apache-2.0
"""One changed bit changes the sum of an array, wherever the array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dlm_jax import mesh
from dlm_jax.train import checksums

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_, jnp.uint8)


def _values(dtype, shape=(6, 40, 8)):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape) * 3).astype(dtype)


@pytest.mark.parametrize("dtype", _DTYPES)
def test_host_and_devices_agree(dtype, monkeypatch):
  values = _values(dtype)
  devices = mesh.make(2, 2, 1, devices=jax.devices()[:4])
  sharding = NamedSharding(devices, PartitionSpec("data", "fsdp"))
  tree = {"a": values, "b": jax.device_put(values, sharding), "c": values[0, 0, 0], "d": values[:0]}
  here = checksums.of_tree(tree)
  monkeypatch.setattr(checksums, "_is_here", lambda value: False)
  assert checksums.of_tree(tree) == here
  assert here[0] == here[1] != here[2] and here[3] == 0


@pytest.mark.parametrize("at_once", [2**16, 7])
def test_every_bit_counts(at_once, monkeypatch):
  monkeypatch.setattr(checksums, "_AT_ONCE", at_once)
  values = np.asarray(_values(jnp.float32, (5, 7)))
  sums = {checksums.of_tree(values)[0]}
  for place in range(values.size):
    for bit in range(32):
      changed = values.copy()
      changed.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
      sums.add(checksums.of_tree(changed)[0])
  assert len(sums) > values.size * 32 - 2, "all differ but for chance"
  assert checksums.of_tree(values[::-1]) != checksums.of_tree(values), "places count"


def test_json():
  data = {"loader": {"step": 3, "buckets": (1, 2)}, "evaluator": {"best": None, "x": 0.1}}
  again = {"evaluator": {"x": 0.1, "best": None}, "loader": {"buckets": [1, 2], "step": 3}}
  assert checksums.of_json(data) == checksums.of_json(again)
  assert checksums.of_json(data) != checksums.of_json({**data, "evaluator": {}})
