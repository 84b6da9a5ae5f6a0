# SPDX-License-Identifier: Apache-2.0
"""Any function of tokens and noise that gives logits, as a denoiser."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dlm_jax.arrays import FloatB, FloatBKV, FloatBLV, IntBL

Logits = Callable[[IntBL, FloatB], FloatBLV]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class FromLogits:
  """A denoiser whose hidden states are its logits: see `from_logits`."""

  function: Any

  def __call__(self, tokens_BL: IntBL, sigma_B: FloatB) -> FloatBLV:
    """Return float32 logits."""
    return self.function(tokens_BL, sigma_B).astype(jnp.float32)

  def trunk(self, tokens_BL: IntBL, sigma_B: FloatB) -> FloatBLV:
    """Return what `head` reads: all logits."""
    return self(tokens_BL, sigma_B)

  def head(self, logits_BKV: FloatBKV, sigma_B: FloatB) -> FloatBKV:
    """Return the logits of gathered positions: themselves."""
    del sigma_B
    return logits_BKV

  def tree_flatten(self):
    """Return a function that is a pytree as a child, any other as static data."""
    if jax.tree_util.all_leaves([self.function]):
      return (), self.function
    return (self.function,), None

  @classmethod
  def tree_unflatten(cls, static, children):
    """Return the denoiser of `tree_flatten`'s parts."""
    return cls(*children) if children else cls(static)


def from_logits(function: Logits) -> FromLogits:
  """Return a denoiser, for every sampler here, of a function that gives logits.

  Equinox, NNX, Haiku, a closure: any `function(tokens_BL, sigma_B) -> logits_BLV` will do. The head
  then runs on all positions, not only on those that a step reveals. The denoiser may be an argument
  of a jitted function: a function that is a pytree itself (`jax.tree_util.Partial`, an Equinox
  module) is traced with its arrays, any other is static.

  Args:
    function: (tokens int32 [B, L], σ = −log α float32 [B]) -> logits [B, L, V].

  Example:
    >>> import jax
    >>> from dlm_jax import process, sample
    >>> denoiser = sample.from_logits(lambda tokens_BL, sigma_B: jax.nn.one_hot(tokens_BL, 9))
    >>> proc = process.Absorbing(vocab_size=9, mask_id=8)
    >>> sample.generate(denoiser, proc, jax.random.key(0), batch=2, length=4, steps=2).shape
    (2, 4)
  """
  return FromLogits(function)
