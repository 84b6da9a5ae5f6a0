# SPDX-License-Identifier: Apache-2.0
"""The decoder: recorded logits, a reference in plain numpy, positions, dtypes, meshes."""

import dataclasses
import json
import math

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny

from dlm_jax import mesh
from dlm_jax.models import Cache, Decoder, DecoderConfig, commit, masks
from dlm_jax.models.grouped_attention import attend_grouped


def _recorded(golden, name):
  vectors, config = golden(name)
  return vectors, config, *golden_networks.decoder(vectors, config)


def _close(actual, wanted, tolerance=2e-5):
  scale = np.abs(np.asarray(wanted, np.float32)).max()
  np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * scale)


def _block_causal(length, block=4):
  return masks.block_causal(masks.sequence_slots(jnp.arange(length), block))[None]


# --- recorded numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name", ["sdar_forward__a", pytest.param("sdar_forward__b", marks=pytest.mark.slow)]
)
def test_recorded_logits(golden, name):
  """9.1-b: logits of the public network under every mask; causal is Qwen3's."""
  vectors, config, model, params = _recorded(golden, name)
  ids = jnp.asarray(vectors["input_ids"], jnp.int32)
  length = ids.shape[1]
  block_causal = _block_causal(length, config["bs"])
  np.testing.assert_array_equal(block_causal[0], vectors["mask_block_causal"])
  causal = masks.causal(masks.sequence_slots(jnp.arange(length), 1))[None]
  shifted = jnp.asarray(vectors["position_ids_shifted"], jnp.int32)
  for case, positions, visible in (
    ("block_causal", None, block_causal),
    ("causal", None, causal),
    ("bidirectional", None, None),
    ("block_causal_shifted_positions", shifted, block_causal),
  ):
    logits = tiny.logits(model, params, ids, positions, visible)
    assert logits.dtype == jnp.float32
    _close(logits, vectors[f"logits_{case}"])
  hidden = model.apply({"params": params}, ids, None, block_causal, method="trunk")
  _close(hidden, vectors[f"hidden_states_block_causal/{config['nl']}"])


@pytest.mark.parametrize(
  "name", ["sdar_forward__a", pytest.param("sdar_forward__b", marks=pytest.mark.slow)]
)
def test_recorded_cache(golden, name):
  """9.2-a: prefill, a noisy block read only, the clean block stored, the next block."""
  vectors, config, model, params = _recorded(golden, name)
  block, start = config["bs"], int(vectors["cache/prefill_length"])
  ids = jnp.asarray(vectors["input_ids"], jnp.int32)[:1]
  visible = _block_causal(start, block)
  cache = Cache.make(model.config, 1, start + block + 3)
  cache = commit(cache, tiny.extend(model, params, ids[:, :start], None, visible, cache)[1])
  _close(cache.k_NBSGC[0, 0, :start].swapaxes(0, 1), vectors["cache/layer0_key"][0])
  _close(cache.v_NBSGC[0, 0, :start].swapaxes(0, 1), vectors["cache/layer0_value"][0])

  noisy = ids[:, start : start + block]
  hidden, _ = tiny.extend(model, params, noisy, None, None, cache)
  _close(tiny.head(model, params, hidden), vectors["cache/logits_block1_not_stored"])
  clean = jnp.asarray(vectors["cache/clean_block1"], jnp.int32)
  cache = commit(cache, tiny.extend(model, params, clean, None, None, cache)[1])
  after = ids[:, start + block : start + 2 * block]
  hidden, _ = tiny.extend(model, params, after, None, None, cache)
  _close(tiny.head(model, params, hidden), vectors["cache/logits_block2_not_stored"])


# --- a reference in numpy -------------------------------------------------------------------------


