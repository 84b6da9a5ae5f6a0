# SPDX-License-Identifier: Apache-2.0
"""`sample.generate` as its users meet it: prompts, traces, keys, transformations, bad input."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from compiled import at_most
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax import models, process, sample, schedules
from dlm_jax.errors import InputError

L = 3
PROC = process.Absorbing(vocab_size=toy.VOCABULARY, mask_id=toy.MASK)
LATE = dataclasses.replace(PROC, schedule=schedules.Polynomial(power=0.1))
SAMPLERS = ("ancestral", "first_hitting")
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
KEY = jax.random.key(7)


@functools.cache
def _compiled(**options):
  """Return a jitted `generate`, compiled once per set of static options and prompt shape."""

  def generate(denoiser, rng, prompt, frozen):
    given = {"proc": PROC, "batch": 8, "length": L, **options}
    proc = given.pop("proc")
    return sample.generate(denoiser, proc, rng, prompt=prompt, frozen=frozen, **given)

  return jax.jit(generate)


_toy = functools.cache(toy.make)


def _generate(rng=KEY, *, denoiser=None, prompt=None, frozen=None, **options):
  return _compiled(**options)(denoiser or _toy(L), rng, prompt, frozen)


# --- shapes, masks, traces ----------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("batch,steps", [(1, 1), (64, 40)])
def test_tokens_are_complete(sampler, batch, steps):
  tokens = _generate(batch=batch, steps=steps, sampler=sampler)
  assert tokens.shape == (batch, L)
  assert tokens.dtype == jnp.int32
  assert np.all((tokens >= 0) & (tokens < toy.VOCABULARY) & (tokens != toy.MASK))


@every_sampler
def test_one_position(sampler):
  tokens = _generate(denoiser=_toy(1), length=1, sampler=sampler, steps=4)
  assert tokens.shape == (8, 1) and np.all(tokens != toy.MASK)


@pytest.mark.parametrize(
  "noise_removal", ["ancestral", pytest.param("greedy", marks=pytest.mark.slow), "none"]
)
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_trace_of_the_ancestral_sampler(noise_removal, steps):
  """LATE leaves masks to the noise removal, so the last entry differs from the one before."""
  options = {"proc": LATE, "batch": 256, "steps": steps, "noise_removal": noise_removal}
  options["order"] = "random"
  tokens, trace_KBL = _generate(return_trace=True, **options)
  np.testing.assert_array_equal(tokens, _generate(**options))
  _check_trace(tokens, trace_KBL)
  # One state per step, and one more after the noise removal where there is one.
  assert len(trace_KBL) == steps + (noise_removal != "none")
  left = (np.asarray(trace_KBL) == toy.MASK).sum(axis=(1, 2))
  assert left[steps - 1] > 0
  assert (left[-1] > 0) == (noise_removal == "none")


@pytest.mark.parametrize("noise_removal", ["ancestral", "none"])
def test_trace_of_the_default_order(noise_removal):
  """As many states as in random order, and no masks left to the noise removal, even under LATE."""
  options = {"proc": LATE, "batch": 64, "steps": 2, "noise_removal": noise_removal}
  tokens, trace_KBL = _generate(return_trace=True, **options)
  _check_trace(tokens, trace_KBL)
  assert len(trace_KBL) == 2 + (noise_removal != "none")
  assert np.any(trace_KBL[0] == toy.MASK) and not np.any(trace_KBL[1] == toy.MASK)


def test_trace_of_first_hitting():
  tokens, trace_KBL = _generate(sampler="first_hitting", batch=16, return_trace=True)
  _check_trace(tokens, trace_KBL)
  masks_KB = (np.asarray(trace_KBL) == toy.MASK).sum(axis=-1)
  assert np.all(-np.diff(masks_KB, axis=0) <= 1)  # one token at a time


def _check_trace(tokens, trace_KBL):
  tokens, trace_KBL = np.asarray(tokens), np.asarray(trace_KBL)
  assert trace_KBL.shape[1:] == tokens.shape and trace_KBL.dtype == np.int32
  np.testing.assert_array_equal(trace_KBL[-1], tokens)
  for before, after in itertools.pairwise(trace_KBL):
    revealed = before != toy.MASK
    np.testing.assert_array_equal(after[revealed], before[revealed])


# --- prompts --------------------------------------------------------------------------------------


@every_sampler
def test_given_tokens_stay(sampler):
  rng = np.random.default_rng(0)
  prompt = rng.integers(0, toy.VOCABULARY, size=(64, L)).astype(np.int32)
  tokens, trace = _generate(
    batch=64, steps=5, sampler=sampler, prompt=jnp.asarray(prompt), return_trace=True
  )
  given = prompt != toy.MASK
  np.testing.assert_array_equal(np.asarray(tokens)[given], prompt[given])
  for state in np.asarray(trace):
    np.testing.assert_array_equal(state[given], prompt[given])
  assert np.all(tokens != toy.MASK)


@every_sampler
def test_a_complete_prompt_comes_back(sampler):
  prompt = jnp.array([0, 2, 1])
  tokens = _generate(prompt=prompt, sampler=sampler)
  np.testing.assert_array_equal(tokens, np.broadcast_to(prompt, (8, L)))


@every_sampler
def test_short_long_and_batched_prompts_agree(sampler):
  short = _generate(prompt=jnp.array([1]), sampler=sampler)
  whole = _generate(prompt=jnp.array([1, toy.MASK, toy.MASK]), sampler=sampler)
  rows = _generate(prompt=jnp.tile(jnp.array([[1, toy.MASK, toy.MASK]]), (8, 1)), sampler=sampler)
  np.testing.assert_array_equal(short, whole)
  np.testing.assert_array_equal(short, rows)
  assert np.all(short[:, 0] == 1)


@every_sampler
def test_what_is_not_frozen_is_generated_afresh(sampler):
  """A prompt's tokens at positions that are not frozen must not matter."""
  frozen = jnp.array([True, False, False])
  tokens = [
    np.asarray(_generate(prompt=jnp.array(p), frozen=frozen, batch=32, sampler=sampler))
    for p in ([2, 0, 1], [2, 1, 0], [2, toy.MASK, toy.MASK])
  ]
  assert np.all(tokens[0][:, 0] == 2)
  np.testing.assert_array_equal(tokens[0], tokens[1])
  np.testing.assert_array_equal(tokens[0], tokens[2])
  assert len(np.unique(tokens[0][:, 1:], axis=0)) > 2


