# SPDX-License-Identifier: Apache-2.0
"""Self-distillation through time (SDTT): one step learns what several of the teacher's say.

The teacher takes a few ancestral steps of size δ from a masked state. The target of a position is
what the teacher predicted there when it revealed it, or at its last step if it is still masked.
The student predicts all of this at once. δ doubles every round, when the student's raw parameters
also become the teacher.

Under the order "spaced" (see `objectives.orders`) the state is masked as a sampler with that order
meets it, and the teacher's steps go on in the same order: they reveal the next ranks, as many as
the time says.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax import draw
from dlm_jax.arrays import (
  FloatB,
  FloatBKD,
  FloatBKV,
  FloatBL,
  FloatBLD,
  IntBK,
  IntBL,
  KeyB,
  Metrics,
  Params,
)
from dlm_jax.errors import InputError
from dlm_jax.fields import Number
from dlm_jax.models import DiT
from dlm_jax.objectives import orders, rounds
from dlm_jax.objectives.batch import Batch, split_each, valid_tokens
from dlm_jax.objectives.options import ChunkedOptions
from dlm_jax.objectives.positions import map_positions, positions_per_chunk
from dlm_jax.objectives.setting import Setting
from dlm_jax.objectives.state import Objective, Optimizers, check_class, init_from_teacher, update
from dlm_jax.process import Absorbing

TRAINED = ("student",)  # trees with an optimiser
NETWORK = (DiT,)  # classes of networks that it trains
_BATCH_EPS = 1e-3  # smallest time of `draw_batch`


class Rollout(NamedTuple):
  """What the teacher's steps leave for the loss.

  Attributes:
    hidden: trunk output at every step.
    times: the time of every step.
    chosen: index of the step whose prediction is a position's target.
  """

  hidden: tuple[FloatBLD, ...]
  times: Float[Array, "S B"]
  chosen: IntBL


def teacher_times(
  t_B: FloatB, delta: Float[Array, ""] | float, *, num: int, published: bool = False
) -> Float[Array, "S B"]:
  """Return the times of the teacher's steps: t, t − δ, …

  The released code means to interpolate from t to t − num·δ but computes
  t·w + (1 − t)·(t − num·δ), w from 1 to 0: its first time may exceed t. `published` does the same.
  """
  if not published:
    return t_B[None] - jnp.arange(num)[:, None] * delta
  w_S1 = jnp.linspace(1.0, 0.0, num)[:, None]
  return t_B[None] * w_S1 + ((1 - t_B) * (t_B - num * delta))[None]


def chosen_steps(states: tuple[IntBL, ...], mask_id: int) -> IntBL:
  """Return the step whose prediction is the target: the one that revealed, or the last one.

  Args:
    states: after every step of the teacher. What is revealed stays.
    mask_id: the mask.
  """
  masked_BL = sum((state == mask_id).astype(jnp.int32) for state in states)
  return jnp.minimum(masked_BL, len(states) - 1)


def rollout(
  teacher: Params,
  xt_BL: IntBL,
  times_SB: Float[Array, "S B"],
  delta: Float[Array, ""] | float,
  rng_B: KeyB,
  *,
  setting: Setting,
  eps: float = 1e-5,
  order: orders.Spaced | None = None,
) -> Rollout:
  """Take ancestral steps of size δ with the teacher, without dropout.

  A step draws in two stages, whether to reveal and then which token, exactly. Times are kept at
  `eps` or above, where a step reveals nothing more.

  Args:
    teacher: its parameters.
    xt_BL: the state that it starts from.
    times_SB: times of the steps.
    delta: their size.
    rng_B: a key per sequence.
    setting: what the teacher runs on.
    eps: smallest time.
    order: what the state's masks are a prefix of: steps reveal in this order. None: every mask for
      itself.
  """
  num, length, process = times_SB.shape[0], xt_BL.shape[1], setting.process
  rngs = split_each(rng_B, 2 * num)
  times_SB = jnp.maximum(times_SB, eps)
  x_BL, hidden, states = xt_BL, [], []
  for i, t_B in enumerate(times_SB):
    s_B = jnp.maximum(t_B - delta, eps)
    if order is None:
      reveal_B = jax.vmap(process.reveal_probability)(s_B, t_B)
      u_BL = jax.vmap(lambda rng: jax.random.uniform(rng, (length,)))(rngs[2 * i])
      due_BL = u_BL < reveal_B[:, None]
    else:
      due_BL = ~order.masks(process, s_B)
    u_BL2 = jax.vmap(lambda rng: draw.uniforms(rng, (length,)))(rngs[2 * i + 1])
    hidden.append(setting.trunk(teacher, x_BL, t_B))

    def tokens(hidden_BKD, u_BK2, t_B=t_B):
      logits = setting.head(teacher, hidden_BKD, t_B)
      return draw.softmax(process.clean_logits(logits)).draw(u_BK2)

    token_BL = map_positions(tokens, (hidden[-1], u_BL2), setting.chunk)
    revealed_BL = (x_BL == process.mask_id) & due_BL
    x_BL = jnp.where(revealed_BL, token_BL, x_BL)
    states.append(x_BL)
  return Rollout(tuple(hidden), times_SB, chosen_steps(tuple(states), process.mask_id))


def target(
  teacher: Params,
  hidden: tuple[FloatBKD, ...],
  times_SB: Float[Array, "S B"],
  chosen_BK: IntBK,
  xt_BK: IntBK,
  *,
  setting: Setting,
) -> FloatBKV:
  """Return the teacher's log-probabilities at the chosen steps; one-hot where xₜ is revealed."""
  logits_BKV = jnp.zeros((*xt_BK.shape, setting.process.vocab_size))
  for i, (hidden_BKD, t_B) in enumerate(zip(hidden, times_SB, strict=True)):
    step_BKV = setting.head(teacher, hidden_BKD, t_B)
    logits_BKV = jnp.where((chosen_BK == i)[..., None], step_BKV, logits_BKV)
  return jax.vmap(setting.process.log_x0)(logits_BKV, xt_BK)