def _norm(x, scale, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _rotated(x, positions, theta):
  half = x.shape[-1] // 2
  turned = np.empty_like(x)
  for i in range(half):
    angle = positions * theta ** (-2 * i / x.shape[-1])
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    turned[..., i] = x[..., i] * cos - x[..., i + half] * sin
    turned[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
  return turned


def _softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def _feed(layer, u, cfg):
  def gated(p, u):
    gate = u @ p["gate"]
    return (gate / (1 + np.exp(-gate)) * (u @ p["up"])) @ p["down"]

  if not cfg.experts:
    return gated({k: v["kernel"] for k, v in layer["mlp"].items()}, u)
  out = np.zeros_like(u)
  for row, x in enumerate(u):  # token by token, expert by expert
    probs = _softmax(x @ layer["experts"]["router"]["kernel"])
    best = np.argsort(-probs, kind="stable")[: cfg.experts_per_token]
    total = probs[best].sum() if cfg.normalize_gate else 1.0
    for e in best:
      p = {k: layer["experts"][k][e] for k in ("gate", "up", "down")}
      out[row] += probs[e] / total * gated(p, x)
  return out


def _reference(cfg, params, tokens, positions, visible):
  """Return float64 logits [L, V] of one sequence."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = params["embed"]["embedding"][tokens]
  for i in range(cfg.layers):
    layer = jax.tree.map(lambda x, i=i: x[i], params["blocks"])
    a = layer["attention"]
    u = _norm(x, layer["norm1"]["scale"], cfg.eps)
    q, k, v = (
      (u @ a[n]["kernel"]).reshape(len(x), count, cfg.head_dim)
      for n, count in (("q", cfg.heads), ("k", cfg.kv_heads), ("v", cfg.kv_heads))
    )
    q = _rotated(_norm(q, a["q_norm"]["scale"], cfg.eps), positions, cfg.rope_theta)
    k = _rotated(_norm(k, a["k_norm"]["scale"], cfg.eps), positions, cfg.rope_theta)
    mixed = np.empty_like(q)
    for h in range(cfg.heads):
      g = h // (cfg.heads // cfg.kv_heads)
      scores = q[:, h] @ k[:, g].T / np.sqrt(cfg.head_dim)
      mixed[:, h] = _softmax(np.where(visible, scores, -np.inf)) @ v[:, g]
    x = x + mixed.reshape(len(x), -1) @ a["out"]["kernel"]
    x = x + _feed(layer, _norm(x, layer["norm2"]["scale"], cfg.eps), cfg)
  x = _norm(x, params["norm"]["scale"], cfg.eps)
  return x @ (params["embed"]["embedding"].T if cfg.tied else params["project"]["kernel"])


_VARIANTS = {
  "dense": {},
  "one key head, tied": {"kv_heads": 1, "tied": True},
  "no grouping": {"kv_heads": 4, "rope_theta": 100.0},
  "experts": tiny.EXPERTS,
  "experts, raw gate": {**tiny.EXPERTS, "normalize_gate": False, "experts_per_token": 3},
}


@pytest.mark.parametrize("changes", _VARIANTS.values(), ids=_VARIANTS.keys())
def test_numpy_reference(changes):
  """9.1-a: norms, their order with the rotation, grouping, halves. 9.1-c: experts, one by one."""
  config = dataclasses.replace(tiny.DENSE, layers=2, **changes)
  model, params = tiny.make(config)
  tokens = tiny.tokens(2, 9)
  rng = np.random.default_rng(1)
  visible = (rng.random((2, 9, 9)) < 0.5) | np.eye(9, dtype=bool)
  positions = rng.integers(0, 60, (2, 9))
  logits = tiny.logits(model, params, tokens, jnp.asarray(positions), jnp.asarray(visible))
  assert np.std(logits) > 1  # else equality would say little
  for row in range(2):
    wanted = _reference(config, params, np.asarray(tokens[row]), positions[row], visible[row])
    np.testing.assert_allclose(logits[row], wanted, rtol=0, atol=1e-4)


# --- positions and masks --------------------------------------------------------------------------


def test_only_differences_of_positions_matter():
  """9.1-d: all positions moved by 1000 change nothing; spread positions do."""
  model, params = tiny.make()
  tokens, positions = tiny.tokens(1, 8), jnp.arange(8)[None]
  base = tiny.logits(model, params, tokens, positions, _block_causal(8))
  moved = tiny.logits(model, params, tokens, positions + 1000, _block_causal(8))
  np.testing.assert_allclose(moved, base, rtol=0, atol=1e-3)  # angles of 1000 rad in float32
  spread = tiny.logits(model, params, tokens, 3 * positions, _block_causal(8))
  assert np.abs(spread - base).max() > 0.1


def test_twins():
  """9.1-d: two tokens with one id, position and view have equal logits."""
  model, params = tiny.make()
  tokens = tiny.tokens(1, 7).at[0, 5].set(3).at[0, 2].set(3)
  positions = jnp.array([[0, 1, 4, 2, 3, 4, 6]])
  visible = np.random.default_rng(2).random((1, 7, 7)) < 0.6
  visible[0, 5] = visible[0, 2] = [True, True, False, True, False, False, True]
  logits = tiny.logits(model, params, tokens, positions, jnp.asarray(visible))
  np.testing.assert_allclose(logits[0, 5], logits[0, 2], rtol=0, atol=1e-5)


def test_defaults_hide_nothing():
  """Without positions and mask: counted from 0, and every position sees every other."""
  model, params = tiny.make()
  tokens = tiny.tokens(2, 6)
  given = jnp.arange(6)[None], jnp.ones((1, 6, 6), bool)
  base = tiny.logits(model, params, tokens)
  np.testing.assert_array_equal(base, tiny.logits(model, params, tokens, *given))
  changed = tiny.logits(model, params, tokens.at[:, -1].add(1))
  assert (np.abs(changed - base).max((0, 2)) > 1e-3).all()


@pytest.mark.slow
def test_a_query_that_sees_nothing():
  """Its attention is 0, nobody else notices, and no gradient is NaN."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 3, n, 4)), jnp.float32) for n in (4, 2, 2))
  visible = jnp.array([[[1, 1, 0], [0, 0, 0], [1, 1, 1]]], bool)

  def total(q, k, v):
    return attend_grouped(q, k, v, visible)

  out, back = jax.vjp(total, q, k, v)
  np.testing.assert_array_equal(out[0, 1], 0)
  assert np.abs(out[0, [0, 2]]).min() > 0
  assert all(np.isfinite(g).all() for g in back(jnp.ones_like(out)))


@pytest.mark.slow
def test_halves_and_remat():
  """Trunk and head compose; recomputation and unrolling leave gradients alone."""
  model, params = tiny.make()
  tokens = tiny.tokens(2, 8)
  hidden = model.apply({"params": params}, tokens, method="trunk")
  some = tiny.head(model, params, hidden[:, 2:5])
  np.testing.assert_allclose(some, tiny.logits(model, params, tokens)[:, 2:5], atol=1e-5)

  def gradient(**changes):
    other = Decoder(dataclasses.replace(tiny.DENSE, **changes))

    def loss(params):
      return jnp.mean(other.apply({"params": params}, tokens, None, _block_causal(8)) ** 2)

    return jax.jit(jax.grad(loss))(params)

  base = gradient()
  for changes in ({"remat": "full"}, {"remat": "dots", "unroll": 3}):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), base, gradient(**changes)
    )