# --- keys -----------------------------------------------------------------------------------------


def _options(name, *, slow=False, **options):
  return pytest.param(options, id=name, marks=pytest.mark.slow if slow else ())


every_option = pytest.mark.parametrize(
  "options",
  [
    _options("one_step", steps=1, slow=True),
    _options("four_steps", steps=4),
    _options("random", steps=4, order="random", slow=True),
    _options("greedy", steps=4, proc=LATE, order="random", noise_removal="greedy", slow=True),
    _options(
      "sharpened", steps=4, proc=LATE, order="random", temperature=0.7, nucleus=0.9, slow=True
    ),
    _options("first_hitting", sampler="first_hitting"),
    _options("legacy", steps=4, precision="legacy", slow=True),
  ],
)


def _rows(batch):
  """Return a prompt whose row i is the same in every batch."""
  given = np.random.default_rng(1).integers(0, toy.VOCABULARY, size=(8, L)).astype(np.int32)
  given[::2] = toy.MASK
  return jnp.asarray(given[:batch])


@every_option
def test_a_sequence_depends_on_its_own_key_only(options):
  eight = np.asarray(_generate(batch=8, prompt=_rows(8), **options))
  for batch in (1, 3):
    fewer = _generate(batch=batch, prompt=_rows(batch), **options)
    np.testing.assert_array_equal(fewer, eight[:batch])


@every_option
def test_eight_devices_give_the_same_tokens(options):
  assert jax.device_count() == 8
  mesh = Mesh(np.array(jax.devices()), ("data",))
  rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
  generate = jax.jit(
    lambda denoiser, rng, prompt: _generate(rng, denoiser=denoiser, prompt=prompt, **options),
    in_shardings=(everywhere, everywhere, rows),
    out_shardings=rows,
  )
  prompt = jax.device_put(_rows(8), rows)
  tokens = generate(jax.device_put(_toy(L), everywhere), KEY, prompt)
  assert len(tokens.sharding.device_set) == 8
  np.testing.assert_array_equal(tokens, _generate(batch=8, prompt=_rows(8), **options))


@every_sampler
def test_sequences_and_keys_differ(sampler):
  tokens = np.asarray(_generate(batch=64, sampler=sampler))
  assert len(np.unique(tokens, axis=0)) > 4
  other = np.asarray(_generate(jax.random.key(8), batch=64, sampler=sampler))
  assert np.any(tokens != other)
  np.testing.assert_array_equal(tokens, _generate(batch=64, sampler=sampler))