def position_loss(
  params: Params,
  batch: Batch,
  steps: Rollout,
  *,
  teacher: Params,
  setting: Setting,
  divergence: str = "kl-bwd",
  dropout_B: KeyB | None = None,
) -> FloatBL:
  """Return the student's divergence from the target per position, 0 where xₜ is revealed.

  Args:
    params: the student's.
    batch: with "xt" and "t".
    steps: of the teacher, from xₜ.
    teacher: its parameters.
    setting: what both networks run on.
    divergence: "kl-bwd", "kl-fwd", "mse" or "tvd", see `rounds.divergence`.
    dropout_B: keys of dropout in the student.
  """
  xt_BL, t_B, process = batch["xt"], batch["t"], setting.process
  student_BLD = setting.trunk(params, xt_BL, t_B, dropout_B)

  def compare(student_BKD, xt_BK, chosen_BK, *hidden):
    log_student = jax.vmap(process.log_x0)(setting.head(params, student_BKD, t_B), xt_BK)
    log_teacher = target(teacher, hidden, steps.times, chosen_BK, xt_BK, setting=setting)
    each_BK = rounds.divergence(log_student, jax.lax.stop_gradient(log_teacher), divergence)
    return jnp.where(xt_BK == process.mask_id, each_BK, 0.0)

  return map_positions(compare, (student_BLD, xt_BL, steps.chosen, *steps.hidden), setting.chunk)


