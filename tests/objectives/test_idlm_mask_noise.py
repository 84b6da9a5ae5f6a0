# SPDX-License-Identifier: Apache-2.0
"""Students whose masks carry noise: two bits that always agree, revealed together.

No product of marginals is nearer to that law than 0.5 in total variation, so no masked student of
one step is. One that is given noise can be.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dlm_jax import convert, models, sample
from dlm_jax.errors import InputError
from dlm_jax.evaluate import likelihood
from dlm_jax.models import DiT
from dlm_jax.objectives import draw_batch, idlm, mdlm
from dlm_jax.objectives.idlm import mask_noise
from dlm_jax.objectives.state import output_params
from dlm_jax.process import Absorbing, Uniform

TOKENS, L, BATCH, WIDTH = 2, 2, 128, 4
PROCESS = Absorbing(vocab_size=TOKENS + 1, mask_id=TOKENS)
SHAPE = {"vocab_size": TOKENS + 1, "dim": 32, "layers": 1, "heads": 2, "length": L}


def network(width):
  return DiT(tiny.config(**SHAPE, mask_noise=width))


def trained(objective, steps, teacher=None, batches=1):
  """Return what an objective makes of data whose bits agree."""

  def batch(rng):
    rng_tokens, rng = jax.random.split(rng)
    bit_B1 = jax.random.bernoulli(rng_tokens, 0.5, (BATCH, 1)).astype(jnp.int32)
    return draw_batch({"tokens": jnp.tile(bit_B1, (1, L))}, rng)

  def step(state, rng):
    given = tuple(map(batch, jax.random.split(rng, batches)))
    return objective.step(state, given if batches > 1 else given[0])[0], None

  @jax.jit
  def run(rng, teacher):
    keys = jax.random.split(rng, steps + 1)
    state = objective.init(keys[0], teacher)
    return output_params(jax.lax.scan(step, state, keys[1:])[0], objective)

  return run(jax.random.key(0), teacher)


@functools.cache
def teacher():
  steps = 3000
  rate = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
  objective = mdlm.make(
    model=network(0), process=PROCESS, optimizers={"model": rate}, ema_decay=None
  )
  return trained(objective, steps)


def method(width, steps=600, **options):
  rates = {"student": optax.cosine_decay_schedule(1e-3, steps), "fake": 5e-3}
  return idlm.make(
    model=network(width),
    process=PROCESS,
    time_coupling="permuted",
    ema_decay=0.99,
    optimizers={name: optax.adam(rate, b1=0.5) for name, rate in rates.items()},
    **options,
  )


def distance(width, params, steps=1, count=65_536):
  """Return the total variation between samples and data."""
  denoiser = models.Denoiser(network(width), params)
  draw = jax.jit(
    lambda denoiser, rng: sample.generate(
      denoiser, PROCESS, rng, batch=count, length=L, steps=steps
    )
  )
  tokens_BL = np.asarray(draw(denoiser, jax.random.key(1)))
  law = np.bincount(tokens_BL @ [2, 1], minlength=4) / count
  return np.abs(law - [0.5, 0, 0, 0.5]).sum() / 2


@pytest.mark.slow
def test_noise_carries_dependence():
  """By the sampler's own draws: 0.044, and of two other seeds 0.035 and 0.031, each ± 0.002."""
  plain = distance(0, trained(method(0, 300), 300, teacher(), batches=2))
  noisy = distance(WIDTH, trained(method(WIDTH, 2000), 2000, teacher(), batches=2))
  alone = distance(WIDTH, trained(method(WIDTH, 300, anchor=0.0), 300, teacher(), batches=2))
  print(f"\ntotal variation: no noise {plain:.3f}, noise {noisy:.3f}, without anchor {alone:.3f}")
  assert distance(0, teacher()) > 0.45
  assert plain > 0.45
  assert noisy <= 0.05
  assert alone > 0.4


def prepared(width=WIDTH):
  params = network(0).init(jax.random.key(3), *network(0).inputs(L))["params"]
  params["output"]["project"]["kernel"] = jax.random.normal(
    jax.random.key(4), (SHAPE["dim"], TOKENS + 1)
  )
  return params, method(width).init(jax.random.key(5), params)


