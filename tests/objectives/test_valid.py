# SPDX-License-Identifier: Apache-2.0
"""What is given: every method reads it and leaves it alone. The methods are found by listing."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_objective_contract as contract
import tiny

from dlm_jax.data.packing import pack_blocks
from dlm_jax.experiment import plan
from dlm_jax.models import Causal, Decoder, DiT
from dlm_jax.models.layers import Embedding, FewTokens
from dlm_jax.objectives import ar, block_diffusion, draw_batch, idlm
from dlm_jax.process import BlockNoise

# The same in every row, so that a network of any batch can be told: given, open, open, given.
VALID = np.array([False, True, True, False])
GIVEN = np.array([3, 0, 0, 5])


def _method(name):
  """Return (objective, state) on a teacher; IDLM of uniform states is a method of its own here."""
  if name != "idlm_uniform":
    return contract._method(name)[0], contract._start(name)
  model, params = tiny.network(DiT, time_conditioning=True)
  optimizers = dict.fromkeys(idlm.TRAINED, optax.adam(1e-2, eps=1e-3))
  objective = idlm.make(model=model, process=tiny.UNIFORM, optimizers=optimizers)
  return objective, objective.init(jax.random.key(0), params)


def _step(name, *, given=GIVEN, valid=VALID, reads=None):
  """Take a step on records whose given tokens are `given`; `reads` alters what networks read."""
  objective, state = _method(name)
  batches = []
  for i in range(objective.batches):
    tokens = jnp.where(VALID[None], tiny.tokens(i), given[None])
    record = {"tokens": tokens, "valid": jnp.broadcast_to(valid[None], tokens.shape)}
    batches.append(draw_batch(record, jax.random.key(i)))
  with nn.intercept_methods(reads or (lambda call, args, kwargs, _: call(*args, **kwargs))):
    step = _compiled(name, reads)
    state, metrics = step(state, batches[0] if len(batches) == 1 else tuple(batches))
  return jax.device_get((state, metrics))


@functools.lru_cache(maxsize=1)
def _compiled(name, reads):
  """Return a step of its own for every interceptor: what networks read is decided by tracing."""
  objective, _ = _method(name)
  return jax.jit(lambda *arguments: objective.step(*arguments))


def _of_embeddings(alter):
  """Return an interceptor: `alter(call, tokens, valid, given)` in place of every embedding."""

  def reads(call, args, kwargs, context):
    if not isinstance(context.module, Embedding) or context.method_name != "__call__":
      return call(*args, **kwargs)
    tokens = args[0]
    ids = tokens.ids[..., 0] if isinstance(tokens, FewTokens) else tokens
    halves = ids.shape[1] // tiny.L  # blocks are read with a clean copy behind
    return alter(call, tokens, np.tile(VALID, halves), np.tile(GIVEN, halves))

  return reads


def _ids(tokens):
  """Return hard tokens of hard or soft ones."""
  if isinstance(tokens, FewTokens):
    best = jnp.argmax(tokens.logits, -1, keepdims=True)
    return jnp.take_along_axis(tokens.ids, best, axis=-1)[..., 0]
  return tokens if jnp.issubdtype(tokens.dtype, jnp.integer) else jnp.argmax(tokens, -1)


def _allergic(call, tokens, valid, given):
  """Answer NaN to a given token that is not what it was."""
  touched = (_ids(tokens) != given[None]) & ~valid[None]
  return jnp.where(touched[..., None], jnp.nan, call(tokens))


def _blind(call, tokens, valid, given):
  """See nothing where tokens are given."""
  return jnp.where(valid[None, :, None], call(tokens), 0.0)


NAMES = [*plan.list_objectives(), "idlm_uniform"]
DEFAULT = ("block_diffusion", "dcd", "mdlm")  # what they show, the others show in slow runs
every_method = pytest.mark.parametrize(
  "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)


@every_method
def test_given_tokens_are_never_noised_nor_drawn(name):
  """Whatever a network reads, a student's own sample too, holds them as they are."""
  state, metrics = _step(name, reads=_of_embeddings(_allergic))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.trees, metrics)))


def test_the_allergic_network_notices():
  everything = np.ones(tiny.L, bool)
  state, _ = _step("mdlm", valid=everything, reads=_of_embeddings(_allergic))
  assert np.isnan(jax.tree.leaves(state.trees)[0]).any()


