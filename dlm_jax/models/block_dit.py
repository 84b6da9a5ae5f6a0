# SPDX-License-Identifier: Apache-2.0
"""The DiT of BD3-LM: a denoiser's parameters, a decoder's interface."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.arrays import FloatBKD, FloatBKV, FloatBLD, FloatBLV, IntBL
from dlm_jax.errors import InputError
from dlm_jax.mesh import split_batch
from dlm_jax.models.cache import KV, Cache
from dlm_jax.models.dit import DiTConfig, Head, TimeEmbedding, modulation, scan_layers
from dlm_jax.models.grouped_attention import attend_grouped
from dlm_jax.models.layers import MLP, Embedding, LayerNorm, Linear, Network, rotary_at, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiTConfig(DiTConfig):
  """Shape and policies of a `BlockDiT`; the fields of `DiTConfig`, no time and no dropout in use.

  Raises:
    InputError: as `DiTConfig`, or time conditioning.
  """

  def __post_init__(self):
    super().__post_init__()
    if self.mask_noise:
      raise InputError("model.mask_noise must be 0: blocks are decoded without noise.")
    if self.time_conditioning:
      raise InputError("model.time_conditioning must be False: blocks have no time of their own.")

  @property
  def kv_heads(self) -> int:
    """Heads of keys and values, as a cache asks."""
    return self.heads

  @property
  def head_dim(self) -> int:
    """Channels of a head, as a cache asks."""
    return self.dim // self.heads


class _Attention(nn.Module):
  """The DiT's attention under a mask, and over a cache."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BQD, past, rope, visible_BQQ):
    """Return the mixed values [B, Q, D] and this call's (keys, values) [B, Q, H, C]."""
    batch, queries, dim = x_BQD.shape
    qkv = Linear(3 * dim, ("embed", "heads"), dtype=self.dtype, name="qkv")(x_BQD)
    q, k, v = jnp.split(qkv.reshape(batch, queries, 3 * self.heads, -1), 3, axis=2)
    q, k = rotate(q, *rope), rotate(k, *rope)
    out = attend_grouped(q, k, v, visible_BQQ, past).reshape(x_BQD.shape)
    return Linear(dim, ("heads", "embed"), dtype=self.dtype, name="out")(out), (k, v)


class _Block(nn.Module):
  """The DiT's block, modulated by a constant, under a mask."""

  config: BlockDiTConfig

  @nn.compact
  def __call__(self, x_BQD, past, c_BC, rope, seen_BS, visible_BQQ):
    cfg = self.config
    dtype = jnp.dtype(cfg.dtype)
    x_BQD = split_batch(x_BQD)
    terms = jnp.split(modulation(6 * cfg.dim, "modulation")(c_BC)[:, None, :], 6, axis=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = terms
    past = None if past is None else (*past, seen_BS)
    h = LayerNorm(name="norm1")(x_BQD, shift1, scale1)
    h, kv = _Attention(cfg.heads, dtype, name="attention")(h, past, rope, visible_BQQ)
    x_BQD += gate1 * h
    h = LayerNorm(name="norm2")(x_BQD, shift2, scale2)
    x_BQD += gate2 * MLP(cfg.mlp_ratio * cfg.dim, dtype, name="mlp")(h)
    return x_BQD, kv


class BlockDiT(Network):
  """Denoiser of blocks with the parameters of a `DiT` and the methods of a `Decoder`.

  `apply({"params": p}, tokens_BL, positions_BL, visible_BLL)` returns float32 logits [B, L, V] for
  the tokens at the positions themselves; see `Decoder` for its arguments, parts and cache.

  Reference: BD3-LM, arXiv 2503.09573.
  """

  config: BlockDiTConfig

  def setup(self):
    cfg = self.config
    self.embed = Embedding(cfg.vocab_size, cfg.dim, cfg.gradient_of_embedding, jnp.dtype(cfg.dtype))
    self.time = TimeEmbedding(cfg.cond_dim)
    self.blocks = scan_layers(_Block, cfg, broadcast=4)
    self.output = Head(cfg)

  def __call__(
    self,
    tokens_BL: IntBL,
    positions_BL: Int[Array, "#B L"] | None = None,
    visible_BLL: Bool[Array, "#B L L"] | None = None,
  ) -> FloatBLV:
    return self.head(self.trunk(tokens_BL, positions_BL, visible_BLL))

  def trunk(
    self,
    tokens_BL: IntBL,
    positions_BL: Int[Array, "#B L"] | None = None,
    visible_BLL: Bool[Array, "#B L L"] | None = None,
  ) -> FloatBLD:
    """Return the residual stream after the last block, float32."""
    return self.extend(tokens_BL, positions_BL, visible_BLL, None)[0]

  def head(self, hidden_BKD: FloatBKD) -> FloatBKV:
    """Return float32 logits of hidden states at any positions."""
    return self.output(hidden_BKD, self.time(jnp.zeros((1,))))

  def extend(
    self,
    tokens_BQ: Int[Array, "B Q"],
    positions_BQ: Int[Array, "#B Q"] | None,
    visible_BQQ: Bool[Array, "#B Q Q"] | None,
    cache: Cache | None,
  ) -> tuple[Float[Array, "B Q D"], KV]:
    """Return hidden states, and the keys and values of these tokens; see `Decoder.extend`."""
    cfg = self.config
    if positions_BQ is None:
      positions_BQ = jnp.arange(tokens_BQ.shape[1])[None]
      positions_BQ += 0 if cache is None else cache.length_B[:, None]
    rope = rotary_at(positions_BQ, cfg.head_dim)
    past = seen_BS = None
    if cache is not None:
      past = (cache.k_NBSGC, cache.v_NBSGC)
      seen_BS = jnp.arange(cache.capacity)[None, :] < cache.length_B[:, None]
    x_BQD, condition = self.embed(tokens_BQ), self.time(jnp.zeros((1,)))
    x_BQD, (k, v) = self.blocks(x_BQD, past, condition, rope, seen_BS, visible_BQQ)
    return x_BQD, KV(k, v)
