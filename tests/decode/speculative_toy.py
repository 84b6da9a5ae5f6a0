# SPDX-License-Identifier: Apache-2.0
"""Tiny targets, drafts of every quality, prompts of every alignment, and one way to run them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny_decoder as tiny

from dlm_jax import sample

V, MASK = tiny.V, tiny.V - 1
# Compiling takes longer than running here; without optimisation a third as long.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def network(layers=2):
  """Return a target and its parameters."""
  return tiny.make(dataclasses.replace(tiny.DENSE, layers=layers))


@functools.cache
def drafts(layers=2):
  """Return parameters of drafts, the best first: the target, two noisy, an unrelated, a contrary.

  The contrary one's most probable token is always the target's least probable one.
  """
  model, params = network(layers)
  _, other = tiny.make(model.config, seed=5)
  mixed = lambda share: jax.tree.map(lambda a, b: (1 - share) * a + share * b, params, other)  # noqa: E731
  head = {"kernel": -params["project"]["kernel"]}
  return [params, mixed(0.02), mixed(0.1), other, params | {"project": head}]


def requests(batch, window, seed=0, shortest=1, **asked):
  """Return prompts of 1 … 8 tokens, lengths, limits up to the window, keys, and options per row.

  Before the first token of all, masks are all alike and so are their logits, up to rounding: who is
  the most confident is a matter of rounding too. So only rules that do not ask start from nothing.
  """
  rng = np.random.default_rng(seed)
  prompt = jnp.asarray(rng.integers(0, MASK, (batch, 8)), jnp.int32)
  lengths = shortest + jnp.arange(batch) % (9 - shortest)
  limits = jnp.asarray(rng.integers(window - 7, window + 1, batch), jnp.int32)
  options = sample.RowOptions.make(batch, **asked)
  return prompt, lengths, limits, jax.random.split(jax.random.key(seed), batch), options


@functools.cache
def runner(decoder):
  """Return a compiled (params, prompt, lengths, limits, keys, options) -> final state."""

  def run(params, *arguments):
    return sample.finish(decoder, params, begin(decoder, params, *arguments))

  return jax.jit(run, compiler_options=QUICK)


def begin(decoder, params, prompt, lengths, limits, keys, options):
  """Return the state of these rows before their first round."""
  given = {"lengths": lengths, "max_length": limits, "options": options}
  return sample.start(decoder, params, prompt, keys, **given)


def rounds(decoder, params, arguments):
  """Yield the state at the start and after every round."""
  start = jax.jit(functools.partial(begin, decoder), compiler_options=QUICK)
  state = start(params, *arguments)
  one_round = jax.jit(decoder.round, compiler_options=QUICK)
  yield state
  while not np.all(decoder.done(state)):
    state = one_round(params, state)
    yield state


def run(decoder, params, arguments):
  """Return the final state."""
  return runner(decoder)(params, *arguments)


def text(state):
  """Return the tokens of every row up to its length, −1 behind."""
  progress = state.progress
  kept = np.arange(progress.tokens_BW.shape[1]) < np.asarray(progress.length_B)[:, None]
  return np.where(kept, progress.tokens_BW, -1)


def same_cache(a, b, tolerance=2e-4):
  """Assert that two caches agree in the slots that count in both."""
  both = np.minimum(a.length_B, b.length_B)
  slots = min(a.capacity, b.capacity)
  counts = (np.arange(slots) < both[:, None])[None, :, :, None, None]
  for x, y in ((a.k_NBSGC, b.k_NBSGC), (a.v_NBSGC, b.v_NBSGC)):
    x, y = (np.where(counts, z[:, :, :slots], 0) for z in (x, y))
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def blocks(state, size):
  """Return how many blocks every row has worked on."""
  progress = state.progress
  generated = np.asarray(progress.length_B) > np.asarray(progress.prompt_B)
  last = (np.asarray(progress.length_B) - 1) // size
  return np.where(generated, last - np.asarray(progress.prompt_B) // size + 1, 0)