@pytest.mark.parametrize(
  "name", [n if n == "mdlm" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_given_tokens_are_no_targets(name):
  """A network that cannot read them learns the same whatever they are, bit for bit."""
  other, blind = np.array([7, 0, 0, 1]), _of_embeddings(_blind)
  state, metrics = _step(name, reads=blind)
  poisoned, same = _step(name, given=other, reads=blind)
  jax.tree.map(np.testing.assert_array_equal, (state, metrics), (poisoned, same))
  seen, _ = _step(name)
  changed, _ = _step(name, given=other)
  assert not tiny.equal(seen.trees, changed.trees), "one that can read them learns otherwise"


# --- several in a row, and padding ----------------------------------------------------------------

DOCUMENTS = [
  ([1, 2, 3, 4], [False, True, True, True]),
  ([5, 0, 2, 9], [False, False, True, True]),
  ([3, 1, 4, 1], [False, True, True, True]),
]


def _row(documents, length):
  row = next(pack_blocks(documents, length, 2, 0))
  return {name: jnp.asarray(feature_L)[None] for name, feature_L in row.items()}


@functools.cache
def _decoder():
  return tiny.network(Decoder, length=16)


def _next_tokens(record):
  model, params = _decoder()
  value = ar.loss(params, draw_batch(record, jax.random.key(0)), model=model)[0]
  return value * record["valid"].sum()


def _blocks(record):
  """Blocks of one token are all masked: no noise is drawn."""
  model, params = _decoder()
  noise = BlockNoise(process=tiny.PROCESS)
  batch = draw_batch(record, jax.random.key(0))
  noisy = block_diffusion.with_noise(batch, noise=noise, block_length=1)
  options = {"model": model, "process": tiny.PROCESS, "block_length": 1}
  return block_diffusion.loss(params, noisy, **options)[0] * record["valid"].sum()


@pytest.mark.parametrize("total", [pytest.param(_next_tokens, marks=pytest.mark.slow), _blocks])
def test_what_shares_a_row_is_apart(total):
  """The nats of a shared row are those of its sequences alone; padding changes nothing."""
  _decoder()  # not while it is traced
  total, shared = jax.jit(total), _row(DOCUMENTS, 16)
  alone = [total(_row([document], 4)) for document in DOCUMENTS]
  np.testing.assert_allclose(total(shared), sum(alone), rtol=1e-5)
  poisoned = {**shared, "tokens": shared["tokens"].at[:, 12:].set(8)}
  assert total(poisoned) == total(shared)
  assert total({**shared, "tokens": shared["tokens"].at[:, 0].set(8)}) != total(shared)


@pytest.mark.parametrize("kind", [pytest.param(Causal, marks=pytest.mark.slow), Decoder])
@pytest.mark.parametrize("method", [ar, block_diffusion])
def test_poisoned_padding_trains_the_same_parameters(method, kind):
  if method is block_diffusion and kind is Causal:
    return
  model, params = tiny.network(kind)
  optimizers = {"model": optax.adam(1e-2)}
  objective = method.make(model=model, process=tiny.PROCESS, optimizers=optimizers)
  # blocks of 4 tokens: the padding has one of its own
  tokens, valid = jnp.tile(tiny.tokens(), 2), jnp.arange(2 * tiny.L)[None] < tiny.L
  valid = jnp.broadcast_to(valid, tokens.shape).at[:, 0].set(False)
  found = []
  for pad in (0, 8):
    record = {"tokens": tokens.at[:, tiny.L :].set(pad), "valid": valid}
    state = objective.init(jax.random.key(0), params)
    state, _ = jax.jit(objective.step)(state, draw_batch(record, jax.random.key(1)))
    found.append(jax.device_get(state))
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_causal_network_takes_no_shared_rows():
  model, params = tiny.network(Causal)
  with pytest.raises(ValueError, match="use a decoder, which keeps them apart"):
    ar.loss(params, draw_batch(_row(DOCUMENTS, 16), jax.random.key(0)), model=model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ar", "block_diffusion"])
def test_micro_batches_of_uneven_rows_change_nothing(name):
  """Rows with more valid tokens weigh more, whatever the micro-batch that they are in."""
  batch = draw_batch({"tokens": tiny.tokens(0)}, jax.random.key(0))
  last_B1 = np.arange(tiny.B)[:, None] % (tiny.L - 1)
  batch["valid"] = jnp.asarray(np.arange(tiny.L)[None] >= tiny.L - 1 - last_B1)
  trees = []
  for accumulate in (1, 2):
    objective, _, params = contract._method(name, accumulate=accumulate)
    state = objective.init(jax.random.key(0), params)
    trees.append(jax.jit(objective.step)(state, batch)[0].trees)
  chex.assert_trees_all_close(*trees, rtol=1e-5, atol=1e-6)
