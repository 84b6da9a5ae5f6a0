# SPDX-License-Identifier: Apache-2.0
"""A discriminator of noisy text: a denoiser's trunk under a spectrally normalised head.

One logit per position. The lower blocks, embedding and time network stay as they were trained: they
lie in a subtree of their own, so that an optimiser mask is a set of names and the backward pass of
training stops there.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.arrays import FloatB, FloatBKD, FloatBL, FloatBLD, KeyB, Params
from dlm_jax.errors import InputError
from dlm_jax.models.dit import Block, DiTConfig, TimeEmbedding, scan_layers
from dlm_jax.models.exported import exportable
from dlm_jax.models.layers import Embedding, Network, fan_in_uniform, rotary_tables

FROZEN = ("embed", "time", "lower")  # subtrees that training leaves alone
TRAINED = ("upper", "head")
_START_ITERATIONS = 15  # of the power method at initialisation


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


class SpectralLinear(nn.Module):
  """A linear layer divided by an estimate of its largest singular value, σ = uᵀ W v, float32.

  u and v are state, not parameters: collection "spectral". `advance` takes one step of the power
  method first; the gradient flows through W and σ, not through u and v.

  Reference: Spectral normalization for GANs, arXiv 1802.05957, algorithm 1.
  """

  features: int

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"], advance: bool) -> Float[Array, "*batch F"]:
    init = nn.with_logical_partitioning(fan_in_uniform, (None, None))
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))

    exact = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)

    def iterate(u_F):
      v_D = _unit(exact(kernel, u_F))
      return _unit(exact(v_D, kernel)), v_D

    def start(which):
      u_F = _unit(jnp.arange(1.0, self.features + 1) ** 0.5)
      for _ in range(_START_ITERATIONS):
        u_F, v_D = iterate(u_F)
      return (u_F, v_D)[which]

    u = self.variable("spectral", "u", start, 0)
    v = self.variable("spectral", "v", start, 1)
    u_F, v_D = u.value, v.value
    if advance:
      u_F, v_D = iterate(u_F)
      u_F, v_D = jax.lax.stop_gradient((u_F, v_D))
      if not self.is_initializing():
        u.value, v.value = u_F, v_D
    y = exact(x, kernel / exact(exact(v_D, kernel), u_F))
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class SpectralHead(nn.Module):
  """Linear, SiLU, linear to one logit; both spectrally normalised."""

  @nn.compact
  def __call__(self, hidden_BLD, advance: bool):
    x = SpectralLinear(hidden_BLD.shape[-1], name="expand")(hidden_BLD, advance)
    return SpectralLinear(1, name="contract")(nn.silu(x), advance)[..., 0]


class Discriminator(Network):
  """Tell samples of two sources apart at every position of a noisy sequence.

  `apply({"params": p, "spectral": s}, tokens, sigma_B)` returns logits [B, L], float32. `tokens`
  are ids or soft tokens, as for a `DiT`. The head reads the raw residual stream after the last
  block: no final norm, no modulation. σ is always passed on, whether or not the denoiser whose
  trunk this is was told the time.

  With `advance` and mutable=["spectral"] the spectral norms take a power step: in the training
  forward pass only.

  Attributes:
    config: of the denoiser.
    trained_layers: how many of the last blocks are trained.

  Reference: DiDi-Instruct, arXiv 2509.25035, section 3.
  """

  config: DiTConfig
  trained_layers: int = 4

  def setup(self):
    cfg = self.config
    if not 1 <= self.trained_layers <= cfg.layers:
      raise InputError(f"trained_layers={self.trained_layers} must be in 1 … {cfg.layers}.")
    self.embed = Embedding(cfg.vocab_size, cfg.dim, cfg.gradient_of_embedding, jnp.dtype(cfg.dtype))
    self.time = TimeEmbedding(cfg.cond_dim)
    if self._kept:
      lower = dataclasses.replace(cfg, layers=self._kept)
      self.lower = scan_layers(Block, lower, broadcast=3)
    upper = dataclasses.replace(cfg, layers=self.trained_layers)
    self.upper = scan_layers(Block, upper, broadcast=3)
    self.head = SpectralHead()

  @nn.nowrap
  def inputs(self, length: int = 1) -> tuple[Array, ...]:
    """Return arguments to initialise the network with: one sequence of ids, and its σ."""
    return jnp.zeros((1, length), jnp.int32), jnp.zeros((1,))

  @property
  def _kept(self):
    return self.config.layers - self.trained_layers

  def __call__(
    self,
    tokens,
    sigma_B: FloatB,
    rng_B: KeyB | None = None,
    *,
    advance: bool = False,
    frozen: bool = False,
  ) -> FloatBL:
    """Return a logit per position.

    Args:
      tokens: ids int32 [B, L], or logits [B, L, V] whose softmax mixes embeddings.
      sigma_B: noise level of every sequence.
      rng_B: keys of dropout; None for evaluation.
      advance: take a power step of the spectral norms.
      frozen: stop gradients where training does not go: below the trained blocks.
    """
    return self.body(self.embedded(tokens), sigma_B, rng_B, advance=advance, frozen=frozen)

  def embedded(self, tokens) -> FloatBKD:
    """Return embeddings of ids or soft tokens, at any positions: lets callers chunk over L."""
    return self.embed(tokens)

  def body(
    self,
    x_BLD: FloatBLD,
    sigma_B: FloatB,
    rng_B: KeyB | None = None,
    *,
    advance: bool = False,
    frozen: bool = False,
  ) -> FloatBL:
    """Return the logits of embeddings; other arguments as for a call."""
    cfg, c_BC = self.config, self.time(sigma_B)
    rope = rotary_tables(x_BLD.shape[1], cfg.dim // cfg.heads)
    if self._kept:
      x_BLD, _ = self.lower(x_BLD, jnp.arange(self._kept), c_BC, rope, rng_B)
    if frozen:
      x_BLD, c_BC = jax.lax.stop_gradient((x_BLD, c_BC))
    layers = self._kept + jnp.arange(self.trained_layers)
    x_BLD, _ = self.upper(x_BLD, layers, c_BC, rope, rng_B)
    return self.head(x_BLD, advance)


def from_trunk(model: Discriminator, params: Params, head: Params) -> Params:
  """Return a discriminator's parameters: a denoiser's trunk, and a head.

  Args:
    model: the discriminator.
    params: of a `DiT` with the same config; its output layer is not used.
    head: parameters of the head.
  """
  kept = model.config.layers - model.trained_layers
  lower, upper = (
    jax.tree.map(lambda x, part=part: x[part], params["blocks"])
    for part in (slice(None, kept), slice(kept, None))
  )
  tree = {"embed": params["embed"], "time": params["time"], "upper": upper, "head": head}
  return tree | ({"lower": lower} if kept else {})


def to_trunk(model: Discriminator, params: Params) -> Params:
  """Return the trunk of a discriminator in the layout of a `DiT`'s parameters, without output."""
  blocks = params["upper"]
  if model.config.layers > model.trained_layers:
    join = lambda *parts: jnp.concatenate(parts)  # noqa: E731
    blocks = jax.tree.map(join, params["lower"], params["upper"])
  return {"embed": params["embed"], "time": params["time"], "blocks": blocks}


