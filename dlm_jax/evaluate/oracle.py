# SPDX-License-Identifier: Apache-2.0
"""What sampling itself loses: samplers of an exact denoiser, by KL from the law they should have.

A perplexity under another network can be gained by narrowing; a divergence from the true law
cannot. Of a sampler that reveals groups, drawn or chosen without regard to the tokens revealed
with them, the error is exactly the dependence inside the groups: with x of the true law and its
groups revealed as the sampler would,

  KL(p ‖ q) ≤ E[ log p(x) − Σ_i log p(x_i | x of the groups before i's) ],

with equality for the joint law of texts and groups. The mean over exact sequences estimates it
without bias, for any order. Samplers that mask again have no such groups: theirs is the KL of
pairs of neighbours, of samples.

Reference: the framework of exact denoisers, arXiv 2602.19619.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dlm_jax.arrays import FloatB, IntBL, RngKey
from dlm_jax.evaluate import chains
from dlm_jax.sample import _adaptive, from_logits, generate, orders
from dlm_jax.sample._ancestral import Ancestral
from dlm_jax.sample._request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One way of sampling with one number of steps.

  Attributes:
    name: of the way.
    steps: evaluations.
    nats: lost per sequence: the bound on KL(p ‖ q) above; NaN of samplers without groups.
    error: its standard error.
    pairs: KL of pairs of neighbours, of samples.
  """

  name: str
  steps: int
  nats: float
  error: float
  pairs: float


def lost(chain: chains.Chain, rng: RngKey, x_BL: IntBL, *, steps: int, **options: Any) -> FloatB:
  """Return log p(x) − Σ log p(x_i | groups before), in nats per sequence.

  Args:
    chain: whose law is true.
    rng: of the order.
    x_BL: exact sequences.
    steps: K.
    **options: of `sample.generate`: order, grid and what belongs to them.
  """
  trace_KBL = _trace(chain, rng, x_BL, steps, options)
  exact, mask_id = chain.denoiser(), chain.process.mask_id
  before_KBL = jnp.concatenate([jnp.full_like(x_BL, mask_id)[None], trace_KBL[:-1]])

  def add(total_B, states):
    before_BL, after_BL = states
    logits_BLV = exact(before_BL, jnp.zeros(len(x_BL)))
    each_BL = jnp.take_along_axis(logits_BLV, x_BL[..., None], axis=-1)[..., 0]
    return total_B + jnp.sum(jnp.where(before_BL != after_BL, each_BL, 0.0), axis=1), None

  total_B = jax.lax.scan(add, jnp.zeros(len(x_BL)), (before_KBL, trace_KBL))[0]
  return chain.log_prob(x_BL) - total_B


def _trace(chain, rng, x_BL, steps, options):
  """Return the states of a sampler that chooses as it does on the exact denoiser and draws x."""
  process, (batch, length) = chain.process, x_BL.shape
  if options.get("order") not in orders.ADAPTIVE:
    known = from_logits(lambda *_: 1e4 * jax.nn.one_hot(x_BL, process.vocab_size))
    sizes = {"batch": batch, "length": length, "steps": steps}
    return generate(known, process, rng, return_trace=True, **sizes, **options)[1]
  exact = chain.denoiser()
  request = Request(
    denoiser=exact,
    process=process,
    rng_B=jax.random.split(rng, batch),
    x_BL=jnp.full_like(x_BL, process.mask_id),
    frozen_BL=jnp.zeros(x_BL.shape, bool),
    steps=steps,
  )

  def predict(now_BL, t, _):
    logits_BLV = process.clean_logits(exact(now_BL, request.sigma(t)))
    return x_BL, _adaptive.score(options["order"], logits_BLV)

  return _adaptive.states(Ancestral(**options), request, predict)
