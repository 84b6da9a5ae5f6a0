# SPDX-License-Identifier: Apache-2.0
"""Tiny decoders for block decoding, one that follows a script, and decoding without a cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_decoder

from dlm_jax import models, sample
from dlm_jax.models import masks

V, MASK = 13, 12
OF_ROWS = ("temperature", "top_k", "top_p", "threshold", "stop_ids", "minimum", "limit")


def split(given):
  """Return a rule, and what rows ask for as arguments of `RowOptions.make`."""
  asked = {name: value for name, value in given.items() if name in OF_ROWS}
  shaping = {name: value for name, value in given.items() if name not in OF_ROWS}
  return sample.BlockRule(**{"block_length": 4, "mask_id": MASK} | shaping), asked


def reveal_one(rule, rows, tokens_K, masked_K, logits_KV, step, position_K):
  """Apply `reveal` to one block of one row; returns what it returns for that row."""
  block = sample.Block(
    position_K[None], tokens_K[None], masked_K[None], jnp.zeros_like(masked_K)[None]
  )
  out = sample.reveal(rule, rows, block, logits_KV[None], jnp.asarray(step, jnp.int32).reshape(1))
  return jax.tree.map(lambda x: x[0], out)


def make(seed=0, layers=2, vocabulary=V):
  """Return a decoder and parameters under which logits differ by several units."""
  model = models.Decoder(
    dataclasses.replace(
      tiny_decoder.DENSE,
      vocab_size=vocabulary,
      dim=16,
      layers=layers,
      mlp_dim=24,
      rope_theta=1e4,
    )
  )
  params = model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
  rng = np.random.default_rng(seed)

  def widen(leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return jnp.asarray(noise * 0.5 if leaf.ndim > 1 and float(leaf.std()) else 1 + 0.2 * noise)

  return model, jax.tree.map(widen, params)


@dataclasses.dataclass(frozen=True)
class Script:
  """Stand in for a network: the logits of a position are a row of the parameters, [W, V].

  `seen(tokens)` is called on the host with the queries of every call.
  """

  seen: Any = None

  @property
  def config(self):
    return models.DecoderConfig(
      vocab_size=V, dim=2, layers=1, heads=1, kv_heads=1, head_dim=2, mlp_dim=2, length=64
    )

  def apply(self, variables, *arguments, method):
    if method == "head":
      return arguments[0]
    tokens_BQ, positions_BQ, _, cache = arguments
    if self.seen is not None:
      jax.debug.callback(self.seen, tokens_BQ)
    if positions_BQ is None:
      positions_BQ = jnp.arange(tokens_BQ.shape[1])[None]
      positions_BQ += 0 if cache is None else cache.length_B[:, None]
    rows = jnp.broadcast_to(
      jnp.minimum(positions_BQ, variables["params"].shape[0] - 1), tokens_BQ.shape
    )
    zeros = jnp.zeros((1, *tokens_BQ.shape, 1, 2), self.config.dtype)
    return variables["params"][rows], models.KV(zeros, zeros)


def script(tokens, sharpness=9.0):
  """Return parameters of `Script` under which each position's most probable token is given."""
  return sharpness * jax.nn.one_hot(jnp.asarray(tokens), V)


@functools.cache
def _uncached(model, rule):
  """Return one denoising step without a cache: a pass over the whole window, block-causal."""
  size = rule.block_length

  @jax.jit
  def step(params, rows, tokens_W, masked_W, start, number):
    slots = masks.sequence_slots(jnp.arange(tokens_W.shape[0]), size)
    visible_WW = masks.block_causal(slots)[None]
    logits_WV = model.apply({"params": params}, tokens_W[None], None, visible_WW)[0]
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)  # noqa: E731
    position_K = start + jnp.arange(size)
    return reveal_one(rule, rows, cut(tokens_W), cut(masked_W), cut(logits_WV), number, position_K)

  return step


def decode_uncached(model, params, options, prompt, key, window, limit=None):
  """Return one row's (tokens, steps, log-probabilities, passes with folding, reason), plainly."""
  rule, asked = options
  rows = sample.RowOptions.make(1, key[None], **asked)
  size, limit = rule.block_length, window if limit is None else limit
  width = -(-window // size) * size
  tokens = np.full(width, MASK, np.int32)
  tokens[: len(prompt)] = prompt
  steps, log_probs = np.full(width, -1), np.zeros(width, np.float32)
  masked, start, passes = np.arange(width) >= len(prompt), len(prompt) // size * size, 0
  step, end, reason = _uncached(model, rule), len(prompt), 2
  while end < limit:
    block, number = slice(start, start + size), 0
    while masked[block].any():
      out = step(params, rows, tokens, masked, start, number)
      chosen = np.asarray(out.revealed_BK)
      assert not (chosen & ~masked[block]).any() and chosen.any()
      tokens[block] = out.tokens_BK
      steps[block] = np.where(chosen, number, steps[block])
      log_probs[block] = np.where(chosen, out.log_prob_BK, log_probs[block])
      masked[block] &= ~chosen
      number, passes = number + 1, passes + 1
    start, end = start + size, min(start + size, limit)
    generated = tokens[len(prompt) : end]
    stops = np.flatnonzero(np.isin(generated, asked.get("stop_ids", ())))
    if stops.size:
      end, reason = len(prompt) + int(stops[0]) + 1, 1
      break
  return tokens[:end], steps[:end], log_probs[:end], passes, reason
