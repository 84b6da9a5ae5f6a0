# SPDX-License-Identifier: Apache-2.0
"""Tiny decoders with weights large enough that logits vary by several units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.models import Decoder, DecoderConfig

V = 40
DENSE = DecoderConfig(
  vocab_size=V,
  dim=32,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  length=64,
  dtype="float32",
)
EXPERTS = {"experts": 5, "experts_per_token": 2, "expert_dim": 16}


def filled(shapes, seed=0):
  """Return parameters of the given shapes: normal, of variance 2/fan_in; scales around 1."""
  leaves, structure = jax.tree.flatten_with_path(shapes)
  rng, values = np.random.default_rng(seed), []
  for path, leaf in leaves:
    noise = rng.normal(size=leaf.shape)
    scale = path[-1].key == "scale"
    value = 1 + 0.3 * noise if scale else noise * (2 / leaf.shape[-2]) ** 0.5
    values.append(jnp.asarray(value if path[0].key != "embed" else noise, jnp.float32))
  return jax.tree.unflatten(structure, values)


@functools.cache
def make(config=DENSE, seed=0):
  """Return a network and parameters."""
  model = Decoder(config)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return model, filled(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"], seed)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens, positions=None, visible=None):
  return model.apply({"params": params}, tokens, positions, visible)


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, tokens, positions, visible, cache):
  return model.apply({"params": params}, tokens, positions, visible, cache, method="extend")


@functools.partial(jax.jit, static_argnums=0)
def head(model, params, hidden):
  return model.apply({"params": params}, hidden, method="head")


def tokens(batch, length, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, V, size=(batch, length)), jnp.int32)