@every_sampler
def test_no_key_is_used_twice(sampler):
  with jax.debug_key_reuse(True):
    sample.generate(_toy(L), PROC, jax.random.key(3), batch=2, length=L, steps=2, sampler=sampler)


# --- transformations ---------------------------------------------------------------------------


@every_sampler
def test_eager_jit_and_vmap_agree(sampler):
  options = {"batch": 2, "steps": 3, "sampler": sampler, "return_trace": True}
  keys = jax.random.split(KEY, 3)
  eager = sample.generate(_toy(L), PROC, keys[0], length=L, **options)
  jax.tree.map(np.testing.assert_array_equal, _generate(keys[0], **options), eager)
  mapped = jax.jit(jax.vmap(lambda key: _generate(key, **options)))(keys)
  for i, key in enumerate(keys):
    alone = _generate(key, **options)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], mapped), alone)


@pytest.mark.slow
def test_vmap_over_denoisers():
  """Two networks at once: parameters are leaves, so a stack of them is a batch of denoisers."""
  pair = [toy.make(L, seed=seed) for seed in (0, 1)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *pair)
  both = jax.vmap(lambda denoiser: _generate(denoiser=denoiser, steps=3))(stacked)
  for i, denoiser in enumerate(pair):
    np.testing.assert_array_equal(both[i], _generate(denoiser=denoiser, steps=3))


@dataclasses.dataclass(frozen=True)
class Counting(toy.Table):
  """Count trunk evaluations while they happen."""

  def trunk(self, params, tokens_BL, sigma_B):
    jax.debug.callback(lambda: EVALUATIONS.append(1))
    return super().trunk(params, tokens_BL, sigma_B)


EVALUATIONS = []


def _evaluations(**options):
  EVALUATIONS.clear()
  denoiser = dataclasses.replace(_toy(L), model=Counting(length=L))
  jax.block_until_ready(_generate(denoiser=denoiser, **options))
  jax.effects_barrier()
  return len(EVALUATIONS)


def test_number_of_network_evaluations():
  assert 1 <= _evaluations(steps=2, batch=64) <= 3
  assert 1 <= _evaluations(sampler="first_hitting", batch=64) <= L
  # A sequence of three tokens is revealed in at most three of a hundred steps.
  assert 1 <= _evaluations(steps=100, batch=1) <= L + 1


@pytest.mark.first_case
@pytest.mark.parametrize("sampler", ["ancestral", "psi", "analytic"])
def test_sharpening_may_be_traced(sampler):
  """One program for all temperatures and nuclei; the same tokens as with numbers."""
  options = {"batch": 16, "length": L, "steps": 3, "sampler": sampler}

  @jax.jit
  @at_most
  def traced(temperature, nucleus):
    return sample.generate(_toy(L), PROC, KEY, temperature=temperature, nucleus=nucleus, **options)

  for temperature, nucleus in ((1.0, 1.0), (0.6, 0.9), (1.3, 0.5)):
    wanted = _generate(batch=16, steps=3, sampler=sampler, temperature=temperature, nucleus=nucleus)
    np.testing.assert_array_equal(traced(temperature, nucleus), wanted)


@pytest.mark.first_case
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"sampler": "psi"},
    {"sampler": "analytic"},
    {"sampler": "first_hitting"},
    {"proc": process.Uniform(vocab_size=toy.VOCABULARY)},
  ],
  ids=str,
)
def test_temperature_0_takes_the_most_probable_token(options):
  """As a nucleus does that has room for one; traced or not, and what tends to it."""
  fixed = {"proc": PROC, "batch": 16, "length": L, "steps": 3, **options}
  run = lambda t: sample.generate(_toy(L), rng=KEY, temperature=t, **fixed)  # noqa: E731
  wanted = _generate(nucleus=1e-9, **fixed)
  assert (_generate(**fixed) != wanted).any()
  np.testing.assert_array_equal(jax.jit(lambda: run(0.0))(), wanted)
  traced = jax.jit(run)
  for temperature in (0.0, 1e-38):
    np.testing.assert_array_equal(traced(temperature), wanted)


