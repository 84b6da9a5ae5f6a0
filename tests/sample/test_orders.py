# SPDX-License-Identifier: Apache-2.0
"""Reveal orders: the law of the reveal step by counting, the law of samples by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dlm_jax import process, sample, schedules
from dlm_jax.errors import InputError
from dlm_jax.sample import _adaptive, grids, orders

FOLLOWS, DIFFERS = 1e-4, 1e-6
SAMPLES, L = 8_192, 4
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
PROC = process.Absorbing(vocab_size=toy.VOCABULARY, mask_id=toy.MASK)


def _draw(denoiser, order, *, batch=SAMPLES, length=L, seed=0, grid="uniform", **options):
  sizes = {"batch": batch, "length": length, "grid": grid}
  generate = functools.partial(sample.generate, order=order, **sizes, **options)
  return np.asarray(jax.jit(generate, static_argnums=1)(denoiser, PROC, jax.random.key(seed)))


def _generate(steps, order, *, length=L, **options):
  return _draw(toy.make(length), order, steps=steps, length=length, **options)


def _steps(length, steps, free=None, fine=60, grid="uniform"):
  """Return the reveal steps of every equally probable turn, side and rounding, [N, L]."""
  free_L = np.ones(length, bool) if free is None else np.asarray(free)
  middle = lambda n: (np.arange(n) + 0.5) / n  # noqa: E731
  draws = itertools.product(middle(max(free_L.sum(), 1)), (0.25, 0.75), middle(fine))
  draws_N3 = jnp.asarray(list(draws), jnp.float32)
  free_NL = jnp.broadcast_to(free_L, (len(draws_N3), length))
  rank_NL, count_N = orders.spaced(free_NL, draws_N3[:, :2])
  survives_K = grids.make(grid, steps, 0.0, length=length)[1:]
  step_NL = orders.steps_of(rank_NL, orders.left(count_N, survives_K, draws_N3[:, 2]))
  return np.where(free_NL, np.asarray(step_NL), -1)


def _law(step_NL, length=L, start=None, probs=None):
  """Return the law over states of groups revealed one after the other, a mean over their draws.

  Predictions are those of `toy.make`, or `probs`, of every step.
  """
  total, parts = 0, np.unique(step_NL, axis=0, return_counts=True)
  tokens, identity = toy.states(length), np.eye(toy.VOCABULARY)
  if probs is None:
    always = toy._predictions(toy.make(length), PROC, length, 0.0, 1.0, 1.0)
    probs = [always] * (step_NL.max() + 1)
  for step_L, count in zip(*parts, strict=True):
    law = toy.initial_law(PROC, length, start)
    for step in range(step_L.max() + 1):
      rows = np.where((step_L == step)[None, :, None], probs[step], identity[tokens])
      law = toy._apply(law, rows)
    total = total + law * count / len(step_NL)
  return total


@pytest.mark.first_case
@pytest.mark.parametrize(
  "length,steps", [(1, 1), (4, 3), (7, 7), (8, 3), (33, 5), (64, 16), (5, 10)]
)
def test_every_position_has_the_same_law_of_its_step(length, steps):
  step_NL = _steps(length, steps)
  counts_LK = (step_NL[..., None] == np.arange(steps)).sum(0)
  assert step_NL.min() >= 0 and step_NL.max() < steps
  assert (counts_LK == counts_LK[0]).all()
  np.testing.assert_allclose(counts_LK[0] / len(step_NL), 1 / steps, atol=1e-6)


def test_free_positions_alone_are_shared_out():
  free = np.array([0, 1, 1, 0, 1, 0, 1, 1, 1, 0], bool)
  step_NL = _steps(10, 3, free)[:, free]
  assert ((step_NL[..., None] == np.arange(3)).sum(1) == 2).all()
  counts_LK = (step_NL[..., None] == np.arange(3)).sum(0)
  assert (counts_LK == counts_LK[0]).all()


@pytest.mark.first_case
@pytest.mark.parametrize("length", [1, 2, 5, 16, 100, 257])
def test_as_many_steps_as_positions_reveal_one_each(length):
  step_NL = _steps(length, length, fine=3)
  assert (np.sort(step_NL, axis=1) == np.arange(length)).all()


@pytest.mark.first_case
@pytest.mark.parametrize("length,steps", [(256, 4), (256, 6), (100, 8), (256, 16), (96, 12)])
def test_no_group_has_neighbours(length, steps):
  """Distances inside a group are at least half of the mean one, L/K over positions."""
  for step_L in _steps(length, steps)[::7]:
    for step in range(steps):
      assert np.diff(np.flatnonzero(step_L == step)).min() >= (2 if steps < 6 else 3)


@pytest.mark.parametrize("steps", [2, *map(slow, (1, 3, 4))])
def test_law_of_samples(steps):
  tokens_BL = _generate(steps, "spaced", seed=steps)
  assert toy.p_value(tokens_BL, _law(_steps(L, steps))) > FOLLOWS
  if steps > 1:
    wrong = _law(np.random.default_rng(0).permuted(_steps(L, steps), axis=1))
    assert toy.p_value(tokens_BL, wrong) < DIFFERS


def _predicted(denoiser, times, **sharpened):
  """Return what is predicted in steps that start at these times."""
  sharpened = {"temperature": 1.0, "nucleus": 1.0, **sharpened}
  told = [float(PROC.schedule.sigma(t)) for t in times]
  return [toy._predictions(denoiser, PROC, L, sigma, **sharpened) for sigma in told]


@pytest.mark.first_case
@pytest.mark.parametrize("sharpened", [{}, {"temperature": 0.5}, {"nucleus": 0.7}])
def test_law_of_the_defaults(sharpened):
  """Spaced, on the rising grid, by a denoiser that is told when each step starts."""
  steps, denoiser = 2, toy.make(L, seed=3, scale=1.0, tilt=0.5)
  generate = functools.partial(sample.generate, batch=SAMPLES, length=L, steps=steps, **sharpened)
  tokens_BL = jax.jit(generate, static_argnums=1)(denoiser, PROC, jax.random.key(2))
  probs = _predicted(denoiser, grids.rising(steps, length=L)[:-1], **sharpened)
  law = _law(_steps(L, steps, grid="rising"), probs=probs)
  assert toy.p_value(tokens_BL, law) > FOLLOWS
  for wrong in ({"probs": _predicted(denoiser, [1e-3, 1e-3], **sharpened)}, {}):
    assert toy.p_value(tokens_BL, _law(_steps(L, steps, grid="rising"), **wrong)) < DIFFERS


def test_law_given_frozen_tokens():
  start = [toy.MASK, 1, toy.MASK, toy.MASK]
  law = _law(_steps(L, 2, np.array(start) == toy.MASK), start=start)
  tokens_BL = _generate(2, "spaced", prompt=jnp.asarray(start))
  assert (tokens_BL[:, 1] == 1).all() and toy.p_value(tokens_BL, law) > FOLLOWS


def test_law_of_ones_own_order():
  mine_L = np.array([2, 0, 0, 1])
  law = _law(mine_L[None])
  tokens_BL = _generate(3, (2, 0, 0, 1))
  assert toy.p_value(tokens_BL, law) > FOLLOWS
  assert toy.p_value(tokens_BL, _law(np.array([[2, 0, 1, 1]]))) < DIFFERS
  mine_BL = jnp.broadcast_to(jnp.asarray(mine_L), (SAMPLES, L))
  np.testing.assert_array_equal(_generate(3, mine_BL), tokens_BL)

  def shuffled(rng, length, steps):
    return jax.random.permutation(rng, jnp.asarray(mine_L))[:length] % steps

  every = np.array(list(itertools.permutations(mine_L)))
  assert toy.p_value(_generate(3, shuffled), _law(every)) > FOLLOWS


def _adaptive_law(name, steps, *, bound=0.1):
  """Return the law of an order that reads the predictions, a mean over turns of the spaced one."""
  denoiser, tokens, total = toy.make(L), toy.states(L), 0
  probs = toy._predictions(denoiser, PROC, L, 0.0, 1.0, 1.0)
  logits_BLV = PROC.clean_logits(denoiser(jnp.asarray(tokens), jnp.zeros(len(tokens))))
  score_BL, masked_BL = _adaptive.score(name, logits_BLV), jnp.asarray(tokens == toy.MASK)
  draws = jnp.asarray([((i + 0.5) / L, side) for i in range(L) for side in (0.25, 0.75)])
  ranks, _ = orders.spaced(jnp.ones((len(draws), L), bool), draws)
  for rank_L in ranks if name == "spaced_confidence" else ranks[:1]:
    law, rank_BL = toy.initial_law(PROC, L), jnp.broadcast_to(rank_L, tokens.shape)
    for step in range(steps):
      left_B = jnp.full(len(tokens), L - L * (step + 1) // steps)
      due_BL = _adaptive.due(name, score_BL, masked_BL, left_B, rank_BL, bound)
      due_BL = np.asarray(masked_BL if step == steps - 1 else due_BL)
      law = toy._apply(law, np.where(due_BL[..., None], probs, np.eye(toy.VOCABULARY)[tokens]))
    total = total + law
  return total / total.sum()


@pytest.mark.parametrize("name", ["confidence", *map(slow, orders.ADAPTIVE[1:])])
def test_law_of_adaptive_orders(name):
  options = {"bound": 1.0} if name == "entropy" else {}
  law = _adaptive_law(name, 2, **options)
  assert toy.p_value(_generate(2, name, **options), law) > FOLLOWS
  assert toy.p_value(_generate(2, name, **options), _law(_steps(L, 2))) < DIFFERS


def _subsets(eligible_L, chance):
  """Return {subset: probability} of spaced positions, each with this chance."""
  count = int(eligible_L.sum())
  if not count:
    return {(False,) * len(eligible_L): 1.0}
  draws = jnp.asarray([((i + 0.5) / count, side) for i in range(count) for side in (0.25, 0.75)])
  eligible_NL = jnp.broadcast_to(jnp.asarray(eligible_L), (len(draws), len(eligible_L)))
  rank_NL = np.asarray(orders.spaced(eligible_NL, draws)[0])
  found, whole = {}, int(np.floor(count * chance + 1e-9))
  for rank_L in rank_NL:
    for taken, share in ((whole, whole + 1 - count * chance), (whole + 1, count * chance - whole)):
      chosen = tuple((eligible_L & (rank_L < taken)).tolist())
      found[chosen] = found.get(chosen, 0.0) + share / len(rank_NL)
  return found


def _stepwise_law(steps, kappa, length=3):
  """Return the law of a sampler that decides anew in each step which positions are due."""
  tokens, identity = toy.states(length), np.eye(toy.VOCABULARY)
  probs = toy._predictions(toy.make(length), PROC, length, 0.0, 1.0, 1.0)
  law, grid = toy.initial_law(PROC, length), np.linspace(1.0, toy.END, steps + 1)
  for t, s in itertools.pairwise(grid):
    alpha_t, alpha_s = (float(PROC.schedule.alpha(x)) for x in (t, s))
    sigma = (1 - kappa) * (1 - alpha_s)
    moved = np.zeros_like(law)
    for state in np.flatnonzero(law):
      masked = tokens[state] == toy.MASK
      due = _subsets(masked, (alpha_s - alpha_t + sigma * alpha_t) / (1 - alpha_t))
      back = _subsets(~masked, sigma)
      for (there, p), (again, q) in itertools.product(due.items(), back.items()):
        rows = np.where(np.array(there)[:, None], probs[state], identity[tokens[state]])
        rows = np.where(np.array(again)[:, None], identity[toy.MASK], rows)
        out = functools.reduce(lambda a, b: np.outer(a, b).ravel(), rows, np.ones(1))
        moved += law[state] * p * q * out
    law = moved
  rows = np.where((tokens == toy.MASK)[..., None], probs, identity[tokens])
  return toy._apply(law, rows)


@pytest.mark.parametrize("kappa", [0.5, *map(slow, (0.0, 1.0))])
def test_law_of_spaced_psi(kappa):
  """Every number of steps; and it is not the law of independent positions."""
  draw = functools.partial(_generate, 2, length=3, sampler="psi", kappa=kappa)
  assert toy.p_value(draw("spaced"), _stepwise_law(2, kappa)) > FOLLOWS
  assert toy.p_value(draw("random"), _stepwise_law(2, kappa)) < DIFFERS


@pytest.mark.slow
def test_law_of_spaced_rgas():
  """Without a tilt and with one candidate the critic has no say."""

  class Silent:
    embedded = body = staticmethod(lambda *_: None)

  options = {"critic": Silent(), "h": (0.0, 0.0), "candidates": 1}
  generate = functools.partial(_generate, 2, length=3, sampler="rgas", **options)
  assert toy.p_value(generate("spaced"), _stepwise_law(2, 1.0)) > FOLLOWS
  assert toy.p_value(generate("random"), _stepwise_law(2, 1.0)) < DIFFERS


def test_scores():
  logits_BKV = jnp.log(jnp.array([[[0.5, 0.3, 0.2]]]))
  for name, value in (("confidence", 0.5), ("margin", 0.2), ("entropy", -1.02965)):
    np.testing.assert_allclose(_adaptive.score(name, logits_BKV), [[value]], rtol=1e-4)


def test_entropy_reveals_what_its_bound_allows():
  """Sorted 0.1, 0.2, 0.4, 0.5: sums less the largest are 0, 0.1, 0.3, 0.7; at least one is due."""
  score_BL = -jnp.array([[0.4, 0.1, 9.0, 0.2, 0.5]])
  masked_BL = jnp.array([[True, True, False, True, True]])
  for bound, count in ((0.0, 1), (0.1, 2), (0.29, 2), (0.31, 3), (0.7001, 4)):
    nothing = jnp.zeros((1, 5), jnp.int32)
    due_BL = _adaptive.due("entropy", score_BL, masked_BL, jnp.array([0]), nothing, bound)
    assert due_BL.sum() == count and due_BL[0, 1] and not due_BL[0, 2]


@pytest.mark.slow
def test_law_of_first_hitting():
  """One position at a time, from one end of the ranks to the other."""
  law = _law(_steps(L, L))
  tokens_BL = _generate(1, "spaced", sampler="first_hitting")
  assert toy.p_value(tokens_BL, law) > FOLLOWS
  assert toy.p_value(tokens_BL, _law(_steps(L, 2))) < DIFFERS


@pytest.mark.slow
def test_a_consistent_denoiser_gives_its_joint_law_in_any_order():
  """Conditionals of one joint law: as many steps as positions lose nothing; one step does."""
  joint = np.random.default_rng(3).dirichlet(np.full(3**L, 0.3)).reshape((3,) * L)
  probs = np.zeros((toy.VOCABULARY**L, L, toy.VOCABULARY))
  for row, state in enumerate(toy.states(L)):
    given = joint[tuple(slice(None) if x == toy.MASK else slice(x, x + 1) for x in state)]
    for position in range(L):
      rest = tuple(i for i in range(L) if i != position)
      one = given.sum(rest)
      if state[position] == toy.MASK and given.sum() > 0:
        probs[row, position, :3] = one / given.sum()
      else:
        probs[row, position, state[position] % 3] = 1.0
  table = np.log(np.maximum(probs, 1e-30)).reshape(-1, toy.VOCABULARY)
  made = toy.make(L)
  denoiser = made.replace(
    params={"table": jnp.asarray(table, jnp.float32), "tilt": made.params["tilt"] * 0}
  )
  law = np.zeros(toy.VOCABULARY**L)
  law[toy.codes(np.array(list(np.ndindex(joint.shape))))] = joint.ravel()
  draw = functools.partial(_draw, denoiser, seed=5)
  assert toy.p_value(draw("spaced", steps=L), law) > FOLLOWS
  assert toy.p_value(draw("random", steps=1, sampler="first_hitting"), law) > FOLLOWS
  assert toy.p_value(draw("spaced", steps=1), law) < DIFFERS


def test_the_default_grid_reveals_more_and_more():
  """And one a step where there are as many steps as tokens."""
  for steps, length in ((2, 256), (4, 256), (16, 256), (7, 100)):
    revealed_K = -np.diff(np.asarray(grids.rising(steps, length=length)))
    assert (np.diff(revealed_K) > 0).all()
    np.testing.assert_allclose(revealed_K.sum(), 1, atol=2e-5)
  np.testing.assert_allclose(grids.rising(64, length=64), grids.uniform(64), atol=1e-6)
  np.testing.assert_allclose(grids.rising(1, length=64), grids.uniform(1), atol=1e-6)


@pytest.mark.parametrize(
  "sampler, order",
  [("ancestral", "spaced"), *((name, "random") for name in ("first_hitting", "psi", "rgas"))],
)
def test_the_default_order(sampler, order):
  """Token for token. The float32 race has no order; see `test_orders_without_a_meaning`."""

  class Silent:
    embedded = body = staticmethod(lambda *_: None)

  critic = {"critic": Silent(), "h": (0.0, 0.0), "candidates": 1} if sampler == "rgas" else {}
  sizes = {"batch": 64, "length": 3, "steps": 2, "sampler": sampler, **critic}

  def draw(**options):
    generate = functools.partial(sample.generate, **sizes, **options)
    return np.asarray(jax.jit(generate, static_argnums=1)(toy.make(3), PROC, jax.random.key(0)))

  other = {"spaced": "random", "random": "spaced"}[order]
  np.testing.assert_array_equal(draw(), draw(order=order))
  assert np.any(draw() != draw(order=other))


@pytest.mark.slow
def test_the_default_grid_is_that_of_the_order():
  draw = functools.partial(_generate, 3, batch=64)
  np.testing.assert_array_equal(draw("spaced", grid=None), draw("spaced", grid="rising"))
  np.testing.assert_array_equal(draw("random", grid=None), draw("random", grid="uniform"))


@pytest.mark.parametrize("steps", [2, 4])
def test_every_step_reveals_its_share(steps):
  sizes = {"batch": 64, "length": L, "steps": steps, "grid": "uniform"}
  options = {"order": "spaced", "return_trace": True, "noise_removal": "none"}
  generate = functools.partial(sample.generate, **sizes, **options)
  _, trace_KBL = jax.jit(generate, static_argnums=1)(toy.make(L), PROC, jax.random.key(0))
  masks_KB = np.asarray(trace_KBL == toy.MASK).sum(-1)
  assert (masks_KB == (L - L // steps * (1 + np.arange(steps)))[:, None]).all()


@pytest.mark.parametrize(
  "options, message",
  [
    ({"sampler": "first_hitting", "order": "confidence"}, "order is one of random, spaced"),
    ({"sampler": "psi", "order": "margin"}, "order='margin' is unknown"),
    ({"sampler": "analytic", "order": "spaced"}, "has no option 'order'"),
    ({"precision": "legacy", "order": "spaced"}, "has no option 'order'"),
    ({"order": "confidence", "selection_temperature": -1.0}, "must be at least 0"),
  ],
)
def test_orders_without_a_meaning(options, message):
  with pytest.raises(InputError, match=message):
    sample.check_options(options.pop("sampler", "ancestral"), PROC, options)
  with pytest.raises(InputError, match="order"):
    sample.check_options("psi", process.Uniform(vocab_size=4), {"order": "spaced"})


@pytest.mark.parametrize(
  "order, message",
  [
    ("spiced", "order='spiced' is unknown"),
    (3, "order=3 is unknown; use one of random, spaced, "),
    (jnp.zeros(4), "order=Array([0."),
    (jnp.array([0, 1]), "it must give integers [4]"),
    (jnp.array([0, 1, 2, 3]), "order reveals at step 2; steps=2 have 0 to 1"),
    ((0, 1, -1, 1), "order reveals at step -1; steps=2"),
    (lambda rng, length, steps: jnp.zeros(3), "it must give integers [4]"),
  ],
)
def test_refused(order, message):
  with pytest.raises(InputError) as caught:
    sample.generate(toy.make(L), PROC, jax.random.key(0), batch=2, length=L, steps=2, order=order)
  assert message in str(caught.value)


@pytest.mark.parametrize(
  "schedule", [schedules.LogLinear(), schedules.Cosine(), schedules.Polynomial()]
)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_rising_grid_is_of_shares_on_any_schedule(schedule, steps):
  proc, length = process.Absorbing(vocab_size=5, mask_id=4, schedule=schedule), 64
  t_K = orders.times(proc, "spaced", steps, length)
  power = 1 + 0.6 * (1 - 1 / steps) * (1 - steps / length)
  revealed = 1 - np.asarray(orders.survives(proc, t_K))
  np.testing.assert_allclose(revealed, (np.arange(1, steps + 1) / steps) ** power, atol=2e-4)
  assert np.all(np.diff(t_K) < 0) and t_K[0] <= 1


def test_other_grids_are_of_times():
  proc = process.Absorbing(vocab_size=5, mask_id=4, schedule=schedules.Cosine())
  for named, order in ((None, "random"), ("uniform", "spaced")):
    np.testing.assert_array_equal(orders.times(proc, order, 4, 64, named), grids.uniform(4))
