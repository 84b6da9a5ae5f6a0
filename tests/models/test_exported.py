# SPDX-License-Identifier: Apache-2.0
"""`jax.export` stores functions of a denoiser: its network comes back as class and config."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from dlm_jax import models, process, sample
from dlm_jax.errors import InputError
from dlm_jax.models.exported import from_bytes, to_bytes

SIZES = {"vocab_size": 9, "dim": 8, "heads": 2, "layers": 1, "length": 4}
DECODER = {"kv_heads": 1, "head_dim": 4, "mlp_dim": 8}
NETWORKS = [
  models.DiT(models.DiTConfig(**SIZES, time_conditioning=True, dropout=0.25)),
  models.BlockDiT(models.BlockDiTConfig(**SIZES)),
  models.Causal(models.CausalConfig(**SIZES)),
  models.Decoder(models.DecoderConfig(**SIZES, **DECODER)),
  models.Decoder(
    models.DecoderConfig(**SIZES, **DECODER, yarn=models.Yarn(factor=2.0, original_length=4))
  ),
  models.Discriminator(models.DiTConfig(**SIZES)),
]


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: type(model).__name__)
def test_a_network_comes_back(model):
  """Equal, and of equal hash: it is part of a compiled function's key."""
  (found,) = from_bytes(to_bytes((model,)))
  assert found == model and hash(found) == hash(model) and found is not model
  other = model.clone(config=dataclasses.replace(model.config, layers=2))
  assert from_bytes(to_bytes((other,))) != (model,)


class Strange(nn.Module):
  width: int = 3


def test_a_network_of_ones_own_is_refused():
  with pytest.raises(InputError, match="cannot store a Strange, which is no network of dlm_jax"):
    to_bytes((Strange(),))


def _denoiser():
  params = NETWORKS[0].init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))
  return models.Denoiser(NETWORKS[0], params["params"])


def test_an_exported_function_of_a_denoiser_runs_and_is_stored():
  proc, denoiser = process.Absorbing(vocab_size=9, mask_id=8), _denoiser()

  @jax.jit
  def draw(denoiser, data):
    rng = jax.random.wrap_key_data(data)
    return sample.generate(denoiser, proc, rng, batch=2, length=4, steps=2)

  data = jax.random.key_data(jax.random.key(1))
  exported = export.export(draw)(denoiser, data)
  wanted = draw(denoiser, data)
  np.testing.assert_array_equal(exported.call(denoiser, data), wanted)
  pytest.importorskip("flatbuffers", reason="jax.export needs it to write bytes")
  again = export.deserialize(exported.serialize())
  np.testing.assert_array_equal(again.call(denoiser, data), wanted)
