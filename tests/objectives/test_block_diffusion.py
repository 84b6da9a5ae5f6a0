# SPDX-License-Identifier: Apache-2.0
"""Block diffusion: recorded losses of BD3-LM and SDAR, what a block sees, exact expectations."""

import contextlib
import dataclasses
import functools
import itertools
from unittest import mock

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_decoder as tiny
from compiled import at_most
from recorded import close

from dlm_jax import convert, models, process, schedules
from dlm_jax.models import Cache, attention, commit, dit, layers, masks
from dlm_jax.objectives import ar, block_diffusion
from dlm_jax.objectives.block_diffusion.documents import (
  number_documents,
  number_padding,
  positions_between,
)
from dlm_jax.objectives.block_diffusion.intervals import candidates, quietest
from dlm_jax.process import BlockNoise
from dlm_jax.process.block import number_blocks

V, L, MASK = tiny.V, 8, tiny.V - 1
CONFIG = dataclasses.replace(tiny.DENSE, layers=2, length=L)
LINEAR = schedules.LogLinear(eps=0.0)
PROCESS = process.Absorbing(vocab_size=V, mask_id=MASK, schedule=LINEAR)
NOISE = BlockNoise(process=PROCESS)
SDAR = {"levels": "document", "at_least_one": True, "subs": False}


def _tokens(batch=3, length=L, seed=0):
  return tiny.tokens(batch, length, seed) % (V - 1)


def _raw(batch=3, length=L, seed=0, **more):
  rng = jax.random.split(jax.random.key(seed), batch)
  return {"tokens": _tokens(batch, length, seed), "rng": rng, "t": jnp.ones(batch), **more}


@functools.partial(jax.jit, static_argnames=("noise", "block_length", "interval", "first_given"))
def _noised(batch, *, noise=NOISE, block_length=4, interval=(1e-3, 1.0), first_given=False):
  return block_diffusion.with_noise(
    batch, noise=noise, block_length=block_length, interval=interval, first_given=first_given
  )


@functools.partial(jax.jit, static_argnames=("model", "block_length", "subs", "chunk", "process"))
def _nll(params, batch, model, block_length=4, subs=True, chunk=None, process=PROCESS):
  return block_diffusion.token_nll(
    params, batch, model=model, process=process, block_length=block_length, subs=subs, chunk=chunk
  )


def _tiny():
  return tiny.make(CONFIG)


# --- recorded numbers: SDAR -----------------------------------------------------------------------

SDAR_FILES = [f"sdar_train_{kind}__{x}" for kind in ("single", "packed") for x in "ab"]


@functools.cache
def _sdar(load, name):
  """Return (vectors, config, model, params, the process, a batch with the recorded noise)."""
  vectors, config = load(name)
  model, params = golden_networks.decoder(vectors, config, length=config["L"])
  proc = process.Absorbing(vocab_size=config["V"], mask_id=config["mask_token_id"], schedule=LINEAR)
  position = jnp.asarray(vectors["position_ids"], jnp.int32)
  document = jax.vmap(number_documents)(position)
  eps = config["eps"]
  level = eps + (1 - eps) * vectors["noise_t_uniform"]
  time = np.take_along_axis(level, np.asarray(document), axis=1)
  masked, valid = vectors["logits_to_keep_half"], ~vectors["prompt_mask"]
  np.testing.assert_array_equal(masked, valid & (vectors["noise_token_uniform"] < time))
  tokens = jnp.asarray(vectors["input_ids"], jnp.int32)
  batch = {
    "tokens": tokens,
    "noisy": jnp.where(masked, proc.mask_id, tokens),
    "valid": jnp.asarray(valid),
    "time": jnp.asarray(time),
    "weight": 1 / jnp.asarray(time),
    "block": jax.vmap(number_blocks, (0, None))(position, config["bs"]),
    "count": jnp.full(len(tokens), valid.sum() / len(tokens)),
    "position": position,
    "document": document,
  }
  return vectors, config, model, params, proc, batch