# --- dtypes and sizes -----------------------------------------------------------------------------


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _equations(inner)


@pytest.mark.parametrize(
  "changes",
  [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({"tied": True}, tiny.EXPERTS))],
  ids=["", "tied", "experts"],
)
def test_no_converted_copy_of_stored_weights(changes):
  """A step on bfloat16 weights converts no weight matrix: each is read once, as it is stored."""
  config = dataclasses.replace(tiny.DENSE, dtype="bfloat16", **changes)
  model, params = tiny.make(config)
  cache = Cache.make(config, 1, 16)
  tokens = tiny.tokens(1, 2)

  def step(params):
    hidden, kv = model.apply({"params": params}, tokens, None, None, cache, method="extend")
    return model.apply({"params": params}, hidden, method="head"), kv

  def converted(params):
    kernels = [x for x in jax.tree.leaves(params) if x.shape[-2:] not in ((3, 32), (3, 8))]
    shapes = {x.shape[i:] for x in kernels for i in range(x.ndim - 1)}
    equations = list(_equations(jax.make_jaxpr(step)(params).jaxpr))
    conversions = [e for e in equations if e.primitive.name == "convert_element_type"]
    assert conversions
    return [e for e in conversions if e.invars[0].aval.shape in shapes]

  stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  assert not converted(stored)
  assert converted(params)  # float32 weights are: the search can find
  logits, kv = jax.jit(step)(stored)
  assert logits.dtype == jnp.float32 and kv.k_NBQGC.dtype == jnp.bfloat16
  exact = tiny.logits(*tiny.make(dataclasses.replace(config, dtype="float32")), tokens)
  assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