@pytest.mark.first_case
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"noise_removal": "greedy", "temperature": 0.0},
    {"sampler": "psi"},
    {"sampler": "analytic", "noise_removal": "greedy"},
    {"sampler": "first_hitting"},
    {"precision": "legacy"},
    {"proc": process.Uniform(vocab_size=4)},
    {"proc": process.Uniform(vocab_size=4), "noise_removal": "greedy"},
  ],
  ids=str,
)
def test_logits_that_are_no_numbers_leave_no_token(options):
  """Token 0 would hide them."""
  wrong = sample.from_logits(lambda x_BL, _: jnp.full((*x_BL.shape, 4), jnp.nan))
  given = {"proc": process.Absorbing(vocab_size=4, mask_id=3), "steps": 4, **options}
  run = lambda rng: sample.generate(wrong, rng=rng, batch=2, length=8, **given)  # noqa: E731
  assert (jax.jit(run)(KEY) == -1).any(axis=1).all()


@pytest.mark.parametrize("sampler", ["ancestral", "psi", "analytic", "first_hitting", "uniform"])
@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    ({"head": 5}, r"denoiser: (head|logits) has shape \[2, \d, 5\]; .* V = 4, the process"),
    (
      {"trunk": (8, 3)},
      r"denoiser: (trunk|logits) has shape \[2, 8, 8, 3\]; with 2 seq",
    ),
    ({"trunk": ()}, r"denoiser: (trunk|logits) has shape \[2, 8\]; .* it must be \[2, 8, "),
  ],
)
def test_networks_of_other_shapes(sampler, wrong, said):
  class Network:
    def trunk(self, x_BL, _):
      return jnp.zeros((*x_BL.shape, *wrong.get("trunk", (3,))))

    def head(self, hidden, _):
      return jnp.zeros((*hidden.shape[:-1], wrong["head"])) if "head" in wrong else hidden

    def __call__(self, *given):
      return self.head(self.trunk(*given), given[1])

  proc = process.Absorbing(vocab_size=4, mask_id=3)
  given = {"proc": proc, "sampler": sampler}
  if sampler == "uniform":
    given = {"proc": process.Uniform(vocab_size=4)}
  with pytest.raises(InputError, match=said) as caught:
    jax.eval_shape(lambda rng: sample.generate(Network(), rng=rng, batch=2, length=8, **given), KEY)
  assert "\n" not in str(caught.value)


def test_top_k_keeps_the_most_probable():
  proc = process.Absorbing(vocab_size=toy.VOCABULARY, mask_id=toy.MASK)
  best = _generate(batch=16, steps=L, sampler="first_hitting", top_k=1)
  _, trace_KBL = _generate(batch=16, steps=L, sampler="first_hitting", top_k=1, return_trace=True)
  before = np.concatenate([np.full((1, 16, L), toy.MASK), trace_KBL[:-1]])
  for state, after in zip(before, np.asarray(trace_KBL), strict=True):
    logits = _toy(L)(jnp.asarray(state, jnp.int32), jnp.zeros(16))
    greedy = np.argmax(np.asarray(proc.clean_logits(logits)), -1)
    np.testing.assert_array_equal(after, np.where(after == state, state, greedy))
  np.testing.assert_array_equal(best, trace_KBL[-1])


@pytest.mark.parametrize("options", [{}, {"proc": process.Uniform(vocab_size=4)}], ids=str)
def test_inside_shard_map(options):
  """Every device draws its own sequences, from its own key, under the default checks."""
  mesh, spec = Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec("devices")
  keys = jax.random.split(KEY, 8)
  one = lambda rng: _generate(rng[0], batch=2, steps=3, **options)  # noqa: E731
  tokens = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))(keys)
  wanted = [_generate(rng, batch=2, steps=3, **options) for rng in keys]
  np.testing.assert_array_equal(tokens, np.concatenate(wanted))


@pytest.mark.first_case
@pytest.mark.parametrize("name", ["ancestral", "first_hitting", "psi", "analytic", "uniform"])
def test_any_function_of_logits_is_a_denoiser(name):
  """The same tokens as from the network that it calls; as an argument, a closure or a pytree."""
  table = _toy(L)
  proc = process.Uniform(vocab_size=toy.VOCABULARY) if name == "uniform" else PROC
  options = {"proc": proc, "steps": 3, "sampler": "ancestral" if name == "uniform" else name}
  wanted = _generate(**options)
  closure = sample.from_logits(lambda tokens_BL, sigma_B: table(tokens_BL, sigma_B))
  partial = sample.from_logits(
    jax.tree_util.Partial(lambda table, *arguments: table(*arguments), table)
  )
  assert not jax.tree.leaves(closure) and len(jax.tree.leaves(partial)) == 2
  for denoiser in (closure, partial):
    np.testing.assert_array_equal(_generate(denoiser=denoiser, **options), wanted)


