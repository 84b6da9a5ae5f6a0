# SPDX-License-Identifier: Apache-2.0
"""The diffusion Transformer: recorded logits, its two halves, dropout, policies, dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dlm_jax.models import Denoiser, DiT, DiTConfig
from dlm_jax.models.dit import TimeEmbedding
from dlm_jax.models.layers import rotary_tables, rotate

TINY = DiTConfig(
  vocab_size=12, dim=16, cond_dim=8, layers=3, heads=2, length=6, dropout=0.4, dtype="float32"
)


def _close(actual, wanted, tolerance=2e-5):
  """Compare relative to the largest entry: what a float32 network can promise."""
  scale = np.abs(np.asarray(wanted, np.float32)).max()
  np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * scale)


def _noisy(params, seed=0):
  """Move every parameter off its initial value: modulations and head start at 0."""
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  leaves = [x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for x in leaves]
  return jax.tree.unflatten(structure, leaves)


@functools.cache
def _tiny(**changes):
  """Return a network with parameters that do not depend on `changes` (of policies)."""
  model = DiT(dataclasses.replace(TINY, **changes))
  return model, _noisy(_initial())


@functools.cache
def _initial():
  return jax.jit(DiT(TINY).init)(jax.random.key(0), _tokens(), jnp.zeros(4))["params"]


def _tokens(batch=4, length=6):
  rng = np.random.default_rng(3)
  return jnp.asarray(rng.integers(0, 12, size=(8, length)).astype(np.int32)[:batch])


def _keys(batch=4):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(batch))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, sigma, rng=None):
  return model.apply({"params": params}, tokens, sigma, rng)


@functools.partial(jax.jit, static_argnums=0)
def _trunk(model, params, tokens, sigma):
  return model.apply({"params": params}, tokens, sigma, method="trunk")


# --- recorded values ----------------------------------------------------------------------------


@pytest.fixture(params=["a", pytest.param("b", marks=pytest.mark.slow)])
def recorded(request, golden_dit):
  """Return (vectors, config, model, params) of one variant."""
  return golden_dit(f"dit_mdlm__{request.param}")


def test_golden_logits(recorded):
  vectors, _, model, params = recorded
  tokens, sigma = jnp.asarray(vectors["xt"], jnp.int32), jnp.asarray(vectors["sigma"])
  _close(_logits(model, params, tokens, sigma), vectors["logits"])
  conditioned = DiT(dataclasses.replace(model.config, time_conditioning=True))
  _close(_logits(conditioned, params, tokens, sigma), vectors["logits_if_time_conditioned"])
  _close(_logits(conditioned, params, tokens, 0 * sigma), vectors["logits"])


def test_golden_residual_stream(recorded):
  vectors, config, model, params = recorded
  tokens, sigma = jnp.asarray(vectors["xt"], jnp.int32), jnp.asarray(vectors["sigma"])
  for depth in range(1, config["nb"] + 1):
    shallow = DiT(dataclasses.replace(model.config, layers=depth))
    blocks = jax.tree.map(lambda x, n=depth: x[:n], params["blocks"])
    hidden = _trunk(shallow, {**params, "blocks": blocks}, tokens, sigma)
    _close(hidden, vectors[f"hidden_after_block{depth - 1}"])


def test_golden_time_and_rotary(recorded):
  vectors, config, _, params = recorded
  c = TimeEmbedding(config["cond"]).apply({"params": params["time"]}, jnp.zeros(config["B"]))
  _close(c, vectors["t_cond_at_sigma0"])
  channels = config["H"] // config["nh"]
  half = channels // 2  # the recorded tables hold every angle twice
  for table, name in zip(rotary_tables(config["L"], channels), ("cos", "sin"), strict=True):
    np.testing.assert_allclose(table, vectors[f"rope_{name}"][:, :half], rtol=0, atol=2e-6)


# --- size and structure -------------------------------------------------------------------------


def test_published_parameter_count():
  model = DiT(DiTConfig(vocab_size=50258))
  tokens, sigma = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens, sigma)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 169_627_218
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_initial_values():
  """Modulations and head start at 0: the network is uniform and every block the identity."""
  model, params = DiT(TINY), _initial()
  assert not np.any(_logits(model, params, _tokens(), jnp.zeros(4)))
  hidden = _trunk(model, params, _tokens(), jnp.zeros(4))
  np.testing.assert_array_equal(hidden, params["embed"]["embedding"][_tokens()])
  kernel = np.asarray(params["blocks"]["mlp"]["expand"]["kernel"])
  assert 0.9 / 4 < np.abs(kernel).max() <= 1 / 4  # uniform on ±1/√16
  assert len({layer.tobytes() for layer in kernel}) == 3


def test_axes_name_every_dimension():
  model, params = _tiny()
  axes = model.axes(_tokens(), jnp.zeros(4))
  is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
  assert jax.tree.structure(axes, is_leaf=is_spec) == jax.tree.structure(params)
  for spec, leaf in zip(
    jax.tree.leaves(axes, is_leaf=is_spec), jax.tree.leaves(params), strict=True
  ):
    assert len(spec) == leaf.ndim
  assert axes["blocks"]["mlp"]["expand"]["kernel"] == PartitionSpec("layers", "embed", "mlp")
  assert axes["embed"]["embedding"] == PartitionSpec("vocab", "embed")


def test_denoiser_is_a_pytree():
  model, params = _tiny()
  denoiser = Denoiser(model, params)
  assert len(jax.tree.leaves(denoiser)) == len(jax.tree.leaves(params))
  out = jax.jit(lambda d, x, s: d(x, s))(denoiser, _tokens(), jnp.ones(4))
  _close(out, _logits(model, params, _tokens(), jnp.ones(4)), 1e-6)
  doubled = jax.tree.map(lambda x: 2 * x, denoiser)
  assert isinstance(doubled, Denoiser) and doubled.model == model


def test_cast_leaves_float32_arithmetic_alone():
  model, params = _tiny()
  cast = Denoiser(model, params).cast(jnp.bfloat16).params
  for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
    keys = [entry.key for entry in path]
    matrix = keys[-1] == "kernel" and "time" not in keys and "modulation" not in keys
    assert leaf.dtype == (jnp.bfloat16 if matrix else jnp.float32), keys


@pytest.mark.slow
def test_cast_changes_no_bfloat16_output():
  """The network rounds its matrices anyway: casting them before the loop is free."""
  model, params = _tiny(dtype="bfloat16")
  denoiser = Denoiser(model, params)
  run = jax.jit(lambda d: d(_tokens(), jnp.ones(4)))
  np.testing.assert_array_equal(run(denoiser.cast(jnp.bfloat16)), run(denoiser))


# --- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("conditioned", [False, True])
def test_trunk_then_head_is_the_network(conditioned):
  model, params = _tiny(time_conditioning=conditioned)
  sigma = jnp.asarray([0.1, 0.7, 2.0, 5.0])
  logits = _logits(model, params, _tokens(), sigma)
  hidden = _trunk(model, params, _tokens(), sigma)
  _close(model.apply({"params": params}, hidden, sigma, method="head"), logits, 1e-6)
  places = jnp.asarray([[5, 0], [1, 1], [2, 4], [3, 0]])[..., None]
  gathered = jnp.take_along_axis(hidden, places, axis=1)
  some = model.apply({"params": params}, gathered, sigma, method="head")
  _close(some, jnp.take_along_axis(logits, places, axis=1), 1e-6)


def test_peaked_soft_tokens_are_ids():
  model, params = _tiny()
  soft = 1e4 * jax.nn.one_hot(_tokens(), 12)
  hard = _logits(model, params, _tokens(), jnp.ones(4))
  _close(_logits(model, params, soft, jnp.ones(4)), hard, 1e-6)


def test_soft_tokens_mix_embeddings():
  model, params = _tiny()
  table = params["embed"]["embedding"]
  soft = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25] + [1e-30] * 9]]))
  mixed = model.bind({"params": params}).embed(soft)
  _close(mixed[0, 0], 0.5 * table[0] + 0.25 * table[1] + 0.25 * table[2], 1e-6)


def test_time_is_ignored_unless_asked_for():
  deaf, params = _tiny()
  one, other = jnp.asarray([0.0, 1, 2, 3]), jnp.asarray([5.0, 0, 1, 7])
  np.testing.assert_array_equal(
    _logits(deaf, params, _tokens(), one), _logits(deaf, params, _tokens(), other)
  )
  model, params = _tiny(time_conditioning=True)
  first, second = (_logits(model, params, _tokens(), sigma) for sigma in (one, other))
  assert np.all(np.abs(first - second).max((1, 2)) > 1e-3)


def test_attention_is_bidirectional():
  model, params = _tiny()
  changed = _tokens(1).at[0, 5].set((_tokens(1)[0, 5] + 1) % 12)
  before, after = (_logits(model, params, x, jnp.ones(1)) for x in (_tokens(1), changed))
  assert np.all(np.abs(before - after).max(-1) > 1e-5)


def test_rotary_scores_depend_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
  rope = rotary_tables(12, 8)
  q, k = (rotate(jnp.tile(x, (1, 12, 1, 1)), *rope)[0, :, 0] for x in (q, k))
  scores = np.asarray(q @ k.T)
  for shift in range(-3, 4):
    diagonal = np.diagonal(scores, shift)
    np.testing.assert_allclose(diagonal, diagonal[0], rtol=0, atol=2e-6)
  assert np.ptp(scores) > 0.1
  np.testing.assert_allclose(np.linalg.norm(q, axis=-1), np.linalg.norm(q[0]), rtol=1e-6)


@pytest.mark.slow
def test_shorter_sequences_run():
  model, params = _tiny()
  assert _logits(model, params, _tokens(2, 4), jnp.ones(2)).shape == (2, 4, 12)


# --- policies change speed, not values ----------------------------------------------------------


def _value_and_grad(model, params):
  def loss(params):
    logits = model.apply({"params": params}, _tokens(), jnp.ones(4), _keys())
    return jnp.mean(jnp.sin(logits)), logits

  (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return logits, gradient


_plain = functools.cache(lambda: _value_and_grad(*_tiny()))


@pytest.mark.slow
@pytest.mark.parametrize(
  "policy",
  [
    pytest.param({"unroll": 3, "embedding_gradient": "scatter"}, marks=pytest.mark.slow),
    {"remat": "full", "embedding_gradient": "segment"},
    pytest.param({"remat": "dots", "unroll": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_policies_agree(policy):
  logits, gradient = _value_and_grad(*_tiny(**policy))
  _close(logits, _plain()[0], 2e-6)
  jax.tree.map(lambda a, b: _close(a, b, 2e-5), gradient, _plain()[1])


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
  model, params = _tiny(dtype="bfloat16")
  coarse = _logits(model, params, _tokens(), jnp.ones(4))
  assert coarse.dtype == jnp.float32
  exact = _logits(_tiny()[0], params, _tokens(), jnp.ones(4))
  error = np.abs(coarse - exact).max() / np.abs(exact).max()
  assert 1e-5 < error < 0.03
  _, gradient = _value_and_grad(model, params)
  assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


# --- dropout ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_keys_means_no_dropout():
  model, params = _tiny()
  quiet, _ = _tiny(dropout=0.0)
  plain = _logits(model, params, _tokens(), jnp.ones(4))
  np.testing.assert_array_equal(plain, _logits(quiet, params, _tokens(), jnp.ones(4)))
  np.testing.assert_array_equal(plain, _logits(quiet, params, _tokens(), jnp.ones(4), _keys()))
  dropped = _logits(model, params, _tokens(), jnp.ones(4), _keys())
  assert np.all(np.abs(dropped - plain).max((1, 2)) > 1e-3)


@pytest.mark.slow
def test_dropout_of_a_sequence_depends_on_its_key_only():
  model, params = _tiny()
  four = _logits(model, params, _tokens(), jnp.ones(4), _keys())
  for rows in ([2], [3, 0, 1]):
    rows = jnp.asarray(rows)
    some = _logits(model, params, _tokens()[rows], jnp.ones(len(rows)), _keys()[rows])
    _close(some, four[rows], 1e-6)


def test_every_dropout_of_the_network_differs():
  """Every branch of every layer alone, all other gates shut: to which entries it adds something.

  A layer that reused another's mask would give the same branch twice.
  """
  model, params = _tiny()
  run = jax.jit(functools.partial(model.apply, method="trunk"))
  embedded = model.apply({"params": params}, _tokens(), method="embedded")
  modulation, dim = params["blocks"]["modulation"], TINY.dim
  masks = set()
  for layer in range(TINY.layers):
    for gate in (2, 5):  # of shift, scale and gate, twice
      bias = jnp.zeros_like(modulation["bias"])
      bias = bias.at[layer, gate * dim : (gate + 1) * dim].set(1.0)
      alone = {"kernel": jnp.zeros_like(modulation["kernel"]), "bias": bias}
      tree = {**params, "blocks": {**params["blocks"], "modulation": alone}}
      kept = np.asarray(run({"params": tree}, _tokens(), jnp.ones(4), _keys()) != embedded)
      assert abs(kept.mean() - 0.6) < 0.1
      masks.add(kept.tobytes())
  assert len(masks) == 2 * TINY.layers


# --- bad configurations -------------------------------------------------------------------------


@pytest.mark.parametrize(
  "field,value",
  [
    ("heads", 3),
    ("heads", 16),
    ("heads", 0),
    ("attention", "flash"),
    ("remat", "some"),
    ("embedding_gradient", "sum"),
    ("dtype", "float31"),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("layers", 0),
    ("unroll", 0),
    ("vocab_size", 0),
    ("cond_dim", 0),
  ],
)
def test_bad_configurations_name_the_field(field, value):
  with pytest.raises(ValueError, match=rf"^model\.{field}="):
    dataclasses.replace(TINY, **{field: value})
