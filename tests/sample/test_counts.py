# SPDX-License-Identifier: Apache-2.0
"""What samplers know before anything runs: how many positions are due, and what need not be asked.

A `cond` or a `while` stops a GPU until the host has read the answer; a `scan` does not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from dlm_jax import models, process, sample, schedules
from dlm_jax.models import layers
from dlm_jax.sample import _counts, _uniform, grids, orders

V, L, KEY = 9, 32, jax.random.key(3)
MASKED = process.Absorbing(vocab_size=V, mask_id=V - 1)
UNIFORM = process.Uniform(vocab_size=V)
SCHEDULES = (schedules.LogLinear(), schedules.Cosine(), schedules.Polynomial(power=0.1))
SLOW = pytest.mark.slow
GRIDS = ("uniform", "cosine")


def _logits(tokens_BL, sigma_B):
  """Return logits that depend on all tokens and on the position, to the last digit alike."""
  del sigma_B
  seen_B1 = jnp.sum(tokens_BL * jnp.arange(1, tokens_BL.shape[1] + 1)[None], axis=1)[:, None]
  place_BL = tokens_BL + seen_B1 + jnp.arange(tokens_BL.shape[1])[None]
  return 2 * jnp.sin(place_BL[..., None] + 5.0 * jnp.arange(V)[None, None])


def _draw(denoiser, proc=MASKED, *, length=L, steps=4, batch=2, **options):
  return sample.generate(denoiser, proc, KEY, batch=batch, length=length, steps=steps, **options)


def _equations(jaxpr, inside=()):
  """Yield every equation with the names of the primitives around it."""
  for equation in jaxpr.eqns:
    yield equation, inside
    for inner in jaxprs_in_params(equation.params):
      yield from _equations(inner, (*inside, equation.primitive.name))


def _asked(proc, **options):
  """Return [which kind, what is around it] of every question of a sampling program."""
  denoiser = sample.from_logits(_logits)
  program = jax.make_jaxpr(lambda: _draw(denoiser, proc, **options))()
  names = [(e.primitive.name, inside) for e, inside in _equations(program.jaxpr)]
  return [
    (name, [x for x in inside if x in ("scan", "while", "cond")])
    for name, inside in names
    if name in ("cond", "while")
  ]


# --- what is asked ------------------------------------------------------------------------------

ASKED = [
  (MASKED, {}, []),
  (MASKED, {"order": "spaced", "noise_removal": "greedy"}, []),
  (MASKED, {"order": tuple(i % 4 for i in range(L))}, []),
  (MASKED, {"sampler": "first_hitting"}, []),
  (MASKED, {"sampler": "first_hitting", "order": "spaced"}, []),
  # whether a row has more than fit is not known
  (MASKED, {"order": "random", "noise_removal": "none"}, [("while", ["scan"])]),
  # one token in four steps, or a prompt that may hold all: most steps reveal nothing
  (MASKED, {"steps": 4 * L}, [("cond", ["scan"])]),
  (MASKED, {"prompt": jnp.zeros(3, jnp.int32)}, [("cond", ["scan"])]),
  (MASKED, {"order": (0,) * L}, [("cond", ["scan"])]),
  (UNIFORM, {"length": 128}, [("while", ["scan"])]),
]


@pytest.mark.parametrize("proc,options,wanted", ASKED, ids=[str(i) for i in range(len(ASKED))])
def test_what_is_asked(proc, options, wanted):
  assert _asked(proc, **options) == wanted


def test_the_removal_of_noise_is_asked_where_noise_may_be_left():
  """The one of the last step, and the turns of it: outside of the loop over steps."""
  kinds = [name for name, inside in _asked(MASKED, order="random") if "scan" not in inside]
  assert kinds == ["cond", "while"]


# --- what is known --------------------------------------------------------------------------------


@functools.cache
def _left(length):
  """Return a jitted `orders.left` of every count and a fine grid of roundings, as [N, K]."""
  uniform_U = np.append(np.arange(64) / 64, np.float32(1 - 2.0**-24)).astype(np.float32)
  count_N, uniform_N = (x.ravel() for x in np.meshgrid(np.arange(length + 1), uniform_U))
  given = jnp.asarray(count_N), jnp.asarray(uniform_N)
  return jax.jit(lambda survives_K: orders.left(given[0], survives_K, given[1])), count_N


@pytest.mark.parametrize(
  "length", [1, 5, 16, pytest.param(2, marks=SLOW), pytest.param(33, marks=SLOW)]
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("grid", ["rising", *(pytest.param(x, marks=SLOW) for x in GRIDS)])
def test_a_spaced_step_reveals_no_more_than_is_known(length, schedule, grid):
  """By enumeration: every number of steps, of free positions, and every rounding."""
  proc = process.Absorbing(vocab_size=V, mask_id=V - 1, schedule=schedule)
  run, count_N = _left(length)
  for steps in range(1, length + 1):
    survives_K = np.asarray(orders.survives(proc, grids.make(grid, steps, length=length)))
    known = _counts.of_order("spaced", survives_K, length)
    # repeating the last share adds steps that reveal nothing: one shape for all
    left_NK = np.asarray(run(np.append(survives_K, [survives_K[-1]] * (length - steps))))
    due_NK = -np.diff(np.concatenate([count_N[:, None], left_NK], axis=1), axis=1)[:, :steps]
    assert due_NK.min() >= 0 and (due_NK.sum(1) == count_N).all()
    assert due_NK.max() <= known.most <= due_NK.max() + 2
    empty = (due_NK[count_N == length] == 0).sum(1).mean()
    assert abs(empty - known.spared) < 0.05 * steps
    assert not known.remains


def test_a_random_step_is_empty_as_often_as_is_known():
  survives_K = orders.survives(MASKED, grids.uniform(8))
  known = _counts.of_order("random", survives_K, 12)
  options = {"batch": 4096, "length": 12, "steps": 8, "order": "random", "return_trace": True}
  draw = jax.jit(lambda: _draw(sample.from_logits(_logits), **options)[1])
  left_KB = np.asarray(draw() == MASKED.mask_id).sum(-1)[:8]
  revealed_KB = -np.diff(left_KB, axis=0, prepend=np.full((1, 4096), 12))
  assert known.most is None and known.remains
  np.testing.assert_allclose((revealed_KB == 0).sum(0).mean(), known.spared, atol=0.06)


def test_given_steps_are_counted():
  known = lambda order: _counts.of_order(order, np.linspace(0.75, 0, 4), 4)  # noqa: E731
  assert known((0, 1, 2, 3)) == (1, 0.0, False)
  assert known(np.array([[0, 1, 2, 3], [2, 2, 2, 0]])) == (3, 2.0, False)
  nothing = (None, 4.0, True)
  for order in (lambda *_: None, (0, 1, 2, 4), np.zeros((0,), int), np.zeros((1, 1, 4), int)):
    assert known(order) == nothing
  traced = []
  jax.jit(lambda order: traced.append(known(order)))(jnp.arange(4))
  assert traced == [nothing]


def test_questions_are_worth_their_price():
  """One in 32 steps spared is, and a prompt or more steps than tokens may spare many."""
  counts = _counts.Counts(most=None, spared=0.5, remains=True)
  assert counts.asks(15, 99, False) and not counts.asks(17, 99, False)
  assert counts.asks(17, 99, True) and counts.asks(17, 16, False)


# --- it changes no token --------------------------------------------------------------------------

CROWDED = tuple(0 if i % 3 else 3 for i in range(L))  # 21 of them at once
SAME = [{}, {"steps": 20}, {"order": CROWDED}, {"prompt": jnp.array([1, 8, 2], jnp.int32)}]
SAME += [{"steps": 16, "grid": "cosine"}, {"steps": 1}, {"steps": 48}]
SAME += [{"order": "random"}, {"sampler": "first_hitting"}]


@pytest.mark.parametrize("options", SAME, ids=str)
def test_masked_samples_are_those_of_a_program_that_asks(options, monkeypatch):
  denoiser = sample.from_logits(_logits)
  given = {"noise_removal": "ancestral", "return_trace": True, **options}
  tokens, trace = jax.jit(lambda: _draw(denoiser, **given))()
  monkeypatch.setattr(_counts, "of_order", lambda *_: _counts.Counts(None, 1e9, True))
  monkeypatch.setattr(_counts, "ONE_EACH", _counts.Counts(None, 1e9, True))
  monkeypatch.setattr(_counts.Counts, "capacity", lambda *_: 3)
  wanted = jax.jit(lambda: _draw(denoiser, **given))()
  assert (np.asarray(tokens) != MASKED.mask_id).all()
  np.testing.assert_array_equal(tokens, wanted[0])
  np.testing.assert_array_equal(trace, wanted[1])


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy"])
def test_uniform_samples_do_not_depend_on_the_turns(noise_removal, monkeypatch):
  denoiser = sample.from_logits(_logits)
  draw = lambda: _draw(denoiser, UNIFORM, length=64, noise_removal=noise_removal)  # noqa: E731
  assert _uniform._capacity(64, 2, V) == 40
  few = jax.jit(draw)()
  monkeypatch.setattr(_uniform, "_LOGITS", 0)
  assert _uniform._capacity(64, 2, V) == 8
  np.testing.assert_array_equal(few, jax.jit(lambda: draw())())


def test_turns_are_large_where_logits_are_few():
  assert _uniform._capacity(1024, 1, 50_258) == 576
  assert _uniform._capacity(1024, 32, 50_258) == 128
  assert _uniform._capacity(3, 1, V) == 3


# --- the vocabulary head is padded once -----------------------------------------------------------

WIDE = V + 5


def _network(dtype="bfloat16"):
  model = models.DiT(models.DiTConfig(vocab_size=V, dim=8, heads=2, layers=1, dtype=dtype))
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int), jnp.zeros(1))
  rng = np.random.default_rng(0)
  made = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
  return models.Denoiser(model, jax.tree.map(made, shapes["params"]))


def _pad_the_head(monkeypatch):
  monkeypatch.setattr(layers, "padded", lambda width, dtype: WIDE if width == V else width)


def _pads(denoiser):
  """Return what is around every padding of the head's kernel in a sampling program."""
  program = jax.make_jaxpr(lambda x: _draw(x))(denoiser)  # a function of its own is traced anew
  pads = [(e.outvars[0].aval, x) for e, x in _equations(program.jaxpr) if e.primitive.name == "pad"]
  return [("scan" in inside, out.dtype) for out, inside in pads if out.shape == (8, WIDE)]


