# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation (IDLM) of masked diffusion teachers into few-step students.

Three trees of one network, all started from the teacher. The fake learns to denoise what the
student generates; the student moves to where the teacher's likelihood exceeds the fake's:

  L(θ) = L(teacher, p_θ) − min_f L(f, p_θ)  =  KL between path measures  ≥  KL(p_θ ‖ p_data).

The student sees really corrupted data at t_gen and predicts p, a distribution per position. The
loss state z is drawn from p, corrupted to time t, and no gradient passes through that draw: it
reaches the student through p alone, where the gradient on its logits is

  −(1/t) p (a − ⟨p, a⟩),   a = log p_teacher(· | z) − log p_fake(· | z),

at positions masked in both states and 0 elsewhere.

Reference: IDLM, arXiv 2602.19066, Algorithm 1 and Theorem 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from dlm_jax import draw
from dlm_jax.arrays import Metrics, Params
from dlm_jax.models import DiT
from dlm_jax.objectives.state import (
  Batch,
  Objective,
  make_state,
  split_each,
  stratified_times,
  update,
)
from dlm_jax.process import Absorbing

TIME_COUPLINGS = ("same_order", "permuted")

TRAINED = ("fake", "student")  # trees with an optimiser


def couple_times(batch: Batch, *, coupling: str, eps: float = 1e-3) -> Batch:
  """Add the student's input time "t_gen" to a global batch that holds the loss time "t".

  "same_order" gives sequence i the same stratum for both, so |t_gen − t| < 1/B: what the released
  code does. "permuted" shuffles the strata, the independent draws that the paper's text describes.
  """
  rng_B, rng_time_B, rng_order_B = split_each(batch["rng"], 3)
  t_gen_B = stratified_times(rng_time_B, eps)
  if coupling == "permuted":
    t_gen_B = jax.random.permutation(rng_order_B[0], t_gen_B)
  return {**batch, "rng": rng_B, "t_gen": t_gen_B}


class Sample(NamedTuple):
  """What one run of the student leaves for the losses.

  Attributes:
    x_gen: its input, really corrupted data.
    hidden: its trunk output; the gradient path to the student starts here.
    z: a prediction drawn per position, then corrupted to time t; constant.
  """

  x_gen: Int[Array, "B L"]
  hidden: Float[Array, "B L D"]
  z: Int[Array, "B L"]


def rollout(
  params: Params,
  batch: Batch,
  *,
  model: DiT,
  process: Absorbing,
  rngs: tuple[Key[Array, "B"], Key[Array, "B"], Key[Array, "B"]],
  dropout_B: Key[Array, "B"] | None,
  chunk: int | None,
) -> Sample:
  """Run the student once on corrupted data and draw the loss state from its prediction.

  Args:
    params: the student's.
    batch: with "tokens", "t" and "t_gen".
    model: the network.
    process: the forward process.
    rngs: keys for the student's input, for the draw from its prediction, for the loss state.
    dropout_B: keys for dropout in the student; None for evaluation.
    chunk: see `make`.
  """
  rng_gen_B, rng_token_B, rng_z_B = rngs
  x0_BL, valid_BL = batch["tokens"], batch.get("valid")
  x_gen_BL = jax.vmap(process.corrupt)(rng_gen_B, x0_BL, batch["t_gen"])
  if valid_BL is not None:
    x_gen_BL = jnp.where(valid_BL, x_gen_BL, x0_BL)
  sigma_B = process.schedule.sigma(batch["t_gen"])
  hidden_BLD = model.apply({"params": params}, x_gen_BL, sigma_B, dropout_B, method="trunk")

  length = x0_BL.shape[1]
  uniform_BL2 = jax.vmap(lambda rng: draw.uniforms(rng, (length,)))(rng_token_B)

  def draw_chunk(hidden, x_gen, uniform):
    probs = _probs(params, hidden, sigma_B, x_gen, model, process)
    return draw.categorical(probs, uniform)

  frozen_BLD = jax.lax.stop_gradient(hidden_BLD)
  predicted_BL = _map_positions(draw_chunk, (frozen_BLD, x_gen_BL, uniform_BL2), chunk)
  z_BL = jax.vmap(process.corrupt)(rng_z_B, predicted_BL, batch["t"])
  if valid_BL is not None:
    z_BL = jnp.where(valid_BL, z_BL, x0_BL)
  return Sample(x_gen_BL, hidden_BLD, jax.lax.stop_gradient(z_BL))


