# SPDX-License-Identifier: Apache-2.0
"""The causal Transformer: what each position sees, its tied head, its loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.models import Causal, CausalConfig
from dlm_jax.objectives import ar

V, L = 11, 6
CONFIG = CausalConfig(
  vocab_size=V, dim=16, layers=2, heads=2, length=L, dropout=0.3, dtype="float32"
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, size=(4, L)), jnp.int32)


@functools.cache
def _network():
  model = Causal(CONFIG)
  return model, jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, rng=None):
  return model.apply({"params": params}, tokens, rng)


_loss = jax.jit(ar.loss, static_argnames=("model", "train"))


def _keys(batch=4):
  return jax.random.split(jax.random.key(2), batch)


class _FromEmbeddings(Causal):
  """The same network, entered after the embedding."""

  def from_embeddings(self, x_BLD):
    from dlm_jax.models.layers import rotary_tables

    cfg = self.config
    rope = rotary_tables(x_BLD.shape[1], cfg.dim // cfg.heads)
    x_BLD, _ = self.blocks(x_BLD, jnp.arange(cfg.layers), rope, None)
    return self.embed.attend(self.norm(x_BLD), jnp.float32)


@pytest.mark.slow
def test_no_position_sees_a_later_one():
  """The gradient of outputs at l is exactly 0 at later embeddings, and nowhere 0 up to l."""
  model, params = _network()
  entered = _FromEmbeddings(CONFIG)
  x = params["embed"]["embedding"][TOKENS[:1]]

  def logits(x):
    return entered.apply({"params": params}, x, method="from_embeddings")[0]

  np.testing.assert_allclose(logits(x), _logits(model, params, TOKENS[:1])[0], rtol=1e-5, atol=1e-6)
  jacobian = jax.jit(jax.jacrev(logits))(x)[:, :, 0]  # [L out, V, L in, D]
  influence = np.abs(np.asarray(jacobian)).max((1, 3))
  np.testing.assert_array_equal(influence > 0, np.tril(np.ones((L, L), bool)))


def test_head_is_the_embedding():
  model, params = _network()
  assert set(params) == {"embed", "blocks", "norm"}
  moved = jax.tree.map(lambda x: x, params)
  moved["norm"]["scale"] = 2 * params["norm"]["scale"]
  once, twice = (_logits(model, p, TOKENS) for p in (params, moved))
  np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-6)
  bound = model.bind({"params": params})
  hidden = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 16)), jnp.float32)
  np.testing.assert_allclose(
    bound.embed.attend(hidden, jnp.float32), hidden @ params["embed"]["embedding"].T, rtol=1e-4
  )


def test_axes_and_dtypes():
  model, params = _network()
  axes = model.axes(TOKENS)
  structure = jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
  assert structure == jax.tree.structure(params)
  coarse = _logits(Causal(dataclasses.replace(CONFIG, dtype="bfloat16")), params, TOKENS)
  exact = _logits(model, params, TOKENS)
  assert coarse.dtype == jnp.float32
  np.testing.assert_allclose(coarse, exact, rtol=0, atol=0.03 * np.abs(exact).max())


def _by_hand(logits, tokens, valid):
  logits = np.asarray(logits, np.float64)
  total = count = 0.0
  for b in range(tokens.shape[0]):
    for l in range(1, L):
      row = logits[b, l - 1]
      nll = np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[b, l]]
      total, count = total + nll * valid[b, l], count + valid[b, l]
  return total / count


def test_loss_by_hand():
  model, params = _network()
  logits, tokens = _logits(model, params, TOKENS), np.asarray(TOKENS)
  batch = {"tokens": TOKENS, "rng": _keys()}
  value, _ = _loss(params, batch, model=model, train=False)
  np.testing.assert_allclose(value, _by_hand(logits, tokens, np.ones((4, L))), rtol=1e-5)

  valid = np.random.default_rng(4).random((4, L)) < 0.5
  valid[0] = False
  batch["valid"] = jnp.asarray(valid)
  value, _ = _loss(params, batch, model=model, train=False)
  np.testing.assert_allclose(value, _by_hand(logits, tokens, valid), rtol=1e-5)
  batch["valid"] = jnp.zeros((4, L), bool)
  assert _loss(params, batch, model=model, train=False)[0] == 0


def test_dropout_only_in_training():
  model, params = _network()
  first, other = ({"tokens": TOKENS, "rng": jax.random.split(jax.random.key(s), 4)} for s in (0, 1))
  values = [_loss(params, batch, model=model)[0] for batch in (first, other)]
  assert values[0] != values[1]
  quiet = [_loss(params, batch, model=model, train=False)[0] for batch in (first, other)]
  assert quiet[0] == quiet[1]


def test_dropout_of_a_sequence_depends_on_its_key_only():
  model, params = _network()
  four = _logits(model, params, TOKENS, _keys())
  two = _logits(model, params, TOKENS[2:], _keys()[2:])
  np.testing.assert_allclose(two, four[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{"unroll": 2, "remat": "full"}], ids=str)
def test_policies_agree(policy):
  _, params = _network()
  batch = {"tokens": TOKENS, "rng": _keys()}

  def gradient(config):
    loss = functools.partial(ar.loss, model=Causal(config))
    return jax.jit(jax.grad(loss, has_aux=True))(params, batch)[0]

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    gradient(dataclasses.replace(CONFIG, **policy)),
    gradient(CONFIG),
  )


@pytest.mark.parametrize(
  "field,value", [("heads", 3), ("attention", "flash"), ("remat", "some"), ("dropout", 2.0)]
)
def test_bad_configurations_name_the_field(field, value):
  with pytest.raises(ValueError, match=rf"^model\.{field}="):
    dataclasses.replace(CONFIG, **{field: value})
