# SPDX-License-Identifier: Apache-2.0
"""A masked student's path from masks to text in one or two steps, and the score of that path.

A step from t to s reveals every mask with probability (αₛ − αₜ)/(1 − αₜ), whatever the network,
and draws revealed tokens from p. So the score of a step is that of the tokens it revealed:

  ∇ log P(xₛ | xₜ) = Σ over newly revealed positions of ∇ log p(xₛ | xₜ),

and masks that stay contribute nothing. With a spaced order (see `objectives.orders`) a step reveals
the next ranks, as many as its times say: the network has no part in that either. Tokens and score
come from one run of the network: draws carry no gradient, log-probabilities do.

Reference: DiDi-Instruct, arXiv 2509.25035, section 3.3.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import draw
from dlm_jax.arrays import FloatB, IntBL, KeyB, Params
from dlm_jax.objectives import orders
from dlm_jax.objectives.batch import Batch, fold_each, split_each, valid_tokens
from dlm_jax.objectives.didi_instruct.options import Options
from dlm_jax.objectives.positions import map_positions
from dlm_jax.objectives.setting import Setting
from dlm_jax.process import Absorbing

_ORDER = 50  # folded into keys; steps take 0 to 3


class Terms(NamedTuple):
  """What the student's loss is made of, per sequence; each the sum or a pair over the path.

  Attributes:
    log_prob: log-probability in nats of all tokens that the path revealed.
    divergences: of the teacher per step, nats, mean over positions masked before the step.
    entropy: of the student's predictions, nats, mean over the same and over the steps.
  """

  log_prob: FloatB
  divergences: tuple[FloatB, ...]
  entropy: FloatB


class Path(NamedTuple):
  """States after the steps; `z` is the start where there is only one step."""

  z: IntBL
  x0: IntBL


def start(batch: Batch, process: Absorbing) -> IntBL:
  """Return the state that generation starts from: masks, and prompts where not valid."""
  return jnp.where(valid_tokens(batch), process.mask_id, batch["tokens"])


def rollout(
  params: Params,
  batch: Batch,
  *,
  setting: Setting,
  options: Options,
  teacher: Params | None,
  path: Path | None = None,
) -> tuple[Terms, Path]:
  """Run the student from masks at t = 1 to text at t₀, through the state at "t_mid".

  Args:
    params: the student's; `Terms` are differentiable in them.
    batch: with "tokens", "rng" and "t_mid".
    setting: what student and teacher run on.
    options: say in how many steps, down to which time, what is masked again, which divergence, and
      whether there is dropout.
    teacher: its parameters, constant; None leaves out the divergences, which are then 0.
    path: score this path, which the same batch gave, instead of drawing one.
  """
  x_BL = start(batch, setting.process)
  ones_B = jnp.ones(x_BL.shape[:1])
  middle = [batch["t_mid"]] if options.score_decomposition else []
  times = [ones_B, *middle, options.t0 * ones_B]
  states = [x_BL]
  log_prob_B, divergences, entropies, order = 0.0, [], [], None
  if options.order == "spaced":
    order = orders.draw(fold_each(batch["rng"], _ORDER), valid_tokens(batch))
  for k, (t_B, s_B) in enumerate(itertools.pairwise(times)):
    rngs = tuple(fold_each(batch["rng"], 2 * k + i) for i in (0, 1))
    last = k == len(times) - 2
    known = None if path is None else (path.x0 if last else path.z)
    x_BL, score_B, divergence_B, entropy_B = _step(
      params,
      states[-1],
      s_B,
      t_B,
      rngs[0],
      setting=setting,
      teacher=teacher,
      jeffreys=options.jeffreys,
      order=order,
      remask=0.0 if last else options.remask,
      known=known,
      dropout_B=rngs[1] if options.dropout else None,
    )
    states.append(x_BL)
    log_prob_B += score_B
    divergences.append(divergence_B)
    entropies.append(entropy_B)
  terms = Terms(log_prob_B, tuple(divergences), sum(entropies) / len(entropies))
  return terms, Path(z=states[-2], x0=states[-1])


def _step(
  params,
  xt_BL,
  s_B,
  t_B,
  rng_B,
  *,
  setting,
  teacher=None,
  jeffreys=0.0,
  order=None,
  remask=0.0,
  known=None,
  dropout_B=None,
):
  """Take one reverse step; return the state at s, its score, the teacher's divergence, entropy.

  `known` is a state at s to score instead of drawing one; without a teacher the divergence is 0.
  """
  process = setting.process
  masked_BL = xt_BL == process.mask_id
  hidden = [setting.trunk(params, xt_BL, t_B, dropout_B)]
  if teacher is not None:
    hidden.append(setting.trunk(teacher, xt_BL, t_B))

  length = xt_BL.shape[1]
  rng_reveal_B, rng_token_B = split_each(rng_B, 2)
  uniform_BL2 = jax.vmap(lambda rng: draw.uniforms(rng, (length,)))(rng_token_B)
  chance_BL2 = jax.vmap(lambda rng: jax.random.uniform(rng, (length, 2)))(rng_reveal_B)
  if order is None:
    reveal_B = jax.vmap(process.reveal_probability)(s_B, t_B)
    due_BL = chance_BL2[..., 0] < reveal_B[:, None]
  else:
    due_BL = ~order.masks(process, s_B)
  new_BL = masked_BL & due_BL & (chance_BL2[..., 1] >= remask)
  if known is not None:
    new_BL = masked_BL & (known != process.mask_id)

  def score(hidden_BKD, xt_BK, uniform_BK2, token_BK, *teacher_hidden):
    log_p = jax.vmap(process.log_x0)(setting.head(params, hidden_BKD, t_B), xt_BK)
    p = jnp.exp(log_p)
    if known is None:
      token_BK = draw.categorical(jax.lax.stop_gradient(p), uniform_BK2)
    ids = jnp.arange(p.shape[-1])[None, None]
    log_prob_BK = jnp.sum(jnp.where(ids == token_BK[..., None], log_p, 0.0), -1)
    entropy_BK = -jnp.sum(p * log_p, -1)
    if not teacher_hidden:
      return token_BK, log_prob_BK, jnp.zeros_like(entropy_BK), entropy_BK
    log_q = jax.vmap(process.log_x0)(setting.head(teacher, teacher_hidden[0], t_B), xt_BK)
    log_q = jax.lax.stop_gradient(log_q)
    divergence = (1 - jeffreys) * jnp.exp(log_q) - jeffreys * p
    return token_BK, log_prob_BK, jnp.sum(divergence * (log_q - log_p), -1), entropy_BK

  given_BL = xt_BL if known is None else known
  arrays = (hidden[0], xt_BL, uniform_BL2, given_BL, *hidden[1:])
  token_BL, log_prob_BL, divergence_BL, entropy_BL = map_positions(score, arrays, setting.chunk)
  xs_BL = jnp.where(new_BL, token_BL, xt_BL)
  count_B = jnp.maximum(masked_BL.sum(1), 1)
  mean = lambda x_BL: jnp.sum(jnp.where(masked_BL, x_BL, 0.0), 1) / count_B  # noqa: E731
  log_prob_B = jnp.sum(jnp.where(new_BL, log_prob_BL, 0.0), 1)
  return xs_BL, log_prob_B, mean(divergence_BL), mean(entropy_BL)


def sample(params: Params, batch: Batch, rng_B: KeyB, steps: int, *, setting: Setting) -> IntBL:
  """Draw clean text from a network by `steps` ancestral steps on a uniform grid down to 0."""
  grid_K = jnp.linspace(1.0, 0.0, steps + 1)

  def body(x_BL, inputs):
    k, t, s = inputs
    ones_B = jnp.ones(x_BL.shape[:1])
    rng_k = fold_each(rng_B, k)
    return _step(params, x_BL, s * ones_B, t * ones_B, rng_k, setting=setting)[0], None

  inputs = (jnp.arange(steps), grid_K[:-1], grid_K[1:])
  return jax.lax.scan(body, start(batch, setting.process), inputs)[0]
