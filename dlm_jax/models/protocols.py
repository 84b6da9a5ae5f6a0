# SPDX-License-Identifier: Apache-2.0
"""What a network must offer to be used somewhere: three Protocols, satisfied by having the methods.

Methods of a Linen module are called through `apply`: `model.apply(variables, …, method="head")`.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from dlm_jax.arrays import FloatB, FloatBKD, FloatBKV, FloatBLD, FloatBLV, IntBL
from dlm_jax.models.cache import KV, Cache


@runtime_checkable
class Denoiser(Protocol):
  """Predicts clean tokens from noisy ones and σ, in two halves: `DiT`, or anyone's network.

  Samplers of masks run `head` at the positions that they reveal, and at no others.
  """

  def trunk(self, tokens: Any, sigma_B: FloatB) -> FloatBLD:
    """Return hidden states of ids [B, L] or soft tokens [B, L, V]."""
    ...

  def head(self, hidden_BKD: FloatBKD, sigma_B: Any) -> FloatBKV:
    """Return float32 logits of hidden states at any positions."""
    ...


@runtime_checkable
class Cached(Protocol):
  """Reads on behind the keys and values of committed tokens: `Decoder`.

  What sees what among the tokens of a call is an argument, so that one network predicts next
  tokens, denoises blocks, and verifies drafts.
  """

  def extend(
    self, tokens_BQ: Int[Array, "B Q"], positions_BQ: Any, visible_BQQ: Any, cache: Cache | None
  ) -> tuple[Float[Array, "B Q D"], KV]:
    """Return hidden states of tokens, and their keys and values; the cache is only read."""
    ...

  def head(self, hidden_BKD: FloatBKD) -> FloatBKV:
    """Return float32 logits of hidden states at any positions."""
    ...


@runtime_checkable
class NextToken(Protocol):
  """Predicts at every position the token after it, from ids alone: `Causal`, `GPT2`.

  A `Cached` network is one under a causal mask: `next_token_logits` gives it that.
  """

  def __call__(self, tokens_BL: IntBL) -> FloatBLV:
    """Return float32 logits."""
    ...