@pytest.mark.parametrize(
  "name", [n if n.endswith("a") else pytest.param(n, marks=pytest.mark.slow) for n in SDAR_FILES]
)
def test_recorded_sdar_sequence(golden, name):
  """1.5: tokens, positions and mask of the doubled sequence, halves side by side per document."""
  vectors, config, _, _, _, batch = _sdar(golden, name)
  slots = masks.doubled_slots(batch["position"], config["bs"], batch["document"])
  visible = np.asarray(masks.doubled(slots))
  doubled = np.concatenate([batch["noisy"], batch["tokens"]], axis=1)
  length = batch["tokens"].shape[1]
  for row in range(len(doubled)):
    document = np.asarray(batch["document"][row])
    order = np.concatenate(
      [
        np.flatnonzero(document == d) + half * length
        for d in range(document.max() + 1)
        for half in (0, 1)
      ]
    )
    np.testing.assert_array_equal(doubled[row][order], vectors["doubled_input_ids"][row])
    np.testing.assert_array_equal(slots.position[row][order], vectors["doubled_position_ids"][row])
    np.testing.assert_array_equal(
      visible[row][np.ix_(order, order)], vectors["doubled_attention_mask"][row]
    )


@pytest.mark.parametrize(
  "name", [SDAR_FILES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in SDAR_FILES[1:])]
)
def test_recorded_sdar_loss(golden, name):
  """1.5: cross entropies at masks, the loss of the released kernel, its gradients."""
  vectors, config, model, params, proc, batch = _sdar(golden, name)
  masked = vectors["logits_to_keep_half"]
  plain = {**batch, "weight": jnp.ones_like(batch["weight"])}
  nats = _nll(params, plain, model, config["bs"], False, process=proc)
  close(nats[masked], vectors["cross_entropy_at_masked"], 2e-5)
  assert not np.asarray(nats)[~masked].any()
  close(batch["time"][masked], vectors["p_mask"], 1e-6)
  assert batch["valid"].sum() == vectors["answer_len"]

  def loss(params):
    options = {"model": model, "process": proc, "block_length": config["bs"], "subs": False}
    return block_diffusion.loss(params, batch, **options, chunk=4)[0]

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  close(value, vectors["loss"], 1e-5)
  grads = convert.to_tensors(model, grads)
  names = [key for key in vectors if key.startswith("grad/")]
  assert len(names) > 4
  for key in names:
    close(grads[key.removeprefix("grad/")], vectors[key], 5e-5)


def test_recorded_packing(golden):
  """1.5: padding is renumbered and is a document of its own; lengths of documents."""
  vectors, _ = golden("sdar_position_ids__a")
  fixed = jax.vmap(number_padding)(jnp.asarray(vectors["position_ids"], jnp.int32))
  np.testing.assert_array_equal(fixed, vectors["fixed_position_ids"])
  for row, position in enumerate(fixed):
    lengths = np.bincount(number_documents(position))
    np.testing.assert_array_equal(lengths, vectors[f"token_nums_row{row}"])
    np.testing.assert_array_equal(positions_between(position == 0), position)


# --- recorded numbers: BD3-LM ---------------------------------------------------------------------


class _MaskedDiT:
  """A DiT with the decoder's interface: attention under a mask, positions given."""

  def __init__(self, model):
    self.model, self.config = model, model.config

  def apply(self, variables, inputs, position=None, visible=None, method=None):
    sigma = jnp.zeros(inputs.shape[0])
    if method == "head":
      return self.model.apply(variables, inputs, sigma, method="head")

    def attend(q, k, v, **_):
      scores = jnp.einsum("bqhc,bkhc->bhqk", q, k, precision="highest") * q.shape[-1] ** -0.5
      probs = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
      return jnp.einsum("bhqk,bkhc->bqhc", probs, v, precision="highest")

    def rotary(length, channels):
      return layers.rotary_at(position[0], channels)

    with contextlib.ExitStack() as stack:
      stack.enter_context(mock.patch.object(attention, "attend", attend))
      stack.enter_context(mock.patch.object(dit, "rotary_tables", rotary))
      return self.model.apply(variables, inputs, sigma, method="trunk")


