# SPDX-License-Identifier: Apache-2.0
"""The decoder of Qwen3, SDAR and their relatives: one network, any attention mask.

Whether a checkpoint predicts the token at a position (SDAR) or the next one (Qwen3, I-DLM), and
what a position may see, is the caller's business: masks are in `models.masks`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.arrays import FloatBKD, FloatBKV, FloatBLD, FloatBLV, IntBL
from dlm_jax.errors import InputError
from dlm_jax.fields import Number
from dlm_jax.mesh import split_batch
from dlm_jax.models.cache import KV, Cache
from dlm_jax.models.dit import check_fields, scan_layers
from dlm_jax.models.experts import Experts, GatedMLP
from dlm_jax.models.grouped_attention import GroupedAttention
from dlm_jax.models.layers import Embedding, Linear, Network, RMSNorm, rotary_at
from dlm_jax.models.storage import STORAGES, Layers
from dlm_jax.models.yarn import Yarn

_MOST_EXPERTS = 2**18  # of all layers: each has tensors of its own in a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Shape and policies of a decoder.

  Attributes:
    vocab_size: V, the rows of the embedding; more than the tokenizer has ids.
    dim: width D.
    layers: number of blocks.
    heads: query heads.
    kv_heads: key/value heads; must divide `heads`.
    head_dim: channels of a head, even; heads × head_dim need not be D.
    mlp_dim: width of the gated feed-forward layer; unused with experts.
    length: maximum number of positions.
    rope_theta: rotary base.
    yarn: how positions are stretched beyond the trained length; None: they are not.
    eps: of every RMSNorm.
    tied: the head is the embedding.
    experts: 0, or the number of feed-forward experts per layer.
    experts_per_token: how many of them a token visits.
    expert_dim: width of one expert.
    normalize_gate: the router's chosen probabilities are made to sum to 1.
    dtype: of matrix products and the cache. Weights stored in it are read as they are.
    remat: what the backward pass recomputes: "none", "dots" or "full"; see `DiTConfig`.
    unroll: how many layers one turn of the layer loop holds.
    storage: how parameters are kept: "stacked", or for decoding "layers" or "fused"; see
      `models.regroup`, which makes the latter.
  """

  vocab_size: int
  dim: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  length: int = 32768
  rope_theta: float = 1e6
  yarn: Yarn | None = None
  eps: float = 1e-6
  tied: bool = False
  experts: int = 0
  experts_per_token: int = 0
  expert_dim: int = 0
  normalize_gate: bool = True
  dtype: str = "bfloat16"
  remat: str = "none"
  unroll: int = 1
  storage: str = "stacked"

  def __post_init__(self):
    check_fields(self)
    for name in ("rope_theta", "eps"):
      Number("(0, ∞)").check(f"model.{name}", getattr(self, name))
    if self.storage not in STORAGES:
      raise InputError(f"model.storage={self.storage!r} is unknown; use {', '.join(STORAGES)}.")
    if self.storage != "stacked" and self.remat != "none":
      raise InputError(f"model.remat={self.remat!r} needs model.storage='stacked'.")
    if self.heads % self.kv_heads:
      raise InputError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}.")
    if self.head_dim % 2:
      raise InputError(f"model.head_dim={self.head_dim} must be even.")
    if self.layers * self.experts > _MOST_EXPERTS:
      raise InputError(
        f"model.experts={self.experts} in model.layers={self.layers} are more than {_MOST_EXPERTS}."
      )
    if self.experts and self.expert_dim < 1:
      raise InputError(
        f"model.experts={self.experts} of width model.expert_dim={self.expert_dim} must be at "
        "least 1 each; experts=0 is none."
      )
    if self.experts and not 1 <= self.experts_per_token <= self.experts:
      raise InputError(
        f"model.experts_per_token={self.experts_per_token} must be in 1 … {self.experts}."
      )