def corrupt(batch: Batch, *, process: Absorbing, eps: float = 1e-5, order: str = "random") -> Batch:
  """Add "xt" and "weight" to a global batch, and stretch its times from [1e-3, 1] to [ε, 1].

  Of order "spaced" also "order", of which the masks are a prefix.

  The weight makes a mean over sequences one over all masked positions of the global batch, however
  it is cut into micro-batches. Strata of the times are one per sequence; the published code shifts
  one shared uniform.
  """
  rng_B, rng_noise_B = split_each(batch["rng"], 2)
  t_B = eps + (1 - eps) * (batch["t"] - _BATCH_EPS) / (1 - _BATCH_EPS)
  t_B = jnp.clip(t_B, eps, 1.0)
  valid_BL = valid_tokens(batch)
  if order == "random":
    xt_BL = orders.masked(order, process, rng_noise_B, batch["tokens"], valid_BL, t_B)
  else:
    spaced = orders.draw(rng_noise_B, valid_BL)
    batch = {**batch, "order": spaced}
    masked_BL = valid_BL & spaced.masks(process, t_B)
    xt_BL = jnp.where(masked_BL, process.mask_id, batch["tokens"])
  masked = jnp.maximum(jnp.sum(xt_BL == process.mask_id), 1)
  weight_B = jnp.full(t_B.shape, t_B.shape[0] / masked)
  return {**batch, "rng": rng_B, "t": t_B, "xt": xt_BL, "weight": weight_B}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChunkedOptions):
  """The rounds, and what a step compares; see also `ChunkedOptions`.

  Attributes:
    update_teacher_every: steps per round. At a round's first step the student's raw parameters
      become the teacher; the run's length sets the number of rounds (published: 7).
    num_steps_original: the teacher's steps in round 0: δ = (1 − ε)/num_steps_original · 2ᵏ in
      round k.
    min_num_steps: δ grows no further than (1 − ε)/min_num_steps. The published code stops there.
    num_distill_steps: steps of the teacher that one of the student replaces.
    divergence: "kl-bwd", "kl-fwd", "mse" or "tvd".
    published_times: times of the teacher as in the released code, see `teacher_times`.
    order: "random" or "spaced": which positions are masked, and revealed, together.
    eps: smallest time.

  Raises:
    InputError: an unknown name, or a number that does not fit.
  """

  update_teacher_every: int = 10_000
  num_steps_original: int = 1024
  min_num_steps: int = 8
  num_distill_steps: int = 2
  divergence: str = "kl-bwd"
  published_times: bool = False
  order: str = "random"
  eps: float = 1e-5

  def __post_init__(self):
    super().__post_init__()
    rounds.check_divergence(self.divergence, rounds.DIVERGENCES)
    rounds.check_round(self.update_teacher_every)
    orders.check(self.order)
    Number("[0, 1)").check("objective.eps", self.eps)
    if self.num_distill_steps < 1:
      raise InputError(f"objective.num_distill_steps={self.num_distill_steps} must be at least 1.")
    if not 1 <= self.min_num_steps <= self.num_steps_original:
      raise InputError(
        f"objective.min_num_steps={self.min_num_steps} must lie between 1 and"
        f" objective.num_steps_original={self.num_steps_original}."
      )

  def delta(self, step: Int[Array, ""]) -> Float[Array, ""]:
    """Return the size of the teacher's steps at a step of training."""
    most = self.num_steps_original / self.min_num_steps
    growth = rounds.doubled(step, self.update_teacher_every, most)
    return (1 - self.eps) / self.num_steps_original * growth


def loss(
  params: Params,
  batch: Batch,
  *,
  setting: Setting,
  teacher: Params,
  delta: Float[Array, ""] | float,
  options: Options,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the mean of `position_loss` over masked positions of a `corrupt`ed batch.

  Dropout in the student only.
  """
  rng_B, rng_dropout_B = split_each(batch["rng"], 2)
  times_SB = teacher_times(
    batch["t"], delta, num=options.num_distill_steps, published=options.published_times
  )
  xt_BL = batch["xt"]
  given = {"setting": setting, "eps": options.eps, "order": batch.get("order")}
  steps = rollout(teacher, xt_BL, times_SB, delta, rng_B, **given)
  loss_BL = position_loss(
    params,
    batch,
    steps,
    teacher=teacher,
    setting=setting,
    divergence=options.divergence,
    dropout_B=rng_dropout_B,
  )
  value = jnp.mean(batch["weight"] * loss_BL.sum(1))
  return value, ({"masked": jnp.mean(xt_BL == setting.process.mask_id)}, None)


def make(*, model: DiT, process: Absorbing, optimizers: Optimizers, **options: Any) -> Objective:
  """Build distillation of a masked-diffusion teacher in rounds.

  Args:
    model: network of teacher and student.
    process: the teacher's forward process.
    optimizers: "student".
    **options: fields of `Options`.

  Returns:
    An objective with trees "teacher" and "student".

  Raises:
    InputError: an option does not fit.

  Reference: SDTT, arXiv 2410.21035, algorithm 1.
  """
  chosen = Options.of(options)
  check_class("model.name", model, NETWORK, "a denoiser is distilled")
  chunk = positions_per_chunk(chosen.chunk, model.config.length, process.vocab_size)
  setting = Setting(model=model, process=process, chunk=chunk)

  def step(state, batch):
    delta = chosen.delta(state.step)
    state = rounds.refresh_teacher(state, chosen.update_teacher_every)
    teacher = state.trees["teacher"]
    total = functools.partial(loss, setting=setting, teacher=teacher, delta=delta, options=chosen)
    batch = corrupt(batch, process=process, eps=chosen.eps, order=chosen.order)
    tx = optimizers["student"]
    state, metrics, _ = update(state, "student", total, batch, tx, **chosen.updates)
    return state.replace(step=state.step + 1), metrics

  return Objective(
    init_from_teacher("SDTT", ("student",), optimizers, chosen), step, output="student"
  )
