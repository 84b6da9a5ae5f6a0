# SPDX-License-Identifier: Apache-2.0
"""Networks and batches small enough to train a few steps in a test."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlm_jax import process
from dlm_jax.models import Causal, CausalConfig, Decoder, DecoderConfig, DiT, DiTConfig
from dlm_jax.objectives import draw_batch

V, L, B, MASK = 10, 4, 16, 6
_SIZES = {"vocab_size": V, "dim": 8, "layers": 2, "heads": 2, "length": L, "dtype": "float32"}
_DECODER = {"kv_heads": 1, "head_dim": 4, "mlp_dim": 16}
PROCESS = process.Absorbing(vocab_size=V, mask_id=MASK)
SCORE = process.AbsorbingScore(vocab_size=V, mask_id=MASK)
UNIFORM = process.Uniform(vocab_size=V)


def config(**changes):
  """Return the sizes of a tiny DiT."""
  return DiTConfig(**{**_SIZES, "cond_dim": 4, **changes})


@functools.cache
def network(kind=DiT, **changes):
  """Return a network of the given class and parameters away from their initial zeros."""
  if kind is Causal:
    model, sigma = Causal(CausalConfig(**{**_SIZES, "dropout": 0.2, **changes})), ()
  elif kind is Decoder:
    model, sigma = Decoder(DecoderConfig(**{**_SIZES, **_DECODER, **changes})), ()
  else:
    model = DiT(config(**{"dropout": 0.2, **changes}))
    sigma = (jax.ShapeDtypeStruct((1,), jnp.float32),)
  tokens = jax.ShapeDtypeStruct((1, L), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, *sigma)["params"]
  return model, random_params(shapes)


def random_params(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.asarray(
      (path[-1].key == "scale") + rng.normal(size=x.shape) * (0.5 if x.ndim > 1 else 0.1),
      jnp.float32,
    ),
    shapes,
  )


def axes(model):
  """Return the logical axis names of a network's parameters."""
  sigma = () if isinstance(model, Causal | Decoder) else (jnp.zeros((1,)),)
  return model.axes(jnp.zeros((1, L), jnp.int32), *sigma)


def tokens(seed=0, batch=B):
  """Draw token ids, never the mask."""
  ids = np.random.default_rng(seed).integers(0, V - 1, size=(batch, L))
  return jnp.asarray(ids + (ids >= MASK), jnp.int32)


def batch(seed=0, size=B, **features):
  """Return a batch as the loop draws it; `features` go beside the tokens."""
  record = {"tokens": tokens(seed, size), **features}
  return draw_batch(record, jax.random.key(100 + seed))


def prompted_batch(prompted=True):
  """Return a batch, half of it given and its first row whole, and what is valid of it."""
  drawn, valid = batch(), np.ones((B, L), bool)
  if prompted:
    valid = np.random.default_rng(0).random(valid.shape) < 0.5
    valid[0] = False
    drawn["valid"] = jnp.asarray(valid)
  return drawn, valid


def network_class(make):
  """Return the class that a method's `make` asks for; the first of several."""
  wanted = typing.get_type_hints(make)["model"]
  return wanted if isinstance(wanted, type) else typing.get_args(wanted)[0]


def process_for(make):
  """Return a process of the class that a method's `make` asks for; absorbing for several."""
  wanted = typing.get_type_hints(make).get("process")
  return {process.AbsorbingScore: SCORE, process.Uniform: UNIFORM}.get(wanted, PROCESS)


def setting(make):
  """Return (network, parameters, process) that suit a method's `make`."""
  forward = process_for(make)
  changes = {"time_conditioning": True} if forward is UNIFORM else {}
  return *network(network_class(make), **changes), forward


def equal(left, right):
  """Tell whether two trees hold the same numbers."""
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  return all(np.array_equal(a, b) for a, b in pairs)


def distillation(method, **options):
  """Return the objective of a method with one student, and its state on a tiny teacher."""
  model, params, forward = setting(method.make)
  optimizers = {"student": optax.adam(1e-2, eps=1e-3)}
  objective = method.make(model=model, process=forward, optimizers=optimizers, **options)
  return objective, objective.init(jax.random.key(0), params)
