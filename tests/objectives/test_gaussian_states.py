# SPDX-License-Identifier: Apache-2.0
"""Soft inputs from a few entries of the state: the embeddings and gradients of all of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dlm_jax import process
from dlm_jax.objectives import duo, idlm
from dlm_jax.objectives import gaussian_states as states
from dlm_jax.objectives.idlm import method as idlm_method
from dlm_jax.objectives.setting import Setting

V, L, B = 1024, 4, 3


@pytest.fixture(scope="module")
def network():
  return tiny.network(vocab_size=V, time_conditioning=True)


def _relaxation(few=True):
  duality = process.GaussianDuality(vocab_size=V)
  return states.Relaxation(duality=duality, tau=1e-3, few=duality.enough(1e-3) if few else None)


def _setting(model, chunk=2):
  return Setting(model=model, process=process.Uniform(vocab_size=V), chunk=chunk)


def _curriculum():
  duality = process.GaussianDuality(vocab_size=V)
  temperatures = {"tau_log10_start": -3.0, "tau_log10_end": -4.0}
  return duo.SoftCurriculum(duality=duality, start=0, end=9, **temperatures)


def _predictions(network, relaxation, sharpness, valid, chunk=2):
  """Return (hard states, embeddings), and a gradient, of predictions as sharp as told."""
  model, params = network
  hidden = jax.random.normal(jax.random.key(1), (B, L, 8))
  table = sharpness * jax.random.normal(jax.random.key(2), (8, V))
  keys, t = jax.random.split(jax.random.key(3), B), jnp.asarray([0.0, 0.4, 1.0])
  weights = jax.random.normal(jax.random.key(4), (B, L, 8))

  def run(table, hidden, params):
    z, (x,) = states.embed_predictions(
      lambda h: h @ table,
      (hidden,),
      (params,),
      states.Noising(jnp.full((B, L), 5), keys, t, valid),
      setting=_setting(model, chunk),
      relaxation=relaxation,
    )
    return jnp.sum(x * weights), (z, x)

  run = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
  return run, (table, hidden, params)


@pytest.mark.parametrize(
  "sharpness", [0.5, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 3.0))]
)
def test_few_entries_of_predictions_are_all(network, sharpness):
  valid = jnp.arange(L)[None] >= jnp.asarray([0, 1, 2])[:, None]
  found = []
  for few in (True, False):
    run, arguments = _predictions(network, _relaxation(few), sharpness, valid)
    ((_, (z, x)), gradients) = jax.jit(run)(*arguments)
    found.append((z, x, gradients))
  (z, x, gradients), (z_all, x_all, gradients_all) = found
  np.testing.assert_array_equal(z, z_all)
  np.testing.assert_allclose(x, x_all, rtol=0, atol=2e-5)
  for ours, wanted in zip(*map(jax.tree.leaves, (gradients, gradients_all)), strict=True):
    scale = max(1e-3, float(jnp.abs(wanted).max()))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=3e-3 * scale)


def test_entries_are_found_once(network):
  """The backward pass makes the prediction again, but neither noise nor the search."""
  valid = jnp.ones((B, L), bool)
  run, arguments = _predictions(network, _relaxation(), 0.5, valid)
  assert str(jax.make_jaxpr(run)(*arguments)).count("erf_inv") == 1
  run, arguments = _predictions(network, _relaxation(few=False), 0.5, valid)
  assert str(jax.make_jaxpr(run)(*arguments)).count("erf_inv") == 2


def test_a_constant_prediction_is_made_once(network):
  """The fake's update needs no gradient of the student's prediction, nor that prediction again."""
  model, params = network
  table = jax.random.normal(jax.random.key(2), (8, V))
  keys, t = jax.random.split(jax.random.key(3), B), jnp.asarray([0.0, 0.4, 1.0])
  hidden = jax.random.normal(jax.random.key(1), (B, L, 8))

  def run(params):
    predict = lambda h: jnp.arccos(h @ table)  # noqa: E731
    _, (x,) = states.embed_predictions(
      predict,
      (hidden,),
      (params,),
      states.Noising(jnp.zeros((B, L), int), keys, t, jnp.ones((B, L), bool)),
      setting=_setting(model),
      relaxation=_relaxation(),
    )
    return jnp.sum(x)

  assert str(jax.make_jaxpr(jax.grad(run))(params)).count("= acos") == 1


@pytest.mark.slow
def test_duo_trains_on_few_entries(network):
  """The soft phase inside its branch, with gradients, in chunks and whole."""
  model, params = network
  curriculum = _curriculum()
  found = []
  for chunk in (None, 2):
    loss = functools.partial(
      duo.loss,
      batch=tiny.batch(),
      setting=Setting(model=model, process=process.Uniform(vocab_size=V), chunk=chunk),
      curriculum=curriculum,
      step=jnp.asarray(3),
    )
    found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
  for one, other in zip(*map(jax.tree.leaves, found), strict=True):
    scale = max(1e-3, float(jnp.abs(one).max()))
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-4 * scale)


@pytest.mark.slow
def test_data_need_no_dense_array(network):
  """Neither forward nor backward, apart from the table's own gradient."""
  model, params = network
  x0, t = tiny.tokens(batch=B), jnp.asarray([0.0, 0.4, 1.0])
  keys, valid = jax.random.split(jax.random.key(3), B), jnp.arange(L)[None] >= jnp.ones((B, 1))

  def run(params):
    options = {"setting": _setting(model), "relaxation": _relaxation()}
    return states.embed_data(params, states.Noising(x0, keys, t, valid), **options)

  z, x = jax.jit(run)(params)
  table = params["embed"]["embedding"]
  np.testing.assert_array_equal(z[:, 0], x0[:, 0])
  np.testing.assert_allclose(x[:, 0], table[x0[:, 0]], rtol=1e-6)
  assert (z[:, 1:] != x0[:, 1:]).any()
  text = str(jax.make_jaxpr(jax.grad(lambda p: run(p)[1].sum()))(params))
  assert re.search(rf"\[{V},8\]", text)
  assert not re.search(rf"\[(?!8,)[\d,]+,{V}\]", text), "other than of the head's own gradient"


def test_objectives_use_few_entries_where_they_are_few(monkeypatch):
  """IDLM and Duo choose by vocabulary and temperature."""
  seen, original = [], states.Relaxation
  monkeypatch.setattr(idlm_method, "Relaxation", lambda **x: seen.append(x["few"]) or original(**x))
  for size, tau in ((V, 1e-3), (V, 0.1), (16, 1e-3)):
    model, _ = tiny.network(vocab_size=size, time_conditioning=True)
    idlm.make(
      model=model,
      process=process.Uniform(vocab_size=size),
      optimizers=dict.fromkeys(idlm.TRAINED, optax.sgd(0.1)),
      tau=tau,
    )
  assert seen == [7, None, None]
  curriculum = _curriculum()
  assert curriculum.few == curriculum.duality.enough(1e-3) == 7