def join(model: Discriminator, params: Params, spectral: Params) -> Params:
  """Return one tree in a `DiT`'s layout, the head with its u and v as "output": for files."""
  head = {name: {**params["head"][name], **spectral["head"][name]} for name in params["head"]}
  return {**to_trunk(model, params), "output": head}


def split(model: Discriminator, tree: Params) -> tuple[Params, Params]:
  """Undo `join`: return parameters and spectral state."""
  head, spectral = {}, {}
  for name, layer in tree["output"].items():
    head[name] = {key: layer[key] for key in ("kernel", "bias")}
    spectral[name] = {key: layer[key] for key in ("u", "v")}
  return from_trunk(model, tree, head), {"head": spectral}


@exportable
@flax.struct.dataclass
class Critic:
  """A discriminator bound to its parameters and spectral state; a pytree for samplers.

  Attributes:
    model: the `Discriminator`; static.
    params, spectral: the leaves.
  """

  model: Any = flax.struct.field(pytree_node=False)
  params: Params = None
  spectral: Params = None

  def __call__(self, tokens, sigma_B: FloatB) -> FloatBL:
    """Return a logit per position for ids [B, L] or soft tokens [B, L, V]."""
    return self.model.apply(self._variables, tokens, sigma_B)

  def embedded(self, tokens) -> FloatBKD:
    """Return embeddings of ids or soft tokens, at any positions."""
    return self.model.apply(self._variables, tokens, method="embedded")

  def body(self, x_BLD: FloatBLD, sigma_B: FloatB) -> FloatBL:
    """Return the logits of embeddings."""
    return self.model.apply(self._variables, x_BLD, sigma_B, method="body")

  @property
  def _variables(self):
    return {"params": self.params, "spectral": self.spectral}