def test_the_head_is_padded_in_front_of_the_loop(monkeypatch):
  denoiser = _network()
  assert _pads(denoiser) == []
  _pad_the_head(monkeypatch)
  assert _pads(denoiser) == [(False, jnp.bfloat16)]
  monkeypatch.setattr(models.Denoiser, "aligned", lambda self: self)
  assert [inside for inside, _ in _pads(denoiser)] == [True]  # the test would notice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_padded_head_gives_the_same_logits(dtype, monkeypatch):
  denoiser, tokens = _network(dtype), jnp.arange(8, dtype=jnp.int32)[None]
  run = lambda denoiser: denoiser(tokens, jnp.ones(1))  # noqa: E731
  plain = run(denoiser)
  _pad_the_head(monkeypatch)
  wide = denoiser.aligned()
  kernel = wide.params["output"]["project"]["kernel"]
  assert kernel.shape == (8, WIDE) and kernel.dtype == dtype
  assert not np.any(np.asarray(kernel[:, V:], np.float32))
  np.testing.assert_array_equal(run(wide), run(denoiser))
  np.testing.assert_allclose(run(wide), plain, rtol=1e-6, atol=1e-6)
  again = wide.aligned().params["output"]["project"]["kernel"]
  assert again.shape == kernel.shape


def test_nothing_is_padded_where_nothing_has_to_be():
  denoiser = _network()
  leaves = zip(jax.tree.leaves(denoiser.aligned()), jax.tree.leaves(denoiser), strict=True)
  assert all(one is other for one, other in leaves)
  other = models.Denoiser(object(), {"kernel": jnp.zeros((2, V))})
  assert other.aligned() is other


@SLOW
def test_samples_of_a_padded_head_also_under_explicit_axes(monkeypatch):
  denoiser = _network("float32")
  wanted = jax.jit(_draw)(denoiser)
  _pad_the_head(monkeypatch)
  mesh = jax.make_mesh(
    (2, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4]
  )
  np.testing.assert_array_equal(jax.jit(lambda x: _draw(x))(denoiser), wanted)
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(lambda x: _draw(x, batch=2))(denoiser), wanted)
