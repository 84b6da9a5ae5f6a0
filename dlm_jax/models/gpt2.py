# SPDX-License-Identifier: Apache-2.0
"""GPT-2: the judge that published generative perplexities are measured with."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlm_jax.arrays import BoolBL, FloatBLD, FloatBLV, IntBL
from dlm_jax.errors import InputError
from dlm_jax.fields import Number, check_types
from dlm_jax.models.dit import SIZES
from dlm_jax.models.layers import Network

Mask = IntBL | BoolBL

_ACTIVATIONS = {
  "gelu_new": functools.partial(nn.gelu, approximate=True),
  "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
  "gelu": functools.partial(nn.gelu, approximate=False),
  "relu": nn.relu,
}
_SIZES = {  # ours of the same meaning
  "vocab_size": "vocab_size",
  "n_positions": "length",
  "n_embd": "dim",
  "n_layer": "layers",
  "n_head": "heads",
  "n_inner": "mlp_dim",
}
# Published numbers are float32; the default on some accelerators would be a 10-bit mantissa.
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
  """Shape of a GPT-2; the fields carry their names in a Hugging Face `config.json`.

  Raises:
    InputError: a size is none, the heads do not divide the width, or the activation is unknown.
  """

  vocab_size: int = 50257
  n_positions: int = 1024
  n_embd: int = 768
  n_layer: int = 12
  n_head: int = 12
  n_inner: int | None = None  # width of the MLP; None is 4 · n_embd
  activation_function: str = "gelu_new"
  layer_norm_epsilon: float = 1e-5

  @property
  def length(self) -> int:
    """The most tokens, as other networks call it."""
    return self.n_positions

  def __post_init__(self):
    check_types(self)
    for name, ours in _SIZES.items():
      if getattr(self, name) is not None:
        SIZES[ours].check(name, getattr(self, name))
    Number("(0, ∞)").check("layer_norm_epsilon", self.layer_norm_epsilon)
    if self.n_embd % self.n_head:
      raise InputError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}.")
    if self.activation_function not in _ACTIVATIONS:
      raise InputError(
        f"activation_function={self.activation_function!r} is not supported; "
        f"use one of {', '.join(sorted(_ACTIVATIONS))}."
      )


def _dense(features: int) -> nn.Dense:
  return nn.Dense(features, precision=_EXACT)


def _norm(config: GPT2Config) -> nn.LayerNorm:
  # The fast variance E[x²] − E[x]² loses digits on GPT-2's large activations.
  return nn.LayerNorm(epsilon=config.layer_norm_epsilon, use_fast_variance=False)


class _Attention(nn.Module):
  """Causal self-attention with one fused projection to queries, keys and values."""

  config: GPT2Config

  def setup(self):
    self.c_attn = _dense(3 * self.config.n_embd)
    self.c_proj = _dense(self.config.n_embd)

  def __call__(self, x_BLD, visible_BLL):
    heads = self.config.n_head
    q, k, v = jnp.split(self.c_attn(x_BLD), 3, axis=-1)
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("BLHC,BMHC->BHLM", q, k, precision=_EXACT) * q.shape[-1] ** -0.5
    # Finite, so that a row that sees nothing (left padding) is uniform instead of NaN.
    scores = jnp.where(visible_BLL[:, None], scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("BHLM,BMHC->BLHC", jax.nn.softmax(scores), v, precision=_EXACT)
    return self.c_proj(mixed.reshape(x_BLD.shape))


class _MLP(nn.Module):
  config: GPT2Config

  def setup(self):
    self.c_fc = _dense(self.config.n_inner or 4 * self.config.n_embd)
    self.c_proj = _dense(self.config.n_embd)

  def __call__(self, x_BLD):
    return self.c_proj(_ACTIVATIONS[self.config.activation_function](self.c_fc(x_BLD)))


class _Block(nn.Module):
  """Pre-norm attention and MLP; the pair returned is what `nn.scan` expects."""

  config: GPT2Config

  def setup(self):
    self.ln_1, self.ln_2 = _norm(self.config), _norm(self.config)
    self.attn, self.mlp = _Attention(self.config), _MLP(self.config)

  def __call__(self, x_BLD, visible_BLL):
    x_BLD = x_BLD + self.attn(self.ln_1(x_BLD), visible_BLL)
    return x_BLD + self.mlp(self.ln_2(x_BLD)), None


class GPT2(Network):
  """Map tokens to next-token logits: position l predicts token l + 1.

  Everything runs in float32 at full matrix precision. Parameters are named as in the public
  checkpoints; those of the layers are stacked along a leading axis.

  ```python
  logits_BLV = GPT2(config).apply({"params": params}, tokens_BL, mask_BL)
  ```
  """

  config: GPT2Config

  def setup(self):
    config = self.config
    self.wte = nn.Embed(config.vocab_size, config.n_embd)
    self.wpe = nn.Embed(config.n_positions, config.n_embd)
    layers = nn.scan(
      _Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.n_layer,
    )
    self.h = layers(config)
    self.ln_f = _norm(config)

  def trunk(self, tokens_BL: IntBL, mask_BL: Mask | None = None) -> FloatBLD:
    """Return the final hidden states, after the last layer norm.

    Args:
      tokens_BL: ids below `vocab_size`; larger ones are not detected here.
      mask_BL: nonzero where a position may be attended to; None is everywhere. Position numbers
        do not depend on it.

    Raises:
      InputError: L exceeds `n_positions`.
    """
    length = tokens_BL.shape[1]
    if length > self.config.n_positions:
      raise InputError(
        f"{length} tokens exceed this GPT-2's n_positions={self.config.n_positions}; truncate them."
      )
    visible_BLL = jnp.tril(jnp.ones((length, length), bool))[None]
    if mask_BL is not None:
      visible_BLL = visible_BLL & (mask_BL[:, None, :] != 0)
    x_BLD = self.wte(tokens_BL) + self.wpe(jnp.arange(length))[None]
    x_BLD, _ = self.h(x_BLD, visible_BLL)
    return self.ln_f(x_BLD)

  def head(self, hidden_BLD: FloatBLD) -> FloatBLV:
    """Return logits of hidden states; the matrix is the token embedding's."""
    return jnp.einsum("BLD,VD->BLV", hidden_BLD, self.wte.embedding, precision=_EXACT)

  def __call__(self, tokens_BL: IntBL, mask_BL: Mask | None = None) -> FloatBLV:
    """Return float32 logits; arguments as for `trunk`."""
    return self.head(self.trunk(tokens_BL, mask_BL))