@pytest.mark.parametrize(
  "name", ["bd3_forward__a", pytest.param("bd3_forward__b", marks=pytest.mark.slow)]
)
def test_recorded_bd3(golden_dit, name):
  """6, 9.2: mask, logits of the noisy half, SUBS and the loss per token of the public network."""
  vectors, config, model, params = golden_dit(name)
  proc = process.Absorbing(vocab_size=config["V"], mask_id=config["mask_index"], schedule=LINEAR)
  x0, xt = (jnp.asarray(vectors[key], jnp.int32) for key in ("x0", "xt"))
  length, size = x0.shape[1], config["bs"]
  slots = masks.doubled_slots(jnp.arange(length)[None], size)
  np.testing.assert_array_equal(masks.doubled(slots)[0], vectors["attention_mask"])

  network, inputs = _MaskedDiT(model), jnp.concatenate([xt, x0], axis=1)
  hidden = network.apply(
    {"params": params}, inputs, slots.position, masks.doubled(slots), method="trunk"
  )
  logits = network.apply({"params": params}, hidden[:, :length], method="head")
  close(logits, vectors["logits"], 2e-5)
  close(jax.vmap(proc.log_x0)(logits, xt), vectors["log_x_theta"], 2e-5)

  t = jnp.asarray(vectors["t"])
  weight = jax.vmap(BlockNoise(process=proc).weights)(t)
  close(-weight, vectors["loss_scale"], 1e-6)
  close(1 - proc.schedule.alpha(t), vectors["move_chance"], 1e-6)
  batch = {"tokens": x0, "noisy": xt, "weight": weight}
  nats = block_diffusion.token_nll(
    params, batch, model=network, process=proc, block_length=size, chunk=4
  )
  close(nats, vectors["loss_per_token"], 1e-5)
  valid, count = jnp.ones(x0.shape, bool), jnp.full(len(x0), float(length))
  value, _ = block_diffusion.loss(
    params,
    {**batch, "valid": valid, "count": count},
    model=network,
    process=proc,
    block_length=size,
  )
  close(value, vectors["loss_per_token"].mean(), 1e-5)


