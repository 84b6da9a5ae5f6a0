# SPDX-License-Identifier: Apache-2.0
"""Hidden Markov chains, whose exact denoiser is computed: sampling is then all that can be wrong.

A chain z₀ z₁ … with p(z₀) = π and transitions T, seen through emissions E: p(x_i | z_i). With E
the identity it is a Markov chain. Given any visible tokens the law of every other one is known by
the forward-backward recursion, so a denoiser of this chain makes no error of its own.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dlm_jax import draw
from dlm_jax.arrays import FloatB, FloatBLV, FloatLV, IntBL, IntL, RngKey
from dlm_jax.process import Absorbing, Uniform
from dlm_jax.sample import from_logits

_TINY = 1e-30


@flax.struct.dataclass
class Chain:
  """A hidden Markov chain over tokens 0 … V − 1; the mask of its process is V.

  Attributes:
    start_S: π, float32 [S].
    move_SS: T, a row per state, [S, S].
    emit_SV: E, a row per state, [S, V].
  """

  start_S: Array
  move_SS: Array
  emit_SV: Array

  @property
  def process(self) -> Absorbing:
    """The forward process of its tokens and a mask."""
    tokens = self.emit_SV.shape[1]
    return Absorbing(vocab_size=tokens + 1, mask_id=tokens)

  def draw(self, rng: RngKey, batch: int, length: int) -> IntBL:
    """Draw exact sequences."""
    rng_0, rng_z, rng_x = jax.random.split(rng, 3)

    def one_of(rng, probs):
      return draw.softmax(jnp.log(probs + _TINY)).draw(draw.uniforms(rng, probs.shape[:-1]))

    def step(z_B, rng):
      return one_of(rng, self.move_SS[z_B]), z_B

    z_B = one_of(rng_0, jnp.broadcast_to(self.start_S, (batch, self.start_S.size)))
    z_LB = jax.lax.scan(step, z_B, jax.random.split(rng_z, length))[1]
    return one_of(rng_x, self.emit_SV[z_LB.T]).astype(jnp.int32)

  @property
  def uniform(self) -> Uniform:
    """The process that replaces its tokens by uniform ones."""
    return Uniform(vocab_size=self.emit_SV.shape[1])

  def denoiser(self):
    """Return the exact denoiser of `process`: log p(x_i | visible tokens) at every position."""
    return from_logits(jax.tree_util.Partial(_of_masks, self))

  def uniform_denoiser(self):
    """Return the exact denoiser of `uniform`: log p(x_i | the other noisy tokens, σ)."""
    return from_logits(jax.tree_util.Partial(_of_uniform, self))

  def log_prob(self, tokens_BL: IntBL) -> FloatB:
    """Return log p of whole sequences, in nats."""
    return jax.vmap(lambda tokens_L: _forward(self, _seen(self, tokens_L))[1].sum())(tokens_BL)


def markov(tokens: int = 16, *, keep: float = 0.6, near: float = 1.0) -> Chain:
  """Return a Markov chain on a ring of tokens with correlation that fades with the distance.

  A token stays near the one before, e^(−distance / near) over the ring, with probability `keep`,
  and is any of them otherwise; every token is equally frequent.
  """
  place = np.arange(tokens)
  apart = np.abs(place[:, None] - place[None])
  weight = np.exp(-np.minimum(apart, tokens - apart) / near)
  move = keep * weight / weight.sum(1, keepdims=True) + (1 - keep) / tokens
  flat = np.full(tokens, 1 / tokens)
  return Chain(*(jnp.asarray(x, jnp.float32) for x in (flat, move, np.eye(tokens))))


def hidden(tokens: int = 16, *, states: int = 32, seed: int = 0) -> Chain:
  """Return a hidden Markov chain: random states, each with a few likely tokens and successors."""
  rng = np.random.default_rng(seed)
  move = rng.dirichlet(np.full(states, 0.05), states) * 0.95 + 0.05 / states
  emit = rng.dirichlet(np.full(tokens, 0.1), states) * 0.98 + 0.02 / tokens
  start = np.linalg.matrix_power(move, 1000)[0]
  return Chain(*(jnp.asarray(x, jnp.float32) for x in (start / start.sum(), move, emit)))


def _seen(chain, tokens_L):
  """Return p(x_i | z_i) per position, 1 where nothing is visible."""
  tokens = chain.emit_SV.shape[1]
  seen_LS = chain.emit_SV.T[jnp.minimum(tokens_L, tokens - 1)]
  return jnp.where((tokens_L < tokens)[:, None], seen_LS, 1.0)


def _forward(chain, seen_LS):
  """Return p(z_i | what is seen before i), and log p(what is seen at i | what is seen before)."""

  def step(prior_S, seen_S):
    joint_S = prior_S * seen_S
    total = joint_S.sum()
    return (joint_S / total) @ chain.move_SS, (prior_S, jnp.log(total))

  return jax.lax.scan(step, chain.start_S, seen_LS)[1]


def _elsewhere(chain, seen_LS):
  """Return p(z_i | what is seen at the other positions), by the forward-backward recursion."""
  before_LS, _ = _forward(chain, seen_LS)

  def step(after_S, seen_S):
    before_S = chain.move_SS @ (after_S * seen_S)
    return before_S / before_S.sum(), after_S

  after_LS = jax.lax.scan(step, jnp.ones_like(chain.start_S), seen_LS, reverse=True)[1]
  state_LS = before_LS * after_LS
  return state_LS / state_LS.sum(-1, keepdims=True)


def _of_masks(chain, tokens_BL: IntBL, sigma_B: FloatB) -> FloatBLV:
  """Return log p(x_i | the other visible tokens), and −1e6 for the mask."""
  del sigma_B

  def one(tokens_L: IntL) -> FloatLV:
    probs_LV = _elsewhere(chain, _seen(chain, tokens_L)) @ chain.emit_SV
    return jnp.pad(jnp.log(probs_LV + _TINY), ((0, 0), (0, 1)), constant_values=-1e6)

  return jax.vmap(one)(tokens_BL)


def _of_uniform(chain, tokens_BL: IntBL, sigma_B: FloatB) -> FloatBLV:
  """Return log p(x_i | the other noisy tokens), each of which is the clean one with α, else any.

  The process brings in what a position shows itself, as in its training objective.
  """
  count = chain.emit_SV.shape[1]

  def one(tokens_L, sigma):
    alpha = jnp.exp(-sigma)
    noise_LV = (1 - alpha) / count + alpha * jax.nn.one_hot(tokens_L, count)
    probs_LV = _elsewhere(chain, noise_LV @ chain.emit_SV.T) @ chain.emit_SV
    return jnp.log(probs_LV + _TINY)

  return jax.vmap(one)(tokens_BL, sigma_B)


def divergence(chain: Chain, tokens_BL: IntBL) -> float:
  """Return KL(pairs of neighbours in samples ‖ those of the chain), in nats.

  The plug-in estimate less its bias for independent pairs, (V² − 1)/(2 n).
  """
  count = chain.emit_SV.shape[1]
  tokens_BL = np.asarray(tokens_BL)
  table = np.zeros((count, count))
  np.add.at(table, (tokens_BL[:, :-1].ravel(), tokens_BL[:, 1:].ravel()), 1)
  found = table / table.sum()
  state_S = np.asarray(chain.start_S, np.float64)
  move_SS, emit_SV = np.asarray(chain.move_SS), np.asarray(chain.emit_SV)
  true = emit_SV.T @ (state_S[:, None] * move_SS) @ emit_SV
  some = found > 0
  plug_in = float(np.sum(found[some] * np.log(found[some] / true[some])))
  return plug_in - (count**2 - 1) / (2 * table.sum())