class DecoderBlock(nn.Module):
  """Pre-norm attention and a gated feed-forward layer, or experts."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_BQD, past, rope, seen_BS, visible_BQQ):
    """Return the residual stream and this layer's (keys, values)."""
    cfg = self.config
    dtype = jnp.dtype(cfg.dtype)
    x_BQD = split_batch(x_BQD)
    attention = GroupedAttention(
      cfg.heads,
      cfg.kv_heads,
      cfg.head_dim,
      cfg.eps,
      dtype,
      cfg.storage == "fused",
      name="attention",
    )
    past = None if past is None else (*past, seen_BS)
    h, kv = attention(RMSNorm(cfg.eps, name="norm1")(x_BQD), past, rope, visible_BQQ)
    x_BQD += h
    if cfg.experts:
      feed = Experts(
        cfg.experts,
        cfg.experts_per_token,
        cfg.expert_dim,
        cfg.normalize_gate,
        dtype,
        name="experts",
      )
    else:
      feed = GatedMLP(cfg.mlp_dim, dtype, cfg.storage == "fused", name="mlp")
    x_BQD += feed(RMSNorm(cfg.eps, name="norm2")(x_BQD))
    return x_BQD, kv


class Decoder(Network):
  """Decoder of the Qwen3 family: grouped queries, normalised queries and keys, rotary, gated MLP.

  `apply({"params": p}, tokens_BL, positions_BL, visible_BLL)` returns float32 logits [B, L, V].
  Positions are any integers, repeats included; None counts from 0. `visible_BLL[b, q, k]` says
  whether q sees k, [1, L, L] is shared by the rows; None lets every position see every other:
  nothing is causal unless the mask is.

  In parts: `method="trunk"` gives normalised hidden states [B, L, D], `method="head"` the logits
  of these at any positions, `method="extend"` one step after a cache. Parameters may be float32
  or stored in `config.dtype`; the residual stream, norms, scores and softmax are float32 anyway.

  ```python
  hidden, kv = model.apply(p, tokens_BQ, positions_BQ, visible_BQQ, cache, method="extend")
  cache = commit(cache, kv, count_B)
  ```

  Reference: Qwen3, arXiv 2505.09388; SDAR, arXiv 2510.06303.
  """

  config: DecoderConfig

  def setup(self):
    cfg = self.config
    gradient = "matmul" if cfg.vocab_size <= 8192 else "segment"
    self.embed = Embedding(cfg.vocab_size, cfg.dim, gradient, jnp.dtype(cfg.dtype))
    stacked = cfg.storage == "stacked"
    self.blocks = (
      scan_layers(DecoderBlock, cfg, broadcast=3) if stacked else Layers(DecoderBlock, cfg)
    )
    self.norm = RMSNorm(cfg.eps)
    if not cfg.tied:
      self.project = Linear(
        cfg.vocab_size, ("embed", "vocab"), dtype=jnp.dtype(cfg.dtype), out_dtype=jnp.float32
      )

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
    """Return the hidden states after the final norm, float32."""
    return self.extend(tokens_BL, positions_BL, visible_BLL, None)[0]

  def head(self, hidden_BKD: FloatBKD) -> FloatBKV:
    """Return float32 logits of hidden states at any positions."""
    if self.config.tied:
      return self.embed.attend(hidden_BKD, jnp.dtype(self.config.dtype))
    return self.project(hidden_BKD)

  def extend(
    self,
    tokens_BQ: Int[Array, "B Q"],
    positions_BQ: Int[Array, "#B Q"] | None,
    visible_BQQ: Bool[Array, "#B Q Q"] | None,
    cache: Cache | None,
  ) -> tuple[Float[Array, "B Q D"], KV]:
    """Return hidden states as `trunk` does, and the keys and values of these tokens.

    Every query sees all slots of the cache below its row's length, and the tokens of this call as
    `visible_BQQ` says. The cache is only read; slots that do not count may hold anything.

    Args:
      tokens_BQ: ids.
      positions_BQ: None: consecutive, from each row's length.
      visible_BQQ: None: all.
      cache: None: there is nothing before these tokens.
    """
    cfg = self.config
    if positions_BQ is None:
      positions_BQ = jnp.arange(tokens_BQ.shape[1])[None]
      positions_BQ += 0 if cache is None else cache.length_B[:, None]
    rotary = rotary_at if cfg.yarn is None else cfg.yarn.rotary_at
    rope = rotary(positions_BQ, cfg.head_dim, cfg.rope_theta)
    past = seen_BS = None
    if cache is not None:
      past = (cache.k_NBSGC, cache.v_NBSGC)
      seen_BS = jnp.arange(cache.capacity)[None, :] < cache.length_B[:, None]
    x_BQD = self.embed(tokens_BQ).astype(jnp.float32)
    x_BQD, (k, v) = self.blocks(x_BQD, past, rope, seen_BS, visible_BQQ)
    return self.norm(x_BQD), KV(k, v)
