# SPDX-License-Identifier: Apache-2.0
"""The bidirectional diffusion Transformer (DiT) that MDLM, Duo and IDLM share."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.arrays import FloatB, FloatBKD, FloatBKV, FloatBLD, FloatBLV, KeyB, Params
from dlm_jax.errors import InputError
from dlm_jax.fields import Number, Whole, check_types
from dlm_jax.mesh import split_batch
from dlm_jax.models.attention import IMPLEMENTATIONS, Attention
from dlm_jax.models.layers import (
  MLP,
  Embedding,
  LayerNorm,
  Linear,
  Network,
  aligned,
  dropout,
  matmul,
  rotary_tables,
  timestep_features,
)

_CHOICES = {
  "dtype": ("float32", "bfloat16", "float16"),
  "attention": IMPLEMENTATIONS,
  "remat": ("none", "dots", "full"),
  "embedding_gradient": ("auto", "scatter", "matmul", "segment"),
}
# How large a size may be, of any of our networks: beyond what anyone trains, and far below what
# would take minutes to list or memory to describe.
SIZES = {
  "vocab_size": Whole(1, 2**24),
  "dim": Whole(1, 2**20),
  "cond_dim": Whole(1, 2**20),
  "layers": Whole(1, 2**13),
  "heads": Whole(1, 2**14),
  "kv_heads": Whole(1, 2**14),
  "head_dim": Whole(1, 2**16),
  "mlp_ratio": Whole(1, 2**10),
  "mlp_dim": Whole(1, 2**24),
  "length": Whole(1, 2**24),
  "unroll": Whole(1, 2**13),
  "experts": Whole(0, 2**13),
  "experts_per_token": Whole(0, 2**13),
  "expert_dim": Whole(0, 2**24),
  "mask_noise": Whole(0, 2**20),
}


def check_config(config) -> None:
  """Check the fields that our Transformers share, as far as the config has them.

  Raises:
    InputError: a size below 1, an unknown choice, a rate outside [0, 1), heads that do not fit.
  """
  check_fields(config)
  Number("[0, 1)").check("model.dropout", config.dropout)
  if config.dim % config.heads or (config.dim // config.heads) % 2:
    raise InputError(
      f"model.heads={config.heads} must divide model.dim={config.dim} into an even number."
    )


def check_fields(config) -> None:
  """Check types, sizes, and the choices that a config has of those that our Transformers share.

  Raises:
    InputError: a field of another type, a size out of range, or an unknown choice.
  """
  check_types(config, "model.")
  for field, kind in SIZES.items():
    if hasattr(config, field):
      kind.check(f"model.{field}", getattr(config, field))
  for field, allowed in _CHOICES.items():
    value = getattr(config, field, allowed[0])
    if value not in allowed:
      raise InputError(f"model.{field}={value!r} is unknown; use one of {', '.join(allowed)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Shape and policies that a DiT and a causal Transformer share.

  Attributes:
    vocab_size: V, the mask included.
    dim: width D; heads must divide it into an even number of channels.
    layers: number of blocks.
    heads: attention heads.
    length: sequence length that the model is meant for (rotary: shorter runs too).
    mlp_ratio: feed-forward width over D.
    dropout: on the attention and MLP branches, when keys are given.
    dtype: of matrix products and attention.
    attention: "auto", "xla", "cudnn" or "splash".
    remat: what the backward pass recomputes: "none", "dots" (all but products with weights) or
      "full" (each block).
    unroll: how many layers one turn of the layer loop holds. 1 compiles fastest, and is as fast
      forwards. A backward pass through a loop copies what it keeps of every layer into one array
      and out again: all 12 layers in one turn made a training step of 170 M parameters 25 ms
      shorter, of 95 (one H200), and its compilation 14 s longer.
  """

  vocab_size: int
  dim: int = 768
  layers: int = 12
  heads: int = 12
  length: int = 1024
  mlp_ratio: int = 4
  dropout: float = 0.1
  dtype: str = "bfloat16"
  attention: str = "auto"
  remat: str = "none"
  unroll: int = 1

  def __post_init__(self):
    check_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
  """Shape and policies of a DiT; further fields as in `TransformerConfig`.

  Attributes:
    cond_dim: width of the time embedding.
    time_conditioning: False feeds σ = 0 always; the modulation is then one constant per layer.
    embedding_gradient: see `layers.lookup`; "auto" is "matmul" up to V = 8192, else "segment".
    mask_noise: width N of the Gaussian noise that masks may be given; 0 has no parameters for it.
  """

  cond_dim: int = 128
  time_conditioning: bool = False
  embedding_gradient: str = "auto"
  mask_noise: int = 0

  @property
  def gradient_of_embedding(self) -> str:
    if self.embedding_gradient != "auto":
      return self.embedding_gradient
    return "matmul" if self.vocab_size <= 8192 else "segment"


