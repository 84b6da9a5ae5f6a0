# SPDX-License-Identifier: Apache-2.0
"""Discrete consistency distillation (DCD): steps of growing size along Gaussian trajectories.

One noise ξ per sequence gives two points of a deterministic trajectory,
z_t = argmax(α̃_t x₀ + σ̃_t ξ) and z_s with s = t − δ. The student at z_t learns what its teacher
says at z_s. δ doubles every round, when the student's raw parameters also become the teacher.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from dlm_jax.arrays import Metrics, Params
from dlm_jax.models import DiT
from dlm_jax.objectives import rounds
from dlm_jax.objectives.batch import Batch, split_each, token_mean
from dlm_jax.objectives.positions import map_positions, positions_per_chunk
from dlm_jax.objectives.state import Objective, make_state, update
from dlm_jax.process import GaussianDuality, Uniform

TRAINED = ("student",)  # trees with an optimiser
DIVERGENCES = ("kl-bwd", "kl-fwd")


class Pair(NamedTuple):
  """Two states of one trajectory and their times, s = t − δ."""

  zt: Int[Array, "B L"]
  zs: Int[Array, "B L"]
  t: Float[Array, "B"]
  s: Float[Array, "B"]


def pair_times(
  t_B: Float[Array, "B"], delta: Float[Array, ""] | float
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
  """Return t + δ clipped to [0, 1], and δ less: the published order."""
  t_B = jnp.clip(t_B + delta, 0.0, 1.0)
  return t_B, t_B - delta


def trajectory(
  batch: Batch,
  rng_B: Key[Array, "B"],
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
  model: DiT,
  process: Uniform,
  divergence: str = "kl-bwd",
  dropout_B: Key[Array, "B"] | None = None,
  chunk: int | None = None,
) -> Float[Array, "B L"]:
  """Return the divergence of the student at (z_t, t) from the teacher at (z_s, s), in nats.

  Args:
    params: the student's; the teacher is constant.
    pair: the states.
    teacher: its parameters.
    model: the network of both.
    process: its schedule gives the σ that the network is told.
    divergence: "kl-bwd", KL(student ‖ teacher), or "kl-fwd", the reverse.
    dropout_B: keys of dropout in the student.
    chunk: see `make`.
  """
  sigma_t_B, sigma_s_B = map(process.schedule.sigma, (pair.t, pair.s))
  student_BLD = model.apply({"params": params}, pair.zt, sigma_t_B, dropout_B, method="trunk")
  teacher_BLD = model.apply({"params": teacher}, pair.zs, sigma_s_B, method="trunk")

  def compare(student_BKD, teacher_BKD, zt_BK, zs_BK):
    logits = model.apply({"params": params}, student_BKD, sigma_t_B, method="head")
    log_student = jax.vmap(process.log_x0)(logits, zt_BK)
    logits = model.apply({"params": teacher}, teacher_BKD, sigma_s_B, method="head")
    log_teacher = jax.lax.stop_gradient(jax.vmap(process.log_x0)(logits, zs_BK))
    return rounds.divergence(log_student, log_teacher, divergence)

  return map_positions(compare, (student_BLD, teacher_BLD, pair.zt, pair.zs), chunk)


def loss(
  params: Params,
  batch: Batch,
  *,
  model: DiT,
  duality: GaussianDuality,
  teacher: Params,
  delta: Float[Array, ""] | float,
  divergence: str = "kl-bwd",
  chunk: int | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the mean of `consistency` over valid tokens, in nats.

  Dropout in the student only. The published code copies the teacher in training mode, so that its
  dropout stays on.
  """
  rng_noise_B, rng_dropout_B = split_each(batch["rng"], 2)
  pair = trajectory(batch, rng_noise_B, delta, duality=duality, chunk=chunk)
  loss_BL = consistency(
    params,
    pair,
    teacher=teacher,
    model=model,
    process=duality.process,
    divergence=divergence,
    dropout_B=rng_dropout_B,
    chunk=chunk,
  )
  return token_mean(loss_BL, batch), ({"changed": jnp.mean(pair.zt != pair.zs)}, None)


def make(
  *,
  model: DiT,
  process: Uniform,
  optimizers: dict[str, optax.GradientTransformation],
  update_teacher_every: int = 10_000,
  num_steps: int = 512,
  gamma_min: float = -4.0,
  gamma_max: float = -1.0,
  divergence: str = "kl-bwd",
  accumulate: int = 1,
  ema_decay: float | None = 0.999,
  chunk: int | None = None,
) -> Objective:
  """Build distillation of a Duo teacher in rounds.

  Args:
    model: a time-conditioned network.
    process: the teacher's; samplers use its schedule, the loss that of the Gaussian window.
    optimizers: "student".
    update_teacher_every: steps per round. At a round's first step the student's raw parameters
      become the teacher; the run's length sets the number of rounds (published: 5).
    num_steps: T; δ = 2ⁿ/T in round n, at most 1.
    gamma_min, gamma_max: see `GaussianDuality`.
    divergence: "kl-bwd" or "kl-fwd", see `consistency`.
    accumulate: micro-batches per update.
    ema_decay: of the student; None keeps no average.
    chunk: positions whose [B, chunk, V] arrays are alive at a time, recomputed in the backward
      pass; must divide L. None takes the most that stay below 2²² entries per sequence.

  Returns:
    An objective with trees "teacher" and "student".

  Raises:
    ValueError: the network is not time-conditioned, or an option does not fit.

  Reference: Duo, arXiv 2506.10892, section 5 and algorithm 1.
  """
  if not isinstance(model, DiT):
    raise ValueError("model.name must be dit: a denoiser is distilled.")
  if not model.config.time_conditioning:
    raise ValueError("a uniform process needs model.time_conditioning=True.")
  rounds.check_divergence(divergence, DIVERGENCES)
  rounds.check_round(update_teacher_every)
  duality = GaussianDuality(vocab_size=process.vocab_size, gamma_min=gamma_min, gamma_max=gamma_max)
  chunk = positions_per_chunk(chunk, model.config.length, process.vocab_size)
  shared = {"model": model, "duality": duality, "divergence": divergence, "chunk": chunk}

  def init(rng, teacher_params=None):
    if teacher_params is None:
      raise ValueError("DCD starts from a teacher; give teacher_params (config: teacher.path).")
    del rng
    trees = dict.fromkeys(("teacher", "student"), teacher_params)
    return make_state(trees, optimizers, ("student",) if ema_decay else ())

  def step(state, batch):
    delta = step_size(state.step, every=update_teacher_every, num_steps=num_steps)
    state = rounds.refresh_teacher(state, update_teacher_every)
    student_loss = functools.partial(loss, teacher=state.trees["teacher"], delta=delta, **shared)
    state, metrics, _ = update(
      state,
      "student",
      student_loss,
      batch,
      optimizers["student"],
      accumulate=accumulate,
      decay=ema_decay,
    )
    return state.replace(step=state.step + 1), metrics

  return Objective(init, step, output="student")


def step_size(step: Int[Array, ""], *, every: int, num_steps: int) -> Float[Array, ""]:
  """Return δ = 2ⁿ/T with n = ⌊step/every⌋, at most 1."""
  return rounds.doubled(step, every, num_steps) / num_steps