def test_a_sampler_of_ones_own():
  """A function of the request; its options are whatever it takes."""

  def draw_prior(request, *, shift):
    state_BL = jnp.where(request.frozen_BL, request.x_BL, shift)
    return jnp.stack([request.x_BL] * (request.steps - 1) + [state_BL])

  tokens = _generate(prompt=jnp.array([2]), steps=3, sampler=draw_prior, shift=1)
  np.testing.assert_array_equal(tokens, [[2, 1, 1]] * 8)


@pytest.mark.parametrize(
  "options",
  [
    {"sampler": "first_hitting"},
    *(pytest.param({"sampler": name}, marks=pytest.mark.slow) for name in ("psi", "analytic")),
    {"proc": process.Uniform(vocab_size=4)},
  ],
  ids=str,
)
def test_numbers_of_64_bits(options):
  """With JAX_ENABLE_X64 integers and random numbers widen; tokens are whole and int32."""
  with jax.enable_x64(True):
    tokens = _generate(steps=3, **options, return_trace=False)
  assert tokens.dtype == jnp.int32 and tokens.shape == (8, L)
  assert np.all((tokens >= 0) & (tokens < toy.VOCABULARY))


# --- a real network ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
  """Return a two-layer float32 DiT with random weights, wrapped as a denoiser."""
  model = models.DiT(models.DiTConfig(vocab_size=11, dim=16, heads=2, layers=2))
  variables = model.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32), jnp.zeros((1,)))
  leaves, tree = jax.tree.flatten(variables["params"])
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return models.Denoiser(model, jax.tree.unflatten(tree, leaves))


@pytest.mark.parametrize(
  "sampler", ["ancestral", pytest.param("first_hitting", marks=pytest.mark.slow)]
)
def test_real_network(small, sampler):
  proc = process.Absorbing(vocab_size=11, mask_id=4)
  generate = jax.jit(
    functools.partial(sample.generate, length=6, steps=4, sampler=sampler),
    static_argnums=1,
    static_argnames="batch",
  )
  prompt = jnp.array([3, 4, 4, 4, 4, 5])
  eight = np.asarray(generate(small, proc, KEY, batch=8, prompt=prompt))
  assert np.all(eight[:, 0] == 3) and np.all(eight[:, 5] == 5) and np.all(eight != 4)
  for batch in (1, 3):
    np.testing.assert_array_equal(
      generate(small, proc, KEY, batch=batch, prompt=prompt), eight[:batch]
    )


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "options,word",
  [
    ({"steps": 0}, "steps"),
    ({"temprature": 0.5}, "did you mean 'temperature'"),
    ({"top_k": -1}, "top_k"),
    ({"steps": -3}, "steps"),
    ({"batch": 0}, "batch"),
    ({"length": 0}, "length"),
    ({"sampler": "ancestrel"}, "ancestral"),
    ({"precision": "double"}, "legacy"),
    ({"noise_removal": "ancestrl"}, "greedy"),
    ({"temperature": -1.0}, "temperature"),
    ({"nucleus": 0.0}, "nucleus"),
    ({"nucleus": 1.5}, "nucleus"),
    ({"grid": "cosin"}, "cosine"),
    ({"prompt": jnp.zeros((L + 1,), jnp.int32)}, "prompt"),
    ({"prompt": jnp.zeros((5, L), jnp.int32)}, "prompt"),
    ({"prompt": jnp.zeros((8, L), jnp.int32), "frozen": jnp.ones((8, 2), bool)}, "frozen"),
    ({"frozen": jnp.ones((L,), bool)}, "prompt"),
  ],
  ids=lambda value: str(next(iter(value.items())))[:30] if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_that_names_the_way_out(options, word):
  with pytest.raises(InputError, match=word) as error:
    sample.generate(_toy(L), PROC, KEY, **{"batch": 8, "length": L, **options})
  assert isinstance(error.value, ValueError)
  assert "\n" not in str(error.value)


def test_an_unknown_option_is_not_swallowed():
  with pytest.raises((InputError, TypeError), match="temprature"):
    sample.generate(_toy(L), PROC, KEY, batch=8, length=L, temprature=0.5)
