# SPDX-License-Identifier: Apache-2.0
"""Discrete consistency distillation (DCD): steps of growing size along Gaussian trajectories.

One noise ξ per sequence gives two points of a deterministic trajectory,
z_t = argmax(α̃_t x₀ + σ̃_t ξ) and z_s with s = t − δ. The student at z_t learns what its teacher
says at z_s. δ doubles every round, when the student's raw parameters also become the teacher.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import FloatB, FloatBL, IntBL, KeyB, Metrics, Params
from dlm_jax.fields import Whole
from dlm_jax.models import DiT
from dlm_jax.objectives import rounds
from dlm_jax.objectives.batch import Batch, counted, split_each, token_mean
from dlm_jax.objectives.options import ChunkedOptions
from dlm_jax.objectives.positions import map_positions, positions_per_chunk
from dlm_jax.objectives.setting import Setting, check_time_conditioning
from dlm_jax.objectives.state import Objective, Optimizers, check_class, init_from_teacher, update
from dlm_jax.process import GaussianDuality, Uniform

TRAINED = ("student",)  # trees with an optimiser
NETWORK = (DiT,)  # classes of networks that it trains
DIVERGENCES = ("kl-bwd", "kl-fwd")


class Pair(NamedTuple):
  """Two states of one trajectory and their times, s = t − δ."""

  zt: IntBL
  zs: IntBL
  t: FloatB
  s: FloatB


def pair_times(t_B: FloatB, delta: Float[Array, ""] | float) -> tuple[FloatB, FloatB]:
  """Return t + δ clipped to [0, 1], and δ less: the published order."""
  t_B = jnp.clip(t_B + delta, 0.0, 1.0)
  return t_B, t_B - delta


def trajectory(
  batch: Batch,
  rng_B: KeyB,
  delta: Float[Array, ""] | float,
  *,
  duality: GaussianDuality,
  chunk: int | None = None,
) -> Pair:
  """Draw both states of every sequence from one noise; prompts are kept."""
  x0_BL = batch["tokens"]
  t_B, s_B = pair_times(batch["t"], delta)
  position_BL = jnp.broadcast_to(jnp.arange(x0_BL.shape[1])[None], x0_BL.shape)

  def states(x0_BK, position_BK):
    one_hot_BKV = jax.nn.one_hot(x0_BK, duality.vocab_size)
    noise_BKV = jax.vmap(duality.noise)(rng_B, position_BK)
    diffuse = jax.vmap(duality.diffuse)
    draw = lambda t_B: jnp.argmax(diffuse(one_hot_BKV, noise_BKV, t_B), -1).astype(jnp.int32)  # noqa: E731
    return draw(t_B), draw(s_B)

  zt_BL, zs_BL = map_positions(states, (x0_BL, position_BL), chunk)
  if "valid" in batch:
    zt_BL, zs_BL = (jnp.where(batch["valid"], z, x0_BL) for z in (zt_BL, zs_BL))
  return Pair(zt_BL, zs_BL, t_B, s_B)


def consistency(
  params: Params,
  pair: Pair,
  *,
  teacher: Params,
  setting: Setting,
  divergence: str = "kl-bwd",
  dropout_B: KeyB | None = None,
) -> FloatBL:
  """Return the divergence of the student at (z_t, t) from the teacher at (z_s, s), in nats.

  Args:
    params: the student's; the teacher is constant.
    pair: the states.
    teacher: its parameters.
    setting: the process's schedule gives the σ that the network is told.
    divergence: "kl-bwd", KL(student ‖ teacher), or "kl-fwd", the reverse.
    dropout_B: keys of dropout in the student.
  """
  process = setting.process
  student_BLD = setting.trunk(params, pair.zt, pair.t, dropout_B)
  teacher_BLD = setting.trunk(teacher, pair.zs, pair.s)

  def compare(student_BKD, teacher_BKD, zt_BK, zs_BK):
    log_student = jax.vmap(process.log_x0)(setting.head(params, student_BKD, pair.t), zt_BK)
    log_teacher = jax.vmap(process.log_x0)(setting.head(teacher, teacher_BKD, pair.s), zs_BK)
    return rounds.divergence(log_student, jax.lax.stop_gradient(log_teacher), divergence)

  return map_positions(compare, (student_BLD, teacher_BLD, pair.zt, pair.zs), setting.chunk)


def loss(
  params: Params,
  batch: Batch,
  *,
  setting: Setting,
  duality: GaussianDuality,
  teacher: Params,
  delta: Float[Array, ""] | float,
  divergence: str = "kl-bwd",
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the mean of `consistency` over valid tokens, in nats.

  Dropout in the student only. The published code copies the teacher in training mode, so that its
  dropout stays on.
  """
  rng_noise_B, rng_dropout_B = split_each(batch["rng"], 2)
  pair = trajectory(batch, rng_noise_B, delta, duality=duality, chunk=setting.chunk)
  loss_BL = consistency(
    params, pair, teacher=teacher, setting=setting, divergence=divergence, dropout_B=rng_dropout_B
  )
  return token_mean(loss_BL, batch), ({"changed": jnp.mean(pair.zt != pair.zs)}, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChunkedOptions):
  """The rounds; see also `ChunkedOptions`.

  Attributes:
    update_teacher_every: steps per round. At a round's first step the student's raw parameters
      become the teacher; the run's length sets the number of rounds (published: 5).
    num_steps: T; δ = 2ⁿ/T in round n, at most 1.
    gamma_min, gamma_max: see `GaussianDuality`.
    divergence: "kl-bwd" or "kl-fwd", see `consistency`.

  Raises:
    InputError: an unknown name, or a number that does not fit.
  """

  ema_decay: float | None = 0.999
  update_teacher_every: int = 10_000
  num_steps: int = 512
  gamma_min: float = -4.0
  gamma_max: float = -1.0
  divergence: str = "kl-bwd"

  def __post_init__(self):
    super().__post_init__()
    rounds.check_divergence(self.divergence, DIVERGENCES)
    rounds.check_round(self.update_teacher_every)
    Whole(1).check("objective.num_steps", self.num_steps)