class TimeEmbedding(nn.Module):
  """Map σ to the conditioning vector c = SiLU(MLP(features(σ))), in float32."""

  dim: int

  @nn.compact
  def __call__(self, sigma_B: FloatB) -> Float[Array, "B C"]:
    x = Linear(self.dim, (None, None), use_bias=True, name="expand")(timestep_features(sigma_B))
    return nn.silu(Linear(self.dim, (None, None), use_bias=True, name="contract")(nn.silu(x)))


def modulation(features: int, name: str) -> Linear:
  """Return the layer that makes shifts, scales and gates; it starts at 0."""
  return Linear(features, (None, "embed"), use_bias=True, zeros=True, name=name)


class Block(nn.Module):
  """Attention and MLP branches, each with adaLN shift, scale and gate."""

  config: DiTConfig

  @nn.compact
  def __call__(self, x_BLD, layer, c_BC, rope, rng_B):
    cfg = self.config
    dtype = jnp.dtype(cfg.dtype)
    x_BLD = split_batch(x_BLD)
    # [1 or B, 1, D] each: a constant modulation costs nothing per sequence
    terms = modulation(6 * cfg.dim, "modulation")(c_BC)[:, None, :]
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(terms, 6, axis=-1)

    h = LayerNorm(name="norm1")(x_BLD, shift1, scale1)
    h = Attention(cfg.heads, dtype, implementation=cfg.attention, name="attention")(h, rope)
    x_BLD += gate1 * dropout(h, rng_B, cfg.dropout, 2 * layer)

    h = LayerNorm(name="norm2")(x_BLD, shift2, scale2)
    h = MLP(cfg.mlp_ratio * cfg.dim, dtype, name="mlp")(h)
    x_BLD += gate2 * dropout(h, rng_B, cfg.dropout, 2 * layer + 1)
    return x_BLD, None


class Head(nn.Module):
  """Final norm, modulation and the projection to float32 logits."""

  config: DiTConfig

  @nn.compact
  def __call__(self, hidden_BLD, c_BC):
    cfg = self.config
    shift, scale = jnp.split(modulation(2 * cfg.dim, "modulation")(c_BC)[:, None, :], 2, axis=-1)
    h = LayerNorm(name="norm")(hidden_BLD, shift, scale)
    project = Linear(
      cfg.vocab_size,
      ("embed", "vocab"),
      use_bias=True,
      zeros=True,
      dtype=jnp.dtype(cfg.dtype),
      out_dtype=jnp.float32,
      name="project",
    )
    return project(h)


def scan_layers(block: type[nn.Module], config, broadcast: int):
  """Return the stack of `config.layers` blocks as one scanned, optionally rematerialised module.

  Args:
    block: a module called as block(x, own, *broadcast_arguments) -> (x, out): `own` is the layer's
      slice of what is scanned (its number, its part of a cache), `out` is stacked, None is nothing.
    config: its only field; read for `layers`, `unroll` and `remat`.
    broadcast: number of arguments that every layer sees whole.
  """
  if config.remat != "none":
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    block = nn.remat(block, prevent_cse=False, policy=policies[config.remat])
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0, *[nn.broadcast] * broadcast),
    length=config.layers,
    unroll=min(config.unroll, config.layers),
    metadata_params={nn.PARTITION_NAME: "layers"},
  )(config)