# --- what a block sees ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  "block_length", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8))]
)
def test_one_pass_is_a_pass_per_block(block_length):
  """9.2-b: each noisy block on a cache of the clean blocks before it."""
  model, params = _tiny()
  batch = _noised(_raw(), block_length=block_length)
  batch["noisy"] = jnp.where(jnp.arange(L)[None] % 3 == 0, batch["noisy"], MASK)
  nats = _nll(params, {**batch, "weight": jnp.ones((3, L))}, model, block_length)
  cache = Cache.make(model.config, 3, L)
  for start in range(0, L, block_length):
    now = slice(start, start + block_length)
    hidden, _ = tiny.extend(model, params, batch["noisy"][:, now], None, None, cache)
    logits = tiny.head(model, params, hidden)
    log_x0 = jax.vmap(PROCESS.log_x0)(logits, batch["noisy"][:, now])
    wanted = -jnp.take_along_axis(log_x0, batch["tokens"][:, now, None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats[:, now], wanted, atol=2e-5)
    _, kv = tiny.extend(model, params, batch["tokens"][:, now], None, None, cache)
    cache = commit(cache, kv)


def test_packed_documents_do_not_meet():
  """9.2-b: two documents in a row are two rows; one of them changed, the other is the same."""
  model, params = _tiny()
  lengths = (5, 3)  # off the grid of blocks
  position = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
  packed = _noised(_raw(1, position=position), block_length=2)
  packed["noisy"] = jnp.where(jnp.arange(L)[None] % 2 == 0, MASK, packed["tokens"])
  nats = _nll(params, packed, model, 2)
  for start, size in ((0, 5), (5, 3)):
    part = {
      key: jnp.pad(packed[key][:, start : start + size], ((0, 0), (0, L - size)))
      for key in ("tokens", "noisy", "weight")
    }
    rest = jnp.arange(L)[None]
    part["position"] = jnp.where(rest < size, rest, rest - size)
    part["document"] = (rest >= size).astype(jnp.int32)
    alone = _nll(params, part, model, 2)
    np.testing.assert_allclose(nats[:, start : start + size], alone[:, :size], atol=2e-5)
  changed = dict(packed)
  for key in ("tokens", "noisy"):
    changed[key] = packed[key].at[0, :5].set(jnp.arange(5) + 3)
  after = _nll(params, changed, model, 2)
  np.testing.assert_array_equal(after[:, 5:], nats[:, 5:])
  assert (np.asarray(after[:, :5]) != np.asarray(nats[:, :5])).any()


class _Numbered:
  """The network on tokens 0, 1, 2, …: then row i of the embedding is what position i reads."""

  def __init__(self, model):
    self.model, self.config = model, model.config

  def apply(self, variables, inputs, *args, method):
    if method == "trunk":
      inputs = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    return self.model.apply(variables, inputs, *args, method=method)


@pytest.mark.slow
def test_gradients_stay_where_the_mask_says():
  """9.2-c: the loss of a block, by embedding: its own noise and clean blocks before it."""
  model, params = _tiny()
  assert 2 * L <= V
  size = 2
  batch = {**_noised(_raw(2)), "noisy": jnp.full((2, L), MASK), "weight": jnp.ones((2, L))}

  @jax.jit
  def block_loss(embedding, block):
    tree = {**params, "embed": {"embedding": embedding}}
    nats = block_diffusion.token_nll(
      tree, batch, model=_Numbered(model), process=PROCESS, block_length=size
    )
    return jnp.sum(jnp.where(jnp.arange(L)[None] // size == block, nats, 0.0))

  for block in range(L // size):
    grads = np.asarray(jax.grad(block_loss)(params["embed"]["embedding"], block))
    noisy, clean = np.abs(grads[:L]).max(axis=1), np.abs(grads[L : 2 * L]).max(axis=1)
    own, before = np.arange(L) // size == block, np.arange(L) // size < block
    assert (noisy[own] > 1e-4).all() and not noisy[~own].any(), block
    assert (clean[before] > 1e-4).all() and not clean[~before].any(), block


# --- expectations ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("weight", ["nelbo", "one"])
def test_monte_carlo_is_the_exact_expectation(weight):
  """9.2-f: at a known level, over all eight masks of a block of three."""
  model, params = _tiny()
  p, count = 0.35, 4000
  clean = _tokens(1, 3, seed=4)
  noise = BlockNoise(process=PROCESS, weight=weight)
  exact = 0.0
  factor = 1 / p if weight == "nelbo" else 1.0
  for pattern in itertools.product([False, True], repeat=3):
    chance = np.prod([p if m else 1 - p for m in pattern])
    noisy = jnp.where(jnp.array([pattern]), MASK, clean)
    batch = {"tokens": clean, "noisy": noisy, "weight": jnp.full((1, 3), factor)}
    exact += chance * float(_nll(params, batch, model, 3).sum())
  raw = _raw(count)
  raw["tokens"] = jnp.tile(clean, (count, 1))
  batch = _noised(raw, noise=noise, block_length=3, interval=(p, p))
  nats = np.asarray(_nll(params, batch, model, 3).sum(axis=1))
  error = nats.std() / count**0.5
  assert abs(nats.mean() - exact) < 4 * error and error < 0.1 * exact


@pytest.mark.slow
def test_loss_is_per_scored_token():
  """9.2-f: one sum over all rows divided by all answers, prompts and pads left out."""
  model, params = _tiny()
  valid = jnp.arange(L)[None] >= jnp.array([[0], [3], [7]])
  batch = _noised(_raw(valid=valid), block_length=4)
  options = {"model": model, "process": PROCESS, "block_length": 4}
  value, (metrics, _) = block_diffusion.loss(params, batch, **options)
  nats = np.asarray(_nll(params, batch, model))
  assert not nats[~np.asarray(valid)].any()
  np.testing.assert_allclose(value, nats.sum() / 14, rtol=1e-5)
  masked = np.asarray(batch["noisy"]) == MASK
  np.testing.assert_allclose(metrics["masked"], masked.sum() / 14, rtol=1e-5)
  assert not masked[~np.asarray(valid)].any()


def test_the_first_token_may_be_given():
  position = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2]])
  given = _noised(_raw(1, position=position), block_length=1, first_given=True)
  np.testing.assert_array_equal(given["noisy"] == MASK, position > 0)
  np.testing.assert_array_equal(given["count"], [6])


@pytest.mark.slow
def test_separators_start_documents():
  tokens = jnp.array([[7, 1, 2, 7, 3, 4, 5, 6], [1, 2, 7, 7, 3, 4, 5, 6]])
  batch = block_diffusion.with_noise(
    {**_raw(2), "tokens": tokens}, noise=NOISE, block_length=2, separator=7
  )
  np.testing.assert_array_equal(
    batch["position"], [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 0, 1, 2, 3, 4]]
  )
  np.testing.assert_array_equal(
    batch["document"], [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 2, 2, 2, 2]]
  )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"levels": "document", "at_least_one": True}])