_SIZES = {  # dim, layers, heads, kv_heads, mlp_dim, GB stored, GB read by a step
  "1.7B": (2048, 28, 16, 8, 6144, 4.06, 3.44),
  "4B": (2560, 36, 32, 8, 9728, 8.83, 8.04),
  "8B": (4096, 36, 32, 8, 12288, 16.4, 15.14),
}


@pytest.mark.parametrize("name", _SIZES)
def test_bytes_of_public_sizes(name):
  """9.1-c: bytes in bfloat16 of the public sizes, untied, from shapes alone."""
  dim, layers, heads, kv_heads, mlp_dim, stored, read = _SIZES[name]
  config = DecoderConfig(
    vocab_size=151936,
    dim=dim,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=128,
    mlp_dim=mlp_dim,
  )
  shapes = _public_shapes(config)
  total = 2 * sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  embedding = 2 * math.prod(shapes["embed"]["embedding"].shape)
  assert total / 1e9 == pytest.approx(stored, rel=2.5e-3)
  assert (total - embedding) / 1e9 == pytest.approx(read, rel=2e-3)
  if name == "4B":
    assert total == 8822848512  # what the public index of SDAR-4B-Chat says


def test_bytes_of_experts():
  """9.1-c: 30B-A3B, shapes of Qwen3-30B-A3B."""
  config = DecoderConfig(
    vocab_size=151936,
    dim=2048,
    layers=48,
    heads=32,
    kv_heads=4,
    head_dim=128,
    mlp_dim=6144,
    experts=128,
    experts_per_token=8,
    expert_dim=768,
  )
  total = 2 * sum(math.prod(x.shape) for x in jax.tree.leaves(_public_shapes(config)))
  assert total / 1e9 == pytest.approx(61, rel=5e-3)


def _public_shapes(config):
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"kv_heads": 3}, "model.kv_heads=3 must divide model.heads=4"),
    ({"head_dim": 7}, "model.head_dim=7 must be even"),
    ({"dtype": "int8"}, "model.dtype='int8' is unknown"),
    ({"layers": 0}, "model.layers=0 must be at least 1"),
    ({"experts": 4, "expert_dim": 0}, "model.expert_dim=0"),
    ({"experts": 4, "expert_dim": 8, "experts_per_token": 5}, "must be in 1 … 4"),
  ],
)
def test_impossible_configs(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny.DENSE, **changes)


# --- meshes ---------------------------------------------------------------------------------------


_MESHES = [(1, 1, 8), (2, 2, 2)]


@pytest.mark.parametrize(
  "sizes", [_MESHES[0], pytest.param(_MESHES[1], marks=pytest.mark.slow)], ids=["tensor=8", "2x2x2"]
)
@pytest.mark.parametrize(
  "changes", [{}, pytest.param(tiny.EXPERTS, marks=pytest.mark.slow)], ids=["dense", "experts"]
)
def test_eight_devices_are_one(sizes, changes):
  """Heads, feed-forward width and vocabulary sharded, with a cache: the same float32 numbers."""
  config = dataclasses.replace(tiny.DENSE, layers=2, heads=8, kv_heads=4, **changes)
  model, params = tiny.make(config)
  axes = model.axes(jax.ShapeDtypeStruct((1, 1), jnp.int32))
  wide = mesh.make(*sizes)
  shardings = mesh.param_shardings(wide, axes, params)
  specs = {
    p: str(s.spec)
    for p, s in (
      (json.dumps([e.key for e in p]), s) for p, s in jax.tree_util.tree_leaves_with_path(shardings)
    )
  }
  for name in ("q", "out", "embedding", "project", "gate", "down"):
    assert any(f'"{name}"' in path and "tensor" in spec for path, spec in specs.items()), name
  tokens = tiny.tokens(4, 8)

  def run(params, tokens):
    """Commit half, extend by half: logits of both."""
    variables = {"params": params}
    cache = Cache.make(config, 4, 6)
    first, kv = model.apply(
      variables, tokens[:, :4], None, _block_causal(4, 2), cache, method="extend"
    )
    cache = commit(cache, kv)
    second, _ = model.apply(variables, tokens[:, 4:], None, None, cache, method="extend")
    return model.apply(variables, jnp.concatenate([first, second], 1), method="head")

  one = jax.jit(run)(params, tokens)
  spread = jax.device_put(params, shardings)
  many = jax.jit(run)(spread, jax.device_put(tokens, mesh.batch_sharding(wide)))
  _close(many, one, 1e-5)
