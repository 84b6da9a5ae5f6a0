# SPDX-License-Identifier: Apache-2.0
"""What a machine can do at best: matrix products and copies; and what a network asks of it."""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax import models
from dlm_jax.bench.measure import timed
from dlm_jax.models import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Ceilings of one device, measured.

  Attributes:
    matmul: operations per second of a large square product, two per multiply-add.
    copy: bytes per second, read and written, of a large array copied with an addition.
  """

  matmul: float
  copy: float


def measure(dtype: str, repeats: int = 10) -> Limits:
  """Measure one device.

  Args:
    dtype: of the product; accumulated in float32.
    repeats: measurements, of which the median counts.
  """
  small = jax.default_backend() == "cpu"
  size, count = (1024, 2**24) if small else (8192, 2**28)
  rng = jax.random.key(0)
  a, b = jax.random.normal(rng, (2, size, size), jnp.dtype(dtype))
  product = lambda a, b: layers.matmul(a, b, a.dtype, a.dtype)  # noqa: E731
  matmul = 2 * size**3 / timed(product, a, b, repeats=repeats).seconds
  x = jax.random.normal(rng, (count,))
  copy = 8 * count / timed(lambda x: x + 1.0, x, repeats=repeats).seconds
  return Limits(matmul=matmul, copy=copy)


def trunk_operations(config: models.DiTConfig, batch: int) -> float:
  """Return operations of a forward pass without embedding and head, two per multiply-add.

  Products with weights and attention count; norms, modulation and rotary do not.
  """
  weights = 2 * (4 + 2 * config.mlp_ratio) * config.dim**2
  attention = 4 * config.length * config.dim
  return float(batch * config.length * config.layers * (weights + attention))


def head_operations(config: models.DiTConfig, batch: int) -> float:
  """Return operations of the vocabulary head at all positions."""
  return 2.0 * batch * config.length * config.dim * config.vocab_size


def forward_operations(config: models.DiTConfig, batch: int) -> float:
  """Return operations of a whole forward pass; a backward pass takes twice that."""
  return trunk_operations(config, batch) + head_operations(config, batch)


def attention_operations(batch: int, length: int, heads: int, channels: int) -> float:
  """Return operations of a full attention forward pass; a backward pass takes 2.5 times that."""
  return 4.0 * batch * length**2 * heads * channels