def head_params(params: Params) -> Params:
  """Return those parameters of a DiT that its method "head" reads; enough to apply it."""
  return {name: tree for name, tree in params.items() if name not in ("embed", "blocks")}


class DiT(Network):
  """Diffusion Transformer over tokens: rotary, adaLN-modulated, untied head.

  `apply({"params": p}, tokens, sigma_B)` returns float32 logits [B, L, V]. `tokens` are ids
  int32 [B, L] or "soft tokens", logits float32 [B, L, V] whose softmax mixes embeddings. Keys
  `rng_B`, one per sequence, switch dropout on.

  The same in two halves: `method="trunk"` gives the residual stream [B, L, D] and
  `method="head"` the logits of it, or of any gathered positions [B, K, D].

  Reference: DiT, arXiv 2212.09748; sizes and head as in MDLM, arXiv 2406.07524.
  """

  config: DiTConfig

  def setup(self):
    cfg = self.config
    self.embed = Embedding(cfg.vocab_size, cfg.dim, cfg.gradient_of_embedding, jnp.dtype(cfg.dtype))
    if cfg.mask_noise:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed"))
      self.mask_noise = self.param("mask_noise", zeros, (cfg.mask_noise, cfg.dim))
    self.time = TimeEmbedding(cfg.cond_dim)
    self.blocks = scan_layers(Block, cfg, broadcast=3)
    self.output = Head(cfg)

  @nn.nowrap
  def inputs(self, length: int = 1) -> tuple[Array, ...]:
    """Return arguments to initialise the network with: one sequence of ids, and its σ."""
    return jnp.zeros((1, length), jnp.int32), jnp.zeros((1,))

  @nn.nowrap
  def aligned(self, params: Params) -> Params:
    """Return the parameters with the head as its product reads it: see `Denoiser.aligned`."""
    output = params["output"]
    kernel = aligned(output["project"]["kernel"], jnp.dtype(self.config.dtype))
    return {**params, "output": {**output, "project": {**output["project"], "kernel": kernel}}}

  def __call__(
    self, tokens, sigma_B: FloatB, rng_B: KeyB | None = None, noise_BLN: Any = None
  ) -> FloatBLV:
    noise = () if noise_BLN is None else (noise_BLN,)
    return self.head(self.trunk(tokens, sigma_B, rng_B, *noise), sigma_B)

  def trunk(
    self, tokens, sigma_B: FloatB, rng_B: KeyB | None = None, noise_BLN: Any = None
  ) -> FloatBLD:
    """Return the residual stream after the last block, float32."""
    return self.body(self.embedded(tokens, noise_BLN), sigma_B, rng_B)

  def embedded(self, tokens, noise_BKN: Any = None) -> FloatBKD:
    """Return embeddings of ids or soft tokens, at any positions: lets callers chunk over L."""
    x_BKD = self.embed(tokens)
    if noise_BKN is None:
      return x_BKD
    return x_BKD + matmul(noise_BKN, self.mask_noise, jnp.dtype(self.config.dtype))

  def body(self, x_BLD: FloatBLD, sigma_B: FloatB, rng_B: KeyB | None = None) -> FloatBLD:
    """Return what `trunk` returns, from embeddings."""
    cfg = self.config
    rope = rotary_tables(x_BLD.shape[1], cfg.dim // cfg.heads)
    layers = jnp.arange(cfg.layers)
    x_BLD, _ = self.blocks(x_BLD, layers, self._condition(sigma_B), rope, rng_B)
    return x_BLD

  def head(self, hidden_BKD: FloatBKD, sigma_B: FloatB) -> FloatBKV:
    """Return float32 logits of hidden states at any positions."""
    return self.output(hidden_BKD, self._condition(sigma_B))

  def _condition(self, sigma_B):
    if not self.config.time_conditioning:
      sigma_B = jnp.zeros((1,))  # the constant modulation has no batch axis to pay for
    return self.time(sigma_B)
