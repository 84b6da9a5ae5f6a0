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
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import draw
from dlm_jax.arrays import FloatB, IntBL, RngKey
from dlm_jax.evaluate import chains
from dlm_jax.sample import _adaptive, evaluations, from_logits, generate, orders
from dlm_jax.sample._ancestral import Ancestral
from dlm_jax.sample._request import Request

# Ways of sampling by name: the process, and options of `sample.generate`.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
  "random": ("masks", {"order": "random"}),
  "spaced": ("masks", {"order": "spaced"}),
  "dilated": ("masks", {"order": orders.dilated}),
  "jittered": ("masks", {"order": orders.jittered}),
  "confidence": ("masks", {"order": "confidence"}),
  "margin": ("masks", {"order": "margin"}),
  "entropy": ("masks", {"order": "entropy"}),
  "spaced_confidence": ("masks", {"order": "spaced_confidence"}),
  "psi": ("masks", {"sampler": "psi", "kappa": 0.5}),
  "analytic": ("masks", {"sampler": "analytic"}),
  "uniform": ("uniform", {}),
  "uniform_psi": ("uniform", {"sampler": "psi", "kappa": 0.5}),
}
CHAINS = {"markov": chains.markov, "hidden": chains.hidden}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One way of sampling with one number of steps.

  Attributes:
    chain: name of the chain.
    name: of the way.
    steps: of the grid.
    evaluations: of the denoiser, counted as `sample.evaluations` does.
    nats: lost per sequence, as above; None of samplers without groups.
    error: its standard error.
    pairs: KL of pairs of neighbours of samples from the true law, in nats.
  """

  chain: str
  name: str
  steps: int
  evaluations: int
  nats: float | None
  error: float | None
  pairs: float


def compare(
  chain: str, names: Sequence[str], steps: int, *, length: int, sequences: int, seed: int = 0
) -> Iterator[Row]:
  """Yield what every way of sampling loses with so many steps.

  Args:
    chain: name in `CHAINS`.
    names: in `WAYS`.
    steps: K.
    length: tokens of a sequence.
    sequences: exact ones that are scored, and as many samples.
    seed: of both.
  """
  law = CHAINS[chain]()
  rng_x, rng_order, rng_draw = jax.random.split(draw.key(seed), 3)
  x_BL = law.draw(rng_x, sequences, length)
  for name in names:
    kind, options = WAYS[name]
    nats = error = None
    if "order" in options:
      run = jax.jit(functools.partial(lost, steps=steps, **options))
      nats_B = np.asarray(run(law, rng_order, x_BL), np.float64)
      nats, error = float(nats_B.mean()), float(nats_B.std(ddof=1) / len(nats_B) ** 0.5)
    process = law.process if kind == "masks" else law.uniform
    sizes = {"batch": sequences, "length": length, "steps": steps}
    run = jax.jit(functools.partial(_drawn, kind=kind, process=process, **sizes, **options))
    yield Row(
      chain=chain,
      name=name,
      steps=steps,
      evaluations=evaluations(
        options.get("sampler", "ancestral"), steps=steps, proc=process, length=length
      )["student"],
      nats=nats,
      error=error,
      pairs=chains.divergence(law, run(law, rng_draw)),
    )


def _drawn(law, rng, *, kind, process, **options):
  denoiser = law.denoiser() if kind == "masks" else law.uniform_denoiser()
  return generate(denoiser, process, rng, **options)


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

  def predict(now_BL, k, t, _):
    del k
    logits_BLV = process.clean_logits(exact(now_BL, request.sigma(t)))
    return x_BL, _adaptive.score(options["order"], logits_BLV)

  return _adaptive.states(Ancestral(**options), request, predict)