def test_single_tokens_are_next_token_prediction(options):
  """9.2-g: blocks of one give the chain rule of sequential evaluation, exactly and every time."""
  model, params = _tiny()
  noise = BlockNoise(process=PROCESS, **options)
  batch = _noised(_raw(2), noise=noise, block_length=1)
  nats = _nll(params, batch, model, 1)
  tokens = batch["tokens"]
  causal = masks.causal(masks.sequence_slots(jnp.arange(L)[None], 1))
  for place in range(L):  # one mask sees the prefix; what stands after it is seen by nothing before
    inputs = jnp.where(jnp.arange(L)[None] < place, tokens, MASK)
    logits = tiny.logits(model, params, inputs, None, causal)[:, place]
    log_x0 = jax.nn.log_softmax(logits.at[:, MASK].set(-jnp.inf), axis=-1)
    wanted = -jnp.take_along_axis(log_x0, tokens[:, place, None], axis=-1)[:, 0]
    np.testing.assert_allclose(nats[:, place], wanted, atol=2e-5)


@pytest.mark.slow
def test_one_block_is_masked_diffusion():
  """9.2-g: a block that spans the sequence gives MDLM's integrand of a bidirectional network."""
  model, params = _tiny()
  batch = _noised(_raw(), block_length=L)
  assert (batch["time"] == batch["time"][:, :1]).all()
  logits = tiny.logits(model, params, batch["noisy"])
  log_x0 = jax.vmap(PROCESS.log_x0)(logits, batch["noisy"])
  wanted = jax.vmap(PROCESS.nll)(log_x0, batch["noisy"], batch["tokens"], batch["time"][:, 0])
  np.testing.assert_allclose(_nll(params, batch, model, L), wanted, rtol=1e-4, atol=1e-4)


# --- the quietest interval ------------------------------------------------------------------------


def test_candidates():
  found = candidates()
  assert len(found) == 11 + 9 + 7 + 5 + 3
  np.testing.assert_allclose(found[:2], [[1e-3, 0.5], [0.05, 0.55]], rtol=1e-6)
  assert found.min() > 0 and found.max() <= 1
  with pytest.raises(ValueError, match="search_widths"):
    candidates((0.5, 1.5))