def test_start():
  """Teacher and fake start without noise, the student with twice the size of an embedding."""
  params, state = prepared()
  projections = {name: np.asarray(tree["mask_noise"]) for name, tree in state.trees.items()}
  assert not projections["teacher"].any() and not projections["fake"].any()
  size = np.sqrt(WIDTH * np.mean(projections["student"] ** 2))
  table = np.asarray(params["embed"]["embedding"])
  np.testing.assert_allclose(size / np.sqrt(np.mean(table**2)), 2, rtol=0.4)
  np.testing.assert_array_equal(state.ema["student"]["mask_noise"], projections["student"])
  tokens_BL = jnp.array([[2, 1], [2, 2]])
  zeros = state.trees["fake"]
  noise = jax.random.normal(jax.random.key(0), (2, L, WIDTH))
  apply = lambda model, params, *given: model.apply({"params": params}, *given)  # noqa: E731
  without = apply(network(0), params, tokens_BL, jnp.zeros(2))
  for given in ((), (None, noise)):
    same = apply(network(WIDTH), zeros, tokens_BL, jnp.zeros(2), *given)
    np.testing.assert_array_equal(same, without)
  moved = apply(network(WIDTH), state.trees["student"], tokens_BL, jnp.zeros(2), None, noise)
  assert np.abs(moved - without).max() > 0.01


@pytest.mark.slow
def test_anchor_is_unbiased():
  """Its mean over noises is the squared distance of the mean prediction, by many noises."""
  _, state = prepared()
  student = state.trees["student"]
  states = idlm.HardStates(model=network(WIDTH), process=PROCESS)
  count, t = 65536, 0.9
  x_BL = jnp.full((count, L), PROCESS.mask_id)
  batch = {"tokens": jnp.zeros((count, L), jnp.int32), "t_gen": jnp.full(count, t)}
  keys = jax.random.split(jax.random.key(6), (2, count))
  trunk = lambda tree, keys_B: states.trunk(tree, x_BL, batch["t_gen"], None, keys_B)  # noqa: E731
  hidden_BLD = trunk(student, keys[0])
  drawn = idlm.absorbing.HardSample(x_BL, hidden_BLD, x_BL)
  weights_BL = jnp.full((count, L), 1 / count)
  given = (student, drawn, batch, keys[1], weights_BL)
  found = mask_noise.anchor(*given, states=states, teacher=state.trees["teacher"])

  def p(tree, hidden_BLD):
    logits = states.head(tree, hidden_BLD, batch["t_gen"])
    return np.exp(jax.vmap(PROCESS.log_x0)(logits, x_BL)).mean(0)

  both = (p(student, hidden_BLD) + p(student, trunk(student, keys[1]))) / 2
  wanted = np.sum((both - p(state.trees["teacher"], trunk(state.trees["teacher"], None))) ** 2)
  np.testing.assert_allclose(found, wanted, atol=3e-3)
  assert wanted > 1e-2  # else anything would do


@pytest.mark.parametrize(
  "options",
  [
    {},
    *(pytest.param({"sampler": name}, marks=pytest.mark.slow) for name in ("first_hitting", "psi")),
  ],
)
def test_samples_do_not_depend_on_the_batch(options):
  _, state = prepared()
  denoiser = models.Denoiser(network(WIDTH), state.trees["student"])

  @functools.partial(jax.jit, static_argnums=1)
  def draw(denoiser, batch):
    rng = jax.random.key(2)
    return sample.generate(denoiser, PROCESS, rng, batch=batch, length=L, steps=2, **options)

  many = np.asarray(draw(denoiser, 64))
  np.testing.assert_array_equal(draw(denoiser, 48), many[:48])
  loud = denoiser.replace(
    params={**denoiser.params, "mask_noise": jnp.full((WIDTH, SHAPE["dim"]), 9.0)}
  )
  assert (np.asarray(draw(loud, 64)) != many).any()  # the noise is given


def test_files_keep_the_noise(tmp_path):
  _, state = prepared()
  convert.save(tmp_path, network(WIDTH), state.trees["student"], PROCESS)
  model, params, _ = convert.load(tmp_path)
  assert model.config.mask_noise == WIDTH
  np.testing.assert_array_equal(params["mask_noise"], state.trees["student"]["mask_noise"])


def test_refusals():
  """What gives masks no noise, or has none, says so in one line."""
  _, state = prepared()
  denoiser = models.Denoiser(network(WIDTH), state.trees["student"])
  generate = functools.partial(
    sample.generate, denoiser, PROCESS, jax.random.key(0), batch=2, length=L
  )
  for options in ({"sampler": "analytic"}, {"precision": "legacy"}):
    with pytest.raises(InputError, match="no noise"):
      generate(**options)
  with pytest.raises(InputError, match="an average over it"):
    likelihood.elbo(denoiser, PROCESS, np.zeros((2, L), np.int32), jax.random.key(0))
  uniform = Uniform(vocab_size=TOKENS + 1)
  timed = DiT(tiny.config(**SHAPE, mask_noise=WIDTH, time_conditioning=True))
  with pytest.raises(InputError, match="absorbing"):
    idlm.make(model=timed, process=uniform, optimizers={})
