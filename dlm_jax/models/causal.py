# SPDX-License-Identifier: Apache-2.0
"""Next-token networks: a causal Transformer, the judge; and a decoder under a causal mask."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from dlm_jax.arrays import FloatBLV, IntBL, KeyB, Params
from dlm_jax.errors import InputError
from dlm_jax.mesh import split_batch
from dlm_jax.models import masks
from dlm_jax.models.attention import Attention
from dlm_jax.models.dit import TransformerConfig, scan_layers
from dlm_jax.models.layers import MLP, Embedding, LayerNorm, Network, dropout, rotary_tables
from dlm_jax.models.protocols import Cached, NextToken


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalConfig(TransformerConfig):
  """Shape and policies of a causal Transformer."""


class CausalBlock(nn.Module):
  """Pre-norm attention and MLP."""

  config: CausalConfig

  @nn.compact
  def __call__(self, x_BLD, layer, rope, rng_B):
    cfg = self.config
    dtype = jnp.dtype(cfg.dtype)
    x_BLD = split_batch(x_BLD)
    attention = Attention(
      cfg.heads, dtype, causal=True, implementation=cfg.attention, name="attention"
    )
    h = attention(LayerNorm(name="norm1")(x_BLD), rope)
    x_BLD += dropout(h, rng_B, cfg.dropout, 2 * layer)
    h = MLP(cfg.mlp_ratio * cfg.dim, dtype, name="mlp")(LayerNorm(name="norm2")(x_BLD))
    return x_BLD + dropout(h, rng_B, cfg.dropout, 2 * layer + 1), None


class Causal(Network):
  """Next-token Transformer: rotary, pre-norm, head tied to the embedding.

  `apply({"params": p}, tokens_BL)` returns float32 logits [B, L, V]; position l predicts the
  token at l + 1. Keys `rng_B`, one per sequence, switch dropout on.
  """

  config: CausalConfig

  def setup(self):
    cfg = self.config
    self.embed = Embedding(cfg.vocab_size, cfg.dim)
    self.blocks = scan_layers(CausalBlock, cfg, broadcast=2)
    self.norm = LayerNorm()

  def __call__(self, tokens_BL: IntBL, rng_B: KeyB | None = None) -> FloatBLV:
    cfg = self.config
    rope = rotary_tables(tokens_BL.shape[1], cfg.dim // cfg.heads)
    x_BLD, _ = self.blocks(self.embed(tokens_BL), jnp.arange(cfg.layers), rope, rng_B)
    return self.embed.attend(self.norm(x_BLD), jnp.dtype(cfg.dtype))


def next_token_logits(
  model: NextToken | Cached,
  params: Params,
  tokens_BL: IntBL,
  rng_B: KeyB | None = None,
  *,
  position: IntBL | None = None,
  segment: IntBL | int = 0,
  **options,
) -> FloatBLV:
  """Return float32 logits of the token after each position.

  Args:
    model: a `Causal` or `GPT2`; or a `Decoder`, which is given a causal mask.
    params: its parameters.
    tokens_BL: ids.
    rng_B: switches the dropout of a `Causal` on; a decoder has none.
    position, segment: of a decoder: of several sequences in a row, see `arrays.Record`; tokens see
      their own only.
    **options: of the network's call.
  """
  if isinstance(model, Cached):
    slots = masks.sequence_slots(
      jnp.arange(tokens_BL.shape[1])[None] if position is None else position, 1, segment
    )
    return model.apply({"params": params}, tokens_BL, position, masks.causal(slots), **options)
  if position is not None:
    raise InputError("several sequences share a row: use a decoder, which keeps them apart.")
  keys = () if rng_B is None else (rng_B,)
  return model.apply({"params": params}, tokens_BL, *keys, **options)