@pytest.mark.parametrize("best", [(0.3, 0.8), (0.45, 0.95), (0.05, 0.95)])
def test_the_known_best_interval_is_found(best):
  """9.2-h: losses that are quiet inside an interval and loud outside of it."""
  rng = np.random.default_rng(0)
  t = rng.uniform(1e-3, 1, 20_000)
  middle, half = (best[0] + best[1]) / 2, (best[1] - best[0]) / 2
  spread = np.where(np.abs(t - middle) > half, 4.0, 0.5)
  if half > 0.3:  # a wide interval wins where its two ends are what is quiet
    spread = np.where(np.abs(t - middle) < half - 0.2, 1.0, np.where(spread == 4.0, 50.0, 0.0))
  loss = 3 + rng.normal(size=t.size) * spread
  arrays = (jnp.asarray(x, jnp.float32) for x in (t, loss))
  found, variance = quietest(*arrays, jnp.full(t.size, True), jnp.asarray(candidates()))
  np.testing.assert_allclose(found, best, atol=1e-6)
  assert variance.min() == variance[np.all(np.isclose(candidates(), best), axis=1)]


def test_a_variance_by_hand():
  t, loss = jnp.array([0.1, 0.2, 0.6, 0.7, 0.9]), jnp.array([1.0, 5.0, 2.0, 3.0, 100.0])
  counts = jnp.array([True, True, True, True, False])
  intervals = jnp.array([[0.0, 0.5], [0.5, 1.0], [0.65, 0.75]])
  found, variance = quietest(t, loss, counts, intervals)
  np.testing.assert_allclose(variance, [8.0, 0.5, np.inf])
  np.testing.assert_array_equal(found, intervals[1])


@pytest.mark.slow
def test_the_quietest_candidate_is_that_of_means():
  """By hand: a document's estimate is the mean over its scored tokens, not their sum."""
  model, params = _tiny()
  rng = np.random.default_rng(2)
  starts = rng.random((24, L)) < 0.3
  position = jax.vmap(positions_between)(jnp.asarray(starts))
  valid = jnp.asarray(rng.random((24, L)) < 0.8)
  noise = BlockNoise(process=PROCESS, levels="document")
  batch = _noised(_raw(24, seed=2, position=position, valid=valid), noise=noise, block_length=2)
  options = {"model": model, "process": PROCESS, "block_length": 2}
  intervals = candidates()
  search = functools.partial(block_diffusion.search, levels="document", **options)
  found = jax.jit(search)(params, batch, jnp.asarray(intervals))

  nats, time = np.asarray(_nll(params, batch, model, 2), np.float64), np.asarray(batch["time"])
  groups = [
    (time[row, here].max(), nats[row, here & scored])
    for row, scored in enumerate(np.asarray(batch["valid"]))
    for here in (np.asarray(batch["document"][row]) == d for d in range(L))
    if (here & scored).any()
  ]
  t = np.array([t for t, _ in groups])

  def quietest(estimate):
    values = np.array([estimate(x) for _, x in groups])
    inside = [(t >= low) & (t <= high) for low, high in intervals]
    return intervals[np.argmin([values[x].var(ddof=1) for x in inside])]

  np.testing.assert_array_equal(found, quietest(np.mean))
  assert not np.array_equal(quietest(np.mean), quietest(np.sum)), "the test could not fail"


# --- training -------------------------------------------------------------------------------------


def _objective(**options):
  model, params = _tiny()
  objective = block_diffusion.make(
    model=model, process=PROCESS, optimizers={"model": optax.sgd(0.1)}, **options
  )
  return objective, objective.init(jax.random.key(0), params)


def _close_trees(left, right):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), left.trees, right.trees
  )


@pytest.mark.slow
def test_a_curriculum_changes_the_block_length():
  """The same compiled step; each of its steps is that of an objective with one length."""
  objective, state = _objective(earlier_lengths=(1,), earlier_steps=(1,), block_length=2)
  step = jax.jit(at_most(objective.step))
  for n, length in enumerate((1, 2)):
    fixed, fresh = _objective(block_length=length)
    wanted, _ = jax.jit(fixed.step)(fresh.replace(trees=state.trees, step=state.step), _raw(seed=n))
    state, metrics = step(state, _raw(seed=n))
    _close_trees(state, wanted.replace(ema=state.ema))
    assert (float(metrics["model/masked"]) == 1) == (length == 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SDAR])
