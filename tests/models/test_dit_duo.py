# SPDX-License-Identifier: Apache-2.0
"""The time-conditioned diffusion Transformer of Duo: recorded hard, soft and top-k inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import process
from dlm_jax.models import DiT
from dlm_jax.models.dit import TimeEmbedding
from dlm_jax.models.layers import rotary_tables, timestep_features


def _close(actual, wanted, tolerance=2e-5):
  """Compare relative to the largest entry: what a float32 network can promise."""
  scale = np.abs(np.asarray(wanted, np.float32)).max()
  np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * scale)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, params, *args, method="__call__"):
  return model.apply({"params": params}, *args, method=method)


@pytest.fixture(params=["a", pytest.param("b", marks=pytest.mark.slow)])
def recorded(request, golden_dit):
  """Return (vectors, config, time-conditioned model, params) of one variant."""
  vectors, config, model, params = golden_dit(f"dit_duo__{request.param}")
  model = DiT(dataclasses.replace(model.config, time_conditioning=True))
  return {k: jnp.asarray(v) for k, v in vectors.items()}, config, model, params


def _tokens(vectors):
  return vectors["x_tokens"].astype(jnp.int32)


def test_golden_hard_tokens(recorded):
  vectors, config, model, params = recorded
  logits = _apply(model, params, _tokens(vectors), vectors["sigma"])
  _close(logits, vectors["logits_tokens"])
  proc = process.Uniform(vocab_size=config["V"])
  _close(jax.vmap(proc.log_x0)(logits, _tokens(vectors)), vectors["log_x_theta_tokens"])
  np.testing.assert_allclose(proc.schedule.sigma(vectors["t"]), vectors["sigma"], rtol=1e-5)
  _close(_apply(model, params, _tokens(vectors), method="embedded"), vectors["embed_tokens"], 1e-6)
  deaf = DiT(dataclasses.replace(model.config, time_conditioning=False))
  error = np.abs(_apply(deaf, params, _tokens(vectors), vectors["sigma"]) - logits).max()
  assert error > 1e-2 * np.abs(logits).max()


def test_golden_soft_tokens(recorded):
  vectors, _, model, params = recorded
  soft, sigma = vectors["x_soft"], vectors["sigma"]
  _close(_apply(model, params, soft, sigma), vectors["logits_soft"])
  embedded = _apply(model, params, soft, method="embedded")
  _close(embedded, vectors["embed_soft"], 1e-6)
  # in chunks of positions, then the rest of the network
  chunks = [_apply(model, params, soft[:, i : i + 8], method="embedded") for i in (0, 8, 16)]
  chunks.append(_apply(model, params, soft[:, 24:], method="embedded"))
  hidden = _apply(model, params, jnp.concatenate(chunks, axis=1), sigma, method="body")
  _close(_apply(model, params, hidden, sigma, method="head"), vectors["logits_soft"])


def test_golden_top_k_tokens(recorded):
  """Embeddings of given ids mixed with given weights enter through `body`."""
  vectors, _, model, params = recorded
  batch, length, kept = vectors["topk_indices"].shape
  ids = vectors["topk_indices"].astype(jnp.int32).reshape(batch, length * kept)
  rows = _apply(model, params, ids, method="embedded").reshape(batch, length, kept, -1)
  mixed = jnp.sum(vectors["topk_weights"][..., None] * rows, axis=2)
  _close(mixed, vectors["embed_topk"], 1e-6)
  hidden = _apply(model, params, mixed, vectors["sigma"], method="body")
  logits = _apply(model, params, hidden, vectors["sigma"], method="head")
  _close(logits, vectors["logits_topk"])


@pytest.mark.slow
def test_golden_residual_stream(recorded):
  vectors, config, model, params = recorded
  for depth in range(1, config["nb"] + 1):
    shallow = DiT(dataclasses.replace(model.config, layers=depth))
    blocks = jax.tree.map(lambda x, n=depth: x[:n], params["blocks"])
    cut = {**params, "blocks": blocks}
    hidden = _apply(shallow, cut, _tokens(vectors), vectors["sigma"], method="trunk")
    _close(hidden, vectors[f"hidden_after_block{depth - 1}"])


def test_golden_time_and_rotary(recorded):
  vectors, config, _, params = recorded
  features = timestep_features(vectors["sigma"])
  np.testing.assert_allclose(features, vectors["timestep_features"], rtol=0, atol=2e-6)
  c = TimeEmbedding(config["cond"]).apply({"params": params["time"]}, vectors["sigma"])
  _close(c, vectors["t_cond"])
  channels = config["H"] // config["nh"]
  for table, name in zip(rotary_tables(config["L"], channels), ("cos", "sin"), strict=True):
    wanted = vectors[f"rope_{name}"][:, : channels // 2]  # every angle is recorded twice
    np.testing.assert_allclose(table, wanted, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_gradient_flows_through_soft_tokens(recorded):
  """The derivative of a logit in the soft input, against a finite difference along a direction."""
  vectors, _, model, params = recorded
  soft, sigma = vectors["x_soft"][:1], vectors["sigma"][:1]
  rng = np.random.default_rng(0)
  weights, direction = (jnp.asarray(rng.normal(size=soft.shape), jnp.float32) for _ in range(2))
  loss = jax.jit(lambda x: jnp.mean(weights * _apply(model, params, x, sigma)))
  slope = jnp.sum(jax.grad(loss)(soft) * direction)
  step = 1e-2
  finite = (loss(soft + step * direction) - loss(soft - step * direction)) / (2 * step)
  np.testing.assert_allclose(slope, finite, rtol=2e-2)
  assert abs(slope) > 1e-4
