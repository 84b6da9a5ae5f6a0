# SPDX-License-Identifier: Apache-2.0
"""`sample.evaluations` and what the frontier calls evaluations, against counted calls."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import toy

from dlm_jax import process, sample
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier

L = 4
MASKED = process.Absorbing(vocab_size=toy.VOCABULARY, mask_id=toy.MASK)
UNIFORM = process.Uniform(vocab_size=toy.VOCABULARY)
CALLS = []


@dataclasses.dataclass(frozen=True)
class Counting(toy.Table):
  """Count trunk evaluations while they happen."""

  def trunk(self, params, tokens_BL, sigma_B):
    jax.debug.callback(lambda: CALLS.append("student"))
    return super().trunk(params, tokens_BL, sigma_B)


class Critic:
  """A discriminator of one weight per token, which counts its evaluations."""

  weight_V = jnp.array([0.3, -0.2, 0.1, 0.0])

  def embedded(self, inputs):
    if jnp.issubdtype(inputs.dtype, jnp.integer):
      return jax.nn.one_hot(inputs, toy.VOCABULARY)
    return jax.nn.softmax(inputs)

  def body(self, embedded_BLD, sigma_B):
    jax.debug.callback(lambda: CALLS.append("discriminator"))
    return embedded_BLD @ self.weight_V

  def __call__(self, tokens_BL, sigma_B):
    return self.body(self.embedded(tokens_BL), sigma_B)


def _made(proc, steps, **options):
  """Return the calls of both networks while a batch is drawn."""
  denoiser = dataclasses.replace(toy.make(L), model=Counting(length=L))
  CALLS.clear()
  draw = jax.jit(
    lambda rng: sample.generate(denoiser, proc, rng, batch=64, length=L, steps=steps, **options)
  )
  jax.block_until_ready(draw(jax.random.key(3)))
  jax.effects_barrier()
  return CALLS.count("student"), CALLS.count("discriminator")


CASES = [
  *((MASKED, {"sampler": name}) for name in ("ancestral", "first_hitting", "psi", "analytic")),
  (MASKED, {"sampler": "psi", "kappa": 0.5}),
  (MASKED, {"sampler": "ancestral", "precision": "legacy"}),
  *((UNIFORM, {"sampler": name}) for name in ("ancestral", "psi")),
]


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy", "none"])
@pytest.mark.parametrize("proc,options", CASES, ids=str)
def test_evaluations_are_those_made(proc, options, noise_removal, steps):
  options = {**options, "noise_removal": noise_removal}
  made, _ = _made(proc, steps, **options)
  assert sample.evaluations(steps=steps, proc=proc, length=L, **options)["student"] == made
  if options["sampler"] != "first_hitting":
    assert sample.evaluations(steps=steps, proc=proc, **options)["student"] == made
    sampler = frontier.Sampler(denoiser=None, process=proc, length=L, options=options)
    assert sampler.evaluations(steps) == made


@pytest.mark.first_case
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy", "none"])
@pytest.mark.parametrize("reward", ["sum", "all"])
def test_evaluations_of_both_networks(reward, noise_removal, steps):
  """A backward pass of the discriminator comes with one of its forward passes."""
  options = {"sampler": "rgas", "candidates": 3, "reward": reward, "noise_removal": noise_removal}
  counts = sample.evaluations(steps=steps, proc=MASKED, length=L, **options)
  student, discriminator = _made(MASKED, steps, critic=Critic(), **options)
  assert counts["student"] == student
  assert counts["discriminator_forward"] == discriminator
  assert counts["discriminator_backward"] == (steps // 2)


def test_a_sample_of_masks_needs_at_most_its_length():
  """Thousands of steps on L tokens are L evaluations for one sample; others redraw everything."""
  assert sample.evaluations(steps=1000, proc=MASKED, length=L)["student"] == L
  assert sample.evaluations("psi", steps=1000, proc=MASKED, length=L)["student"] == 1000
  assert sample.evaluations(steps=1000, proc=UNIFORM, length=L)["student"] == 1001


def test_what_cannot_be_counted():
  with pytest.raises(InputError, match="once per token drawn; give length"):
    sample.evaluations("first_hitting", steps=4)
  with pytest.raises(InputError, match="needs an absorbing process, and this one is uniform"):
    sample.evaluations("rgas", steps=4, proc=UNIFORM)
