# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation under a reveal order: laws of states and gradients by enumeration.

Three binary tokens. Every order, step, group, draw and hidden set is listed from the definition;
the losses draw them.
"""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from scipy import special, stats

from dlm_jax import process, sample, schedules
from dlm_jax.models import DiT
from dlm_jax.objectives import draw_batch, idlm
from dlm_jax.objectives.batch import split_each
from dlm_jax.objectives.idlm.absorbing import HardSample, HardStates
from dlm_jax.sample import grids
from dlm_jax.sample._ancestral import Ancestral

L, TOKENS, MASK, EPS = 3, 2, 2, 1e-3
V = TOKENS + 1
PROC = process.Absorbing(vocab_size=V, mask_id=MASK)
STATES = np.array(list(itertools.product(range(V), repeat=L)))
SEQUENCES = np.array(list(itertools.product(range(TOKENS), repeat=L)))
DATA = np.array([0.40, 0.05, 0.10, 0.05, 0.02, 0.08, 0.05, 0.25])  # of SEQUENCES
FOLLOWS, DIFFERS = 1e-4, 1e-6
CASES = [("random", (2,)), ("spaced", (2,)), ("spaced", (3, 2)), ("random", (1, 3))]
some_cases = pytest.mark.parametrize(
  "order,steps",
  [*CASES[1:3], *(pytest.param(*case, marks=pytest.mark.slow) for case in (CASES[0], CASES[3]))],
)


class Hard(DiT):
  """Logits looked up by the whole state."""

  def setup(self):
    shape = (V**L, L, V)
    self.logits = self.param("logits", jax.nn.initializers.zeros, shape)

  def trunk(self, tokens, sigma_B, rng_B=None):
    return self.logits[tokens @ V ** jnp.arange(L)[::-1]]

  def head(self, hidden_BKD, sigma_B):
    return hidden_BKD


MODEL = Hard(tiny.config(vocab_size=V, dim=4, layers=1, heads=1, length=L))


def code(tokens):
  return int(np.dot(tokens, V ** np.arange(L)[::-1]))


def table(seed=0):
  return np.random.default_rng(seed).normal(size=(V**L, L, V))


def softmax(logits):
  """Return probabilities of tokens; none of the mask."""
  p = np.exp(logits)
  p[..., MASK] = 0
  return p / p.sum(-1, keepdims=True)


def teacher_table():
  """Return log p(x_l | visible) of the data law, by summing out every masked position."""
  agree = np.all((STATES[:, None] == MASK) | (STATES[:, None] == SEQUENCES[None]), axis=-1)
  rows = np.einsum("sx,xlv->slv", agree * DATA, np.eye(V)[SEQUENCES])
  with np.errstate(divide="ignore"):
    return np.maximum(np.log(rows / (agree * DATA).sum(1)[:, None, None]), -30)


# --- the definition, listed ----------------------------------------------------------------------


def partitions(order, steps):
  """Yield (probability, K, masked [L], group [L]) over Ks, steps and orders."""
  for count in steps:
    power = 1 + 0.6 * (1 - 1 / count) * (1 - count / L) if order == "spaced" else 1
    edge = [1 - (k / count) ** power for k in range(count + 1)]  # share of masks before step k
    for k in range(count):
      chance = 1 / len(steps) / count
      if order == "random":
        shares = (1 - edge[k], edge[k] - edge[k + 1], edge[k + 1])
        for kinds in itertools.product(range(3), repeat=L):
          p = math.prod(shares[kind] for kind in kinds)
          yield chance * p, count, np.array(kinds) > 0, np.array(kinds) == 1
        continue
      base = np.array([0, 2, 1])  # ranks of 0, 0.618 and 0.236
      for rank, turn in itertools.product((base, 2 - base), range(L)):
        rank_L, cuts = (rank + turn) % L, {0.0, 1.0}
        cuts |= {1 - (L * share) % 1 for share in edge[k : k + 2]}
        for low, high in itertools.pairwise(sorted(cuts)):
          u = (low + high) / 2
          before, after = (math.floor(L * share + u) for share in edge[k : k + 2])
          masked = rank_L < before
          yield chance * (high - low) / 6, count, masked, masked & (rank_L >= after)


def given(masked):
  """Yield (probability, x_gen) over data."""
  for x0, p in zip(SEQUENCES, DATA, strict=True):
    yield p, np.where(masked, MASK, x0)


def hidden_again(group, x_gen, p_SLV):
  """Yield (probability of the draws, z, hidden [L]) over what of the group is hidden, and draws."""
  members = np.flatnonzero(group)
  for size in range(len(members) + 1):
    for shown in itertools.combinations(members, size):
      for tokens in itertools.product(range(TOKENS), repeat=size):
        z = x_gen.copy()
        z[list(shown)] = tokens
        p = math.prod(p_SLV[code(x_gen), l, v] for l, v in zip(shown, tokens, strict=True))
        yield p, z, group & (z == MASK)


@functools.cache
def terms(order, steps, seed=0):
  """Return weights and places of the loss: W, codes of x_gen and z, position; over all there is."""
  found, p_SLV = collections.Counter(), softmax(table(seed))
  for p_order, count, masked, group in partitions(order, steps):
    for p_data, x_gen in given(masked):
      for p_drawn, z, hidden in hidden_again(group, x_gen, p_SLV):
        n, s = group.sum(), hidden.sum()
        if s == 0:
          continue
        # the mean over t ~ U(ε, 1) of t^s (1 − t)^(n − s) / t
        over_t = special.beta(s, n - s + 1) * (1 - special.betainc(s, n - s + 1, EPS)) / (1 - EPS)
        for l in np.flatnonzero(hidden):
          found[code(x_gen), code(z), l] += p_order * p_data * p_drawn * count * over_t
  places = np.array(list(found))
  return np.array(list(found.values())), *places.T


def fake_mass(logits, order, steps):
  """Return Σ W p_l(v) by state z and position: normalised, the best fake."""
  weight, x_gen, z, l = terms(order, steps)
  p = jax.nn.softmax(jnp.where(jnp.arange(V) == MASK, -jnp.inf, logits), axis=-1)[x_gen, l]
  return jnp.zeros((V**L, L, V)).at[z, l].add(weight[:, None] * p)


def closed_form(logits, order, steps):
  """Return Σ over states z of KL(E[p_l | z] ‖ teacher(· | z)), the law of the states held."""
  mass = fake_mass(logits, order, steps)
  total = mass.sum(-1, keepdims=True)
  fake = jnp.log(jnp.where(mass > 0, mass, 1)) - jnp.log(jnp.where(total > 0, total, 1))
  return jnp.sum(mass * jnp.where(mass > 0, fake - teacher_table(), 0))


# --- what the losses draw ------------------------------------------------------------------------


def states(order, steps, proc=PROC):
  return idlm.GroupedStates(model=MODEL, process=proc, order=order, steps=steps)


def batch_of(rng, size):
  rng_data, rng = jax.random.split(rng)
  drawn = jax.random.categorical(rng_data, jnp.log(jnp.asarray(DATA)), shape=(size,))
  return draw_batch({"tokens": jnp.asarray(SEQUENCES, jnp.int32)[drawn]}, rng)


def trees(order, steps):
  mass = np.asarray(fake_mass(jnp.asarray(table(), jnp.float32), order, steps))
  fake = np.log(np.maximum(mass, 1e-30))
  return [{"logits": jnp.asarray(x, jnp.float32)} for x in (table(), teacher_table(), fake)]


@functools.cache
def measured(order, steps, size=4096, count=48):
  """Return means and standard errors of (loss, gradient): of the student, then of the fake."""
  student, teacher, fake = trees(order, steps)
  made = states(order, steps)

  @jax.jit
  def run(rngs):
    def one(rng):
      batch = made.choose(idlm.couple_times(batch_of(rng, size), coupling="permuted"))
      of_student = functools.partial(idlm.student_loss, states=made, teacher=teacher, fake=fake)
      of_fake = functools.partial(idlm.fake_loss, states=made, student=student)
      grad = lambda loss, tree: jax.value_and_grad(loss, has_aux=True)(tree, batch)  # noqa: E731
      (value, _), slope = grad(of_student, student)
      (fake_value, _), fake_slope = grad(of_fake, fake)
      return (value, slope["logits"]), (fake_value, fake_slope["logits"])

    return jax.lax.map(one, rngs)

  def mean(x):
    x = np.asarray(x, np.float64)
    return x.mean(0), x.std(0, ddof=1) / math.sqrt(count)

  return jax.tree.map(mean, run(jax.random.split(jax.random.key(3), count)))


@some_cases
def test_gradient_of_the_gap_is_that_of_the_closed_form(order, steps):
  (value, slope), (_, fake_slope) = measured(order, steps)
  logits = jnp.asarray(table(), jnp.float32)
  wanted, gradient = jax.value_and_grad(closed_form)(logits, order, steps)
  assert abs(value[0] - wanted) < 4 * value[1] and value[1] < 0.02 * wanted
  gradient = np.asarray(gradient, np.float64)
  error = slope[1] + 1e-6
  assert np.all(np.abs(slope[0] - gradient) < 5 * error)
  assert np.linalg.norm(slope[0] - gradient) < 0.06 * np.linalg.norm(gradient)
  assert np.all(np.abs(fake_slope[0]) < 5 * fake_slope[1] + 1e-5)  # the best fake is at rest
  other = jax.grad(closed_form)(logits, order, (1,))
  assert np.any(np.abs(slope[0] - np.asarray(other)) > 8 * error)


def test_one_step_is_the_divergence_of_the_sampler():
  """With K = 1 nothing is given: the gap is KL(p_θ ‖ data), by the chain rule."""
  p_LV = softmax(table())[code([MASK] * L)]
  law = np.array([math.prod(p_LV[np.arange(L), x]) for x in SEQUENCES])
  wanted = np.sum(law * np.log(law / DATA))
  logits = jnp.asarray(table(), jnp.float32)
  assert closed_form(logits, "spaced", (1,)) == pytest.approx(wanted, rel=2e-3)  # t begins at ε


@pytest.mark.parametrize("order", ["random", "spaced"])
def test_the_gap_is_at_most_the_local_error_of_the_sampler(order):
  """Σ over steps of KL(p(group | given) ‖ teacher(group | given)), from data; equal at step 0."""
  logits, steps = table(), (2,)
  p_SLV, local = softmax(logits), 0
  for p_order, count, masked, group in partitions(order, steps):
    members = np.flatnonzero(group)
    for p_data, x_gen in given(masked):
      visible = ~masked
      agree = np.all(np.where(visible, x_gen == SEQUENCES, True), axis=-1)
      for tokens in itertools.product(range(TOKENS), repeat=len(members)):
        p = math.prod(p_SLV[code(x_gen), l, v] for l, v in zip(members, tokens, strict=True))
        fits = agree & np.all(SEQUENCES[:, members] == tokens, axis=-1)
        teacher = DATA[fits].sum() / DATA[agree].sum()
        local += p_order * p_data * count * p * np.log(p / teacher)
  gap = float(closed_form(jnp.asarray(logits, jnp.float32), order, steps))
  assert 0.5 * local < gap < local


# --- the law of the states -----------------------------------------------------------------------


def law(order, steps, t, scale=1.0):
  """Return the law of (code of x_gen, group, code of z)."""
  found, p_SLV = collections.Counter(), softmax(table())
  for p_order, _, masked, group in partitions(order, steps):
    for p_data, x_gen in given(masked):
      for p_drawn, z, hidden in hidden_again(group, x_gen, p_SLV):
        n, s = group.sum(), hidden.sum()
        p = p_order * p_data * p_drawn * (scale * t) ** s * (1 - scale * t) ** (n - s)
        found[code(x_gen), tuple(group), code(z)] += p
  return found


def p_value(seen, wanted, size):
  keys = list(wanted)
  assert set(seen) <= {key for key in keys if wanted[key] > 0}  # nothing impossible
  expected, observed = (np.array([x[key] for key in keys], float) for x in (wanted, seen))
  expected *= size / expected.sum()
  rare = expected < 5
  pool = lambda x: np.append(x[~rare], x[rare].sum())  # noqa: E731
  expected, observed = pool(expected), pool(observed)
  keep = expected > 0
  return stats.chisquare(observed[keep], expected[keep]).pvalue


@some_cases
def test_law_of_the_states(order, steps):
  size, t, made = 40_000, 0.4, states(order, steps)
  params = {"logits": jnp.asarray(table(), jnp.float32)}

  @jax.jit
  def draw(rng):
    batch = made.choose(idlm.couple_times(batch_of(rng, size), coupling="permuted"))
    batch["t"] = jnp.full(size, t)
    *rngs, _ = split_each(batch["rng"], 4)
    return made.rollout(params, batch, tuple(rngs), None)

  drawn = draw(jax.random.key(1))
  x_gen, group, z = map(np.asarray, (drawn.x_gen, drawn.group, drawn.z))
  seen = collections.Counter(
    (code(x), tuple(g), code(y)) for x, g, y in zip(x_gen, group, z, strict=True)
  )
  assert p_value(seen, law(order, steps, t), size) > FOLLOWS
  assert p_value(seen, law(order, steps, t, scale=1.1), size) < DIFFERS


@pytest.mark.parametrize("valid", [False, True])
def test_whole_predictions_under_a_spaced_order(valid):
  """As many masks as the time says, rounded at random, each position as often as any other."""
  count, length = 20_000, tiny.L
  made = idlm.HardStates(model=tiny.network(dropout=0.0)[0], process=tiny.PROCESS, order="spaced")
  drawn = tiny.batch(size=count)
  free = np.ones(length, bool)
  if valid:
    free = np.array([True, False, True, True])
    drawn["valid"] = jnp.broadcast_to(jnp.asarray(free), (count, length))
  drawn |= {"t": jnp.full(count, 0.7), "t_gen": jnp.full(count, 0.4)}
  *rngs, _ = split_each(drawn["rng"], 4)
  sample = jax.jit(made.rollout)(tiny.network(dropout=0.0)[1], drawn, tuple(rngs), None)
  masks = [np.asarray(x) == tiny.MASK for x in (sample.x_gen, sample.z)]
  for mask, t in zip(masks, (0.4, 0.7), strict=True):
    share = t * (1 - EPS)
    assert not np.any(mask[:, ~free]) and set(mask.sum(1)) <= {
      math.floor(free.sum() * share),
      math.floor(free.sum() * share) + 1,
    }
    np.testing.assert_allclose(mask[:, free].mean(0), share, atol=5 * 0.5 / math.sqrt(count))
  together = (masks[0] & masks[1])[:, free].mean(0)  # two orders, independent of each other
  np.testing.assert_allclose(together, 0.28 * (1 - EPS) ** 2, atol=0.02)


def test_random_order_is_the_forward_process():
  """Bit by bit what was before orders were known: corrupted, kept where given."""
  model, params = tiny.network(dropout=0.0)
  drawn, valid = tiny.prompted_batch()
  batch = idlm.couple_times(drawn, coupling="same_order")
  *rngs, _ = split_each(batch["rng"], 4)
  made = idlm.HardStates(model=model, process=tiny.PROCESS)
  sample = made.rollout(params, batch, tuple(rngs), None)
  x_gen = jax.vmap(tiny.PROCESS.corrupt)(rngs[0], batch["tokens"], batch["t_gen"])
  np.testing.assert_array_equal(sample.x_gen, jnp.where(valid, x_gen, batch["tokens"]))
  hide = jax.vmap(lambda rng: jax.random.uniform(rng, (tiny.L,)))(rngs[2])
  hide = (hide < 1 - tiny.PROCESS.schedule.alpha(batch["t"])[:, None]) & valid
  np.testing.assert_array_equal(sample.z == tiny.MASK, hide)
  kept = np.asarray((sample.x_gen != tiny.MASK) & ~hide)
  np.testing.assert_array_equal(sample.z[kept], batch["tokens"][kept])


# --- steps, times, prompts -----------------------------------------------------------------------


def _optimizers():
  return {"student": optax.sgd(1.0), "fake": optax.sgd(0.1)}


@pytest.mark.parametrize("order", ["random", "spaced"])
def test_every_step_is_met_equally_often_at_the_time_of_the_samplers_grid(order):
  made, size = states(order, (2, 3)), 600
  batch = made.choose(idlm.couple_times(tiny.batch(size=size), coupling="permuted"))
  run, step, told = (np.asarray(batch[name]) for name in ("run", "step", "t_gen"))
  length = batch["tokens"].shape[1]
  for i, steps in enumerate((2, 3)):
    counts = np.bincount(step[run == i], minlength=steps)
    assert len(counts) == steps and np.all(np.abs(counts - size / 2 / steps) <= 1)
    request = sample.Request(
      denoiser=None,
      process=PROC,
      rng_B=jax.random.split(jax.random.key(0), 1),
      x_BL=jnp.zeros((1, length), jnp.int32),
      frozen_BL=jnp.zeros((1, length), bool),
      steps=steps,
    )
    grid = np.asarray(Ancestral(order=order).times(request))
    np.testing.assert_array_equal(told[run == i], grid[step[run == i]])
  assert abs(np.corrcoef(step, batch["t"])[0, 1]) < 0.15  # the loss time is another one


@pytest.mark.parametrize(
  "schedule", [schedules.LogLinear(), schedules.Cosine()], ids=["log", "cos"]
)
def test_networks_are_told_the_share_of_masks(schedule):
  proc = process.AbsorbingScore(vocab_size=V, mask_id=MASK, schedule=schedule)
  made, z = states("spaced", (2,), proc), jnp.asarray([[2, 2, 2], [0, 2, 1], [0, 1, 1], [2, 2, 1]])
  sample = HardSample(z, jnp.zeros((4, L, 1)), z)
  valid = jnp.asarray([[True] * 3] * 3 + [[True, False, True]])
  t_B = made.told(sample, {"tokens": z, "valid": valid, "t": jnp.full(4, 0.1)})
  share = (1 - schedule.alpha(t_B)) / (1 - schedule.alpha(1.0))
  np.testing.assert_allclose(share, [1, 1 / 3, 0, 1 / 2], atol=3e-5)
  assert float(t_B.min()) >= grids.END * 0.999


@pytest.mark.parametrize("order", ["random", "spaced"])
def test_prompts_are_no_group(order):
  model, params = tiny.network(dropout=0.0)
  made = idlm.GroupedStates(model=model, process=tiny.PROCESS, order=order, steps=(2, 4))
  drawn, valid = tiny.prompted_batch()
  batch = made.choose(idlm.couple_times(drawn, coupling="permuted"))
  *rngs, _ = split_each(batch["rng"], 4)
  sample = made.rollout(params, batch, tuple(rngs), None)
  for state in (sample.x_gen, sample.z):
    np.testing.assert_array_equal(state[~valid], batch["tokens"][~valid])
  assert not np.any(sample.group & ~valid) and np.any(sample.group)
  weights = np.asarray(made.weights(sample, batch))
  wanted = np.array([2, 4])[batch["run"]] * tiny.L / np.maximum(valid.sum(1), 1) / tiny.B
  np.testing.assert_allclose(weights, sample.group * wanted[:, None], rtol=1e-6)
  loss = idlm.student_loss(params, batch, states=made, teacher=params, fake=params)
  assert np.isfinite(loss[0]) and all(np.isfinite(x) for x in loss[1][0].values())


@pytest.mark.slow
def test_micro_batches_change_nothing():
  model, params = tiny.network(dropout=0.0)
  after = []
  for accumulate in (1, 4):
    options = {"order": "spaced", "steps": (2, 3), "accumulate": accumulate}
    made = idlm.make(model=model, process=tiny.PROCESS, optimizers=_optimizers(), **options)
    state, metrics = jax.jit(made.step)(made.init(jax.random.key(0), params), tiny.batch(3))
    assert all(np.isfinite(x) for x in metrics.values())
    after.append(state.trees)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *after)
  assert not tiny.equal(after[0]["student"], params)


@pytest.mark.parametrize(
  "options, said",
  [
    (
      {"order": "confidence"},
      r"objective.order='confidence' is unknown; use one of rand",
    ),
    ({"steps": (4, 0)}, r"objective.steps\[1\]=0 must be at least 1"),
    (
      {"interval": (0.5, 0.2)},
      r"objective.interval=\(0.5, 0.2\) must be two times in \(0, 1\], rising",
    ),
    ({"interval": (0.1,)}, r"objective.interval=\(0.1,\) must be two times"),
    ({"guidance": -0.5}, r"objective.guidance=-0.5 must be in \[0"),
    ({"fake_updates": 0}, r"objective.fake_updates=0 must be at least 1"),
    ({"steps": (8,)}, r"objective.steps=\(8,\): a sequence of 4 tokens .* at most as many steps"),
  ],
)
def test_refused(options, said):
  with pytest.raises(ValueError, match=said):
    idlm.make(model=tiny.network()[0], process=tiny.PROCESS, optimizers=_optimizers(), **options)


def test_loss_times_fill_their_interval_evenly():
  batch, size = tiny.batch(size=500), 500
  usual = idlm.couple_times(batch, coupling="permuted")
  moved = idlm.couple_times(batch, coupling="permuted", interval=(0.1, 0.3))
  np.testing.assert_array_equal(usual["t"], batch["t"])
  np.testing.assert_array_equal(usual["t_gen"], moved["t_gen"])
  edges = np.linspace(0.1, 0.3, 11)
  assert np.all(np.abs(np.histogram(moved["t"], edges)[0] - size / 10) <= 1)


@pytest.mark.parametrize("options", [{"order": "spaced"}, {"steps": (2,)}])
def test_a_uniform_process_has_no_masks(options):
  model, _ = tiny.network(time_conditioning=True)
  with pytest.raises(ValueError, match=r"'uniform' has no masks; leave it at"):
    idlm.make(model=model, process=tiny.UNIFORM, optimizers=_optimizers(), **options)


# --- guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(), (2,)])
def test_guidance_is_another_teacher(steps):
  """The law q(v | z)^(1 + w) / q(v | masks)^w, normalised: a table that can be written down."""
  student, teacher, fake = trees("spaced", (2,))
  log_q = jax.nn.log_softmax(teacher["logits"][..., :TOKENS])
  nothing = log_q[code(np.full(L, MASK))][None]
  other = jax.nn.log_softmax(1.5 * log_q - 0.5 * nothing)
  other = {"logits": teacher["logits"].at[..., :TOKENS].set(other)}
  plain = (
    states("spaced", steps) if steps else HardStates(model=MODEL, process=PROC, order="spaced")
  )
  guided = dataclasses.replace(plain, guidance=0.5)
  batch = idlm.couple_times(batch_of(jax.random.key(0), 64), coupling="permuted")
  batch = plain.choose(batch) if steps else batch

  def slope(made, teacher):
    loss = functools.partial(idlm.student_loss, states=made, teacher=teacher, fake=fake)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(student, batch)

  (value, _), gradient = slope(guided, teacher)
  (wanted, _), of_other = slope(plain, other)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(gradient["logits"], of_other["logits"], rtol=1e-4, atol=1e-5)
  assert not np.allclose(gradient["logits"], slope(plain, teacher)[1]["logits"], atol=1e-3)


@pytest.mark.parametrize("proc", [tiny.UNIFORM, tiny.SCORE])
def test_guidance_needs_predictions_under_masks(proc):
  model, _ = tiny.network(time_conditioning=True)
  with pytest.raises(ValueError, match=r"objective.guidance=0.2 needs process.name='absorbing'"):
    idlm.make(model=model, process=proc, optimizers=_optimizers(), guidance=0.2)


# --- several updates of the fake -----------------------------------------------------------------


@functools.cache
def _alternation(student_rate, fake_rate, fake_updates=1):
  model, _ = tiny.network(dropout=0.0)
  optimizers = {"student": optax.sgd(student_rate), "fake": optax.sgd(fake_rate)}
  options = {"fake_updates": fake_updates, "order": "spaced", "ema_decay": None}
  made = idlm.make(model=model, process=tiny.PROCESS, optimizers=optimizers, **options)
  return made._replace(step=jax.jit(made.step))


@pytest.mark.slow
def test_the_fake_is_updated_several_times_each_on_its_own_batch():
  _, params = tiny.network(dropout=0.0)
  several, batches = _alternation(1.0, 0.1, 2), tuple(tiny.batch(i) for i in range(3))
  assert several.batches == 3
  start = several.init(jax.random.key(0), params)
  after, _ = several.step(start, batches)
  state = start
  for batch in batches[:2]:  # a student that does not move
    state, _ = _alternation(0.0, 0.1).step(state, (batch, batch))
  state, _ = _alternation(1.0, 0.0).step(state, (batches[2], batches[2]))  # a fake that does not
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, after.trees, state.trees)
  assert after.step == 1 and not tiny.equal(after.trees["student"], params)
  other, _ = several.step(start, (batches[0], batches[0], batches[2]))
  assert not tiny.equal(other.trees["fake"], after.trees["fake"])


@pytest.mark.slow
def test_one_batch_serves_all_updates():
  _, params = tiny.network(dropout=0.0)
  several, batch = _alternation(1.0, 0.1, 2), tiny.batch(5)
  start = several.init(jax.random.key(0), params)
  alone, three = several.step(start, batch), several.step(start, (batch,) * 3)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), alone, three)