def make(*, model: DiT, process: Uniform, optimizers: Optimizers, **options: Any) -> Objective:
  """Build distillation of a Duo teacher in rounds.

  Args:
    model: a time-conditioned network.
    process: the teacher's; samplers use its schedule, the loss that of the Gaussian window.
    optimizers: "student".
    **options: fields of `Options`.

  Returns:
    An objective with trees "teacher" and "student".

  Raises:
    InputError: the network is not time-conditioned, or an option does not fit.

  Reference: Duo, arXiv 2506.10892, section 5 and algorithm 1.
  """
  chosen = Options.of(options)
  check_class("model.name", model, NETWORK, "a denoiser is distilled")
  check_time_conditioning(model)
  duality = GaussianDuality(
    vocab_size=process.vocab_size, gamma_min=chosen.gamma_min, gamma_max=chosen.gamma_max
  )
  chunk = positions_per_chunk(chosen.chunk, model.config.length, process.vocab_size)
  setting = Setting(model=model, process=duality.process, chunk=chunk)

  def step(state, batch):
    every = chosen.update_teacher_every
    delta = step_size(state.step, every=every, num_steps=chosen.num_steps)
    state = rounds.refresh_teacher(state, every)
    total = functools.partial(
      loss,
      setting=setting,
      duality=duality,
      teacher=state.trees["teacher"],
      delta=delta,
      divergence=chosen.divergence,
    )
    batch, tx = counted(batch), optimizers["student"]
    state, metrics, _ = update(state, "student", total, batch, tx, **chosen.updates)
    return state.replace(step=state.step + 1), metrics

  return Objective(
    init_from_teacher("DCD", ("student",), optimizers, chosen), step, output="student"
  )


def step_size(step: Int[Array, ""], *, every: int, num_steps: int) -> Float[Array, ""]:
  """Return δ = 2ⁿ/T with n = ⌊step/every⌋, at most 1."""
  return rounds.doubled(step, every, num_steps) / num_steps