def fake_loss(
  params: Params, batch: Batch, *, model: DiT, process: Absorbing, student: Params,
  chunk: int | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:  # fmt: skip
  """Return `cross_entropy` of the fake, with dropout, on samples of the student, without."""
  *rngs, dropout_B = split_each(batch["rng"], 4)
  shared = {"model": model, "process": process, "chunk": chunk}
  sample = rollout(student, batch, rngs=tuple(rngs), dropout_B=None, **shared)
  value = cross_entropy(params, sample, batch, student=student, dropout_B=dropout_B, **shared)
  return value, ({}, None)


def student_loss(
  params: Params, batch: Batch, *, model: DiT, process: Absorbing, teacher: Params, fake: Params,
  chunk: int | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:  # fmt: skip
  """Return the `gap` on samples of the student, which alone runs with dropout."""
  *rngs, dropout_B = split_each(batch["rng"], 4)
  shared = {"model": model, "process": process, "chunk": chunk}
  sample = rollout(params, batch, rngs=tuple(rngs), dropout_B=dropout_B, **shared)
  value, metrics = gap(params, sample, batch, teacher=teacher, fake=fake, **shared)
  return value, (metrics, None)


def cross_entropy(
  params: Params, sample: Sample, batch: Batch, *, model: DiT, process: Absorbing, student: Params,
  dropout_B: Key[Array, "B"] | None = None, chunk: int | None = None,
) -> Float[Array, ""]:  # fmt: skip
  """Return the teacher's own training loss on a sample: −(1/t) Σ_masked ⟨p, log f⟩.

  Nats per sequence, mean over the batch; differentiate with respect to `params`, the fake's.
  """
  sigma_gen_B, sigma_B = map(process.schedule.sigma, (batch["t_gen"], batch["t"]))
  fake_BLD = model.apply({"params": params}, sample.z, sigma_B, dropout_B, method="trunk")

  def nll_chunk(hidden, fake, x_gen, z):
    p = _probs(student, hidden, sigma_gen_B, x_gen, model, process)
    log_fake = _log_x0(params, fake, sigma_B, z, model, process)
    return jax.vmap(process.nll_soft)(log_fake, z, p, batch["t"])

  arrays = (sample.hidden, fake_BLD, sample.x_gen, sample.z)
  return _per_sequence(_map_positions(nll_chunk, arrays, chunk), batch)


def gap(
  params: Params, sample: Sample, batch: Batch, *, model: DiT, process: Absorbing,
  teacher: Params, fake: Params, chunk: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:  # fmt: skip
  """Return L(teacher, p) − L(fake, p) on a sample, in nats per sequence, mean over the batch.

  The gradient with respect to `params`, the student's, flows through p: through `sample.hidden`
  and the head. Metrics: entropy of the student's predictions, and the advantage, the root mean
  square under p of a − ⟨p, a⟩, both on doubly masked positions (nats).
  """
  x_gen_BL, hidden_BLD, z_BL = sample
  sigma_gen_B, sigma_B = map(process.schedule.sigma, (batch["t_gen"], batch["t"]))
  teacher_BLD, fake_BLD = (
    model.apply({"params": tree}, z_BL, sigma_B, method="trunk") for tree in (teacher, fake)
  )

  def gap_chunk(hidden, teacher_hidden, fake_hidden, x_gen, z):
    p = _probs(params, hidden, sigma_gen_B, x_gen, model, process)
    log_teacher = _log_x0(teacher, teacher_hidden, sigma_B, z, model, process)
    log_fake = _log_x0(fake, fake_hidden, sigma_B, z, model, process)
    nll_soft = jax.vmap(process.nll_soft)
    gap = nll_soft(log_teacher, z, p, batch["t"]) - nll_soft(log_fake, z, p, batch["t"])
    p, advantage = jax.lax.stop_gradient((p, log_teacher - log_fake))
    mean = jnp.sum(p * advantage, -1)
    variance = jnp.maximum(jnp.sum(p * advantage**2, -1) - mean**2, 0)
    return gap, variance, -jnp.sum(jax.scipy.special.xlogy(p, p), -1)

  arrays = (hidden_BLD, teacher_BLD, fake_BLD, x_gen_BL, z_BL)
  gap_BL, variance_BL, entropy_BL = _map_positions(gap_chunk, arrays, chunk)
  both_BL = (x_gen_BL == process.mask_id) & (z_BL == process.mask_id)
  mean = lambda x: jnp.sum(x * both_BL) / jnp.maximum(both_BL.sum(), 1)  # noqa: E731
  metrics = {"advantage": jnp.sqrt(mean(variance_BL)), "entropy": mean(entropy_BL)}
  return _per_sequence(gap_BL, batch), metrics


def make(
  *,
  model: DiT,
  process: Absorbing,
  optimizers: dict[str, optax.GradientTransformation],
  time_coupling: str = "same_order",
  accumulate: int = 1,
  ema_decay: float | None = 0.9999,
  chunk: int | None = None,
) -> Objective:
  """Build alternating updates, fake first, each on its own fresh batch.

  Args:
    model: network shared by the three trees.
    process: the teacher's forward process.
    optimizers: "student" and "fake".
    time_coupling: "same_order" or "permuted", see `couple_times`.
    accumulate: micro-batches per update.
    ema_decay: of student and fake; None keeps no average.
    chunk: positions whose [B, chunk, V] logits are alive at a time, recomputed in the backward
      pass; must divide L. None keeps all.

  Returns:
    An objective with trees "teacher" (frozen), "fake" and "student". Its step takes a pair of
    batches (for the fake, for the student); a single batch serves both.

  Reference: IDLM, arXiv 2602.19066, Algorithm 1.
  """
  if time_coupling not in TIME_COUPLINGS:
    raise ValueError(
      f"objective.time_coupling={time_coupling!r} is unknown; use {' or '.join(TIME_COUPLINGS)}."
    )
  if not isinstance(model, DiT):
    raise ValueError("model.name must be dit: a denoiser is distilled.")
  if chunk and model.config.length % chunk:
    raise ValueError(f"chunk={chunk} does not divide the sequence length {model.config.length}.")
  shared = {"model": model, "process": process, "chunk": chunk}
  couple = functools.partial(couple_times, coupling=time_coupling)
  settings = {"accumulate": accumulate, "decay": ema_decay}

  def init(rng, teacher_params=None):
    if teacher_params is None:
      raise ValueError("IDLM starts from a teacher; give teacher_params (config: teacher.path).")
    del rng
    trees = dict.fromkeys(("teacher", "fake", "student"), teacher_params)
    return make_state(trees, optimizers, ("fake", "student") if ema_decay else ())

  def step(state, batch):
    fake_batch, student_batch = batch if isinstance(batch, tuple) else (batch, batch)
    loss = functools.partial(fake_loss, student=state.trees["student"], **shared)
    state, fake_metrics, _ = update(
      state, "fake", loss, couple(fake_batch), optimizers["fake"], **settings
    )
    loss = functools.partial(
      student_loss, teacher=state.trees["teacher"], fake=state.trees["fake"], **shared
    )
    state, student_metrics, _ = update(
      state, "student", loss, couple(student_batch), optimizers["student"], **settings
    )
    return state.replace(step=state.step + 1), {**fake_metrics, **student_metrics}

  return Objective(init, step, output="student", batches=2)


def _log_x0(params, hidden, sigma_B, xt, model, process):
  logits = model.apply({"params": params}, hidden, sigma_B, method="head")
  return jax.vmap(process.log_x0)(logits, xt)


def _probs(params, hidden, sigma_B, x_gen, model, process):
  return jnp.exp(_log_x0(params, hidden, sigma_B, x_gen, model, process))


def _per_sequence(loss_BL, batch):
  """Return L times the mean over valid tokens, averaged over sequences."""
  if "valid" not in batch:
    return loss_BL.sum(1).mean()
  valid_BL = batch["valid"]
  share_B = (loss_BL * valid_BL).sum(1) / jnp.maximum(valid_BL.sum(1), 1)
  return loss_BL.shape[1] * share_B.mean()


def _map_positions(function, arrays, chunk):
  """Apply a function of [B, L, …] arrays in chunks of positions, recomputed in backward."""
  length = arrays[0].shape[1]
  if chunk is None or chunk >= length:
    return function(*arrays)
  if length % chunk:
    raise ValueError(f"objective.chunk={chunk} does not divide the sequence length {length}.")

  def cut(x):
    return jnp.swapaxes(x.reshape(x.shape[0], length // chunk, chunk, *x.shape[2:]), 0, 1)

  def join(x):
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], length, *x.shape[3:])

  body = jax.checkpoint(lambda pieces: function(*pieces))
  return jax.tree.map(join, jax.lax.map(body, jax.tree.map(cut, arrays)))