def test_the_interval_is_searched(options):
  """6: every so many steps, from losses on the full interval; micro-batches change nothing."""
  results = []
  for accumulate in (1, 4):
    more = {"search_every": 2, "accumulate": accumulate, "interval": (0.4, 0.6), **options}
    objective, state = _objective(**more)
    step, seen = jax.jit(objective.step), []
    for n in range(4):
      state, metrics = step(state, _raw(16, seed=n))
      seen.append(tuple(np.asarray(state.aux["interval"]).tolist()))
      assert seen[-1][0] == metrics["model/interval_low"]
      assert seen[-1][1] == metrics["model/interval_high"]
    np.testing.assert_allclose(seen[0], (0.4, 0.6))
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert np.isclose(candidates(), seen[2]).all(axis=1).any()
    results.append((state, seen))
  assert results[0][1] == results[1][1]
  _close_trees(results[0][0], results[1][0])


@pytest.mark.slow
def test_micro_batches_weigh_tokens_not_rows():
  """Rows with prompts of different lengths: the same step whatever the micro-batches."""
  valid = jnp.arange(L)[None] >= jnp.array([[0], [7], [3], [6]])
  states = []
  for accumulate in (1, 4):
    objective, state = _objective(accumulate=accumulate, **SDAR)
    states.append(jax.jit(objective.step)(state, _raw(4, valid=valid))[0])
  _close_trees(*states)


def test_chunks_change_nothing():
  model, params = _tiny()
  batch = _noised(_raw())
  whole, parts = _nll(params, batch, model), _nll(params, batch, model, chunk=2)
  np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"block_length": 0}, "block_length=0"),
    ({"earlier_lengths": (1,)}, "earlier_steps"),
    ({"earlier_lengths": (1, 2), "earlier_steps": (5, 5)}, "earlier_steps"),
    ({"interval": (0.0, 1.0)}, "interval"),
    ({"interval": (0.5,)}, "interval"),
    ({"search_every": -1}, "search_every"),
    ({"chunk": 3}, "chunk=3"),
    ({"levels": "token"}, "levels"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    _objective(**options)


def test_blocks_need_a_decoder_and_a_mask():
  model, _ = _tiny()
  optimizers = {"model": optax.sgd(0.1)}
  with pytest.raises(ValueError, match=r"process\.name must be absorbing"):
    block_diffusion.make(model=model, process=None, optimizers=optimizers)


# --- from next tokens -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_decoder_learns_next_tokens_under_a_causal_mask():
  """The loss by hand; a later token never changes what was predicted before it."""
  model, params = _tiny()
  batch = _raw(2)
  value, _ = ar.loss(params, batch, model=model)
  visible = jnp.tril(jnp.ones((L, L), bool))[None]
  log_probs = jax.nn.log_softmax(tiny.logits(model, params, batch["tokens"], None, visible))
  wanted = -jnp.take_along_axis(log_probs[:, :-1], batch["tokens"][:, 1:, None], axis=-1)
  np.testing.assert_allclose(value, wanted.mean(), rtol=1e-5)
  changed = batch["tokens"].at[:, 5].set(0)
  before, after = (models.next_token_logits(model, params, x) for x in (batch["tokens"], changed))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert (np.asarray(before[:, 5:]) != np.asarray(after[:, 5:])).any()


@pytest.mark.slow
def test_blocks_start_from_next_tokens():
  """The tree of a next-token network is that of a block network, its mask's row included."""
  model, params = _tiny()
  source = ar.make(model=model, optimizers={"model": optax.sgd(0.1)})
  state, _ = jax.jit(source.step)(source.init(jax.random.key(0), params), _raw())
  objective, _ = _objective(**SDAR)
  start = objective.init(jax.random.key(0), state.trees["model"])
  jax.tree.map(np.testing.assert_array_equal, start.trees, state.trees)
  after, metrics = jax.jit(objective.step)(start, _raw())
  assert np.isfinite(metrics["model/loss"]) and int(after.step) == 1
