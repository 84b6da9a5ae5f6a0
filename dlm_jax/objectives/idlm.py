# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation (IDLM) of discrete diffusion teachers into few-step students.

Three trees of one network, all started from the teacher. The fake learns to denoise what the
student generates; the student moves to where the teacher's likelihood exceeds the fake's:

  L(θ) = L(teacher, p_θ) − min_f L(f, p_θ)  =  KL between path measures  ≥  KL(p_θ ‖ p_data).

The student sees really corrupted data at t_gen and predicts p, a distribution per position. What
follows depends on the process.

Absorbing (MDLM and SEDD teachers): the loss state z is drawn from p, corrupted to time t, and no
gradient passes through that draw: it reaches the student through p alone, where the gradient on
its logits is, for MDLM,

  −(1/t) p (a − ⟨p, a⟩),   a = log p_teacher(· | z) − log p_fake(· | z),

at positions masked in both states and 0 elsewhere.

Uniform (Duo teachers): the state is Gaussian, w = α̃ p + σ̃ ξ, with hard token z = argmax w. Teacher
and fake read the soft input w/τ, so gradients reach the student by two paths: through p in the
loss and through w in the networks' inputs. Training without the second one is reported to diverge.

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
from dlm_jax.models.dit import head_params
from dlm_jax.objectives.batch import Batch, split_each, stratified_times, valid_tokens
from dlm_jax.objectives.gaussian_states import Relaxation, embed_data, embed_predictions
from dlm_jax.objectives.positions import map_positions, positions_per_chunk, sum_positions
from dlm_jax.objectives.state import Objective, make_state, update
from dlm_jax.process import Absorbing, GaussianDuality, Uniform

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
    x_gen: its input, really corrupted data; of a soft input the argmax. A prompt's own tokens.
    hidden: its trunk output; the gradient path to the student starts here.
    z: a prediction drawn per position, then corrupted to time t; constant. None if the state is
      soft: it is made from the prediction where it is read.
    rng_noise: keys of a soft state's noise.
  """

  x_gen: Int[Array, "B L"]
  hidden: Float[Array, "B L D"]
  z: Int[Array, "B L"] | None
  rng_noise: Key[Array, "B"] | None = None


def rollout(
  params: Params,
  batch: Batch,
  *,
  model: DiT,
  process: Absorbing | Uniform,
  rngs: tuple[Key[Array, "B"], Key[Array, "B"], Key[Array, "B"]],
  dropout_B: Key[Array, "B"] | None,
  chunk: int | None,
  relaxation: Relaxation | None = None,
) -> Sample:
  """Run the student once on corrupted data and draw the loss state from its prediction.

  Args:
    params: the student's.
    batch: with "tokens", "t" and "t_gen".
    model: the network.
    process: the forward process; its schedule gives the times' α.
    rngs: keys for the student's input, for the draw from its prediction, for the loss state.
    dropout_B: keys for dropout in the student; None for evaluation.
    chunk: see `make`.
    relaxation: for a uniform process, how its states are made soft.
  """
  rng_gen_B, rng_token_B, rng_z_B = rngs
  x0_BL, valid_BL = batch["tokens"], batch.get("valid")
  if relaxation is not None:
    x_gen_BL, embedded_BLD = embed_data(
      params, x0_BL, rng_gen_B, batch["t_gen"], valid_tokens(batch), model=model,
      relaxation=relaxation, chunk=chunk,
    )  # fmt: skip
    sigma_B = process.schedule.sigma(batch["t_gen"])
    hidden_BLD = model.apply({"params": params}, embedded_BLD, sigma_B, dropout_B, method="body")
    return Sample(x_gen_BL, hidden_BLD, None, rng_z_B)
  x_gen_BL = jax.vmap(process.corrupt)(rng_gen_B, x0_BL, batch["t_gen"])
  if valid_BL is not None:
    x_gen_BL = jnp.where(valid_BL, x_gen_BL, x0_BL)
  sigma_B = process.schedule.sigma(batch["t_gen"])
  hidden_BLD = model.apply({"params": params}, x_gen_BL, sigma_B, dropout_B, method="trunk")

  length = x0_BL.shape[1]
  uniform_BL2 = jax.vmap(lambda rng: draw.uniforms(rng, (length,)))(rng_token_B)

  def draw_chunk(hidden, x_gen, uniform):
    logits = model.apply({"params": params}, hidden, sigma_B, method="head")
    token = draw.softmax(process.clean_logits(logits)).draw(uniform)
    return jnp.where(x_gen == process.mask_id, token, x_gen)

  frozen_BLD = jax.lax.stop_gradient(hidden_BLD)
  predicted_BL = map_positions(draw_chunk, (frozen_BLD, x_gen_BL, uniform_BL2), chunk)
  z_BL = jax.vmap(process.corrupt)(rng_z_B, predicted_BL, batch["t"])
  if valid_BL is not None:
    z_BL = jnp.where(valid_BL, z_BL, x0_BL)
  return Sample(x_gen_BL, hidden_BLD, jax.lax.stop_gradient(z_BL))


def fake_loss(
  params: Params, batch: Batch, *, model: DiT, process: Absorbing | Uniform, student: Params,
  chunk: int | None = None, relaxation: Relaxation | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:  # fmt: skip
  """Return `cross_entropy` of the fake, with dropout, on samples of the student, without."""
  *rngs, dropout_B = split_each(batch["rng"], 4)
  shared = {"model": model, "process": process, "chunk": chunk, "relaxation": relaxation}
  sample = rollout(student, batch, rngs=tuple(rngs), dropout_B=None, **shared)
  value = cross_entropy(params, sample, batch, student=student, dropout_B=dropout_B, **shared)
  return value, ({}, None)


def student_loss(
  params: Params, batch: Batch, *, model: DiT, process: Absorbing | Uniform, teacher: Params,
  fake: Params, chunk: int | None = None, relaxation: Relaxation | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:  # fmt: skip
  """Return the `gap` on samples of the student, which alone runs with dropout."""
  *rngs, dropout_B = split_each(batch["rng"], 4)
  shared = {"model": model, "process": process, "chunk": chunk, "relaxation": relaxation}
  sample = rollout(params, batch, rngs=tuple(rngs), dropout_B=dropout_B, **shared)
  value, metrics = gap(params, sample, batch, teacher=teacher, fake=fake, **shared)
  return value, (metrics, None)


def _read(params, sample, batch, trees, dropouts, *, model, process, chunk, relaxation):
  """Return the loss state z and the trunk output of every tree that reads it."""
  sigma_gen_B, sigma_B = map(process.schedule.sigma, (batch["t_gen"], batch["t"]))
  if relaxation is None:
    z_BL, inputs, method = sample.z, (sample.z,) * len(trees), "trunk"
  else:
    z_BL, inputs = embed_predictions(
      lambda hidden: _logits(params, hidden, sigma_gen_B, model), (sample.hidden,), trees,
      sample.x_gen, sample.rng_noise, batch["t"], valid_tokens(batch), model=model,
      relaxation=relaxation, chunk=chunk,
    )  # fmt: skip
    method = "body"
  hidden = tuple(
    model.apply({"params": tree}, x, sigma_B, dropout_B, method=method)
    for tree, x, dropout_B in zip(trees, inputs, dropouts, strict=True)
  )
  return z_BL, hidden


def cross_entropy(
  params: Params, sample: Sample, batch: Batch, *, model: DiT, process: Absorbing | Uniform,
  student: Params, dropout_B: Key[Array, "B"] | None = None, chunk: int | None = None,
  relaxation: Relaxation | None = None,
) -> Float[Array, ""]:  # fmt: skip
  """Return the teacher's own training loss on a sample; for MDLM −(1/t) Σ_masked ⟨p, log f⟩.

  Nats per sequence, mean over the batch; differentiate with respect to `params`, the fake's.
  """
  sigma_gen_B, sigma_B = map(process.schedule.sigma, (batch["t_gen"], batch["t"]))
  z_BL, (fake_BLD,) = _read(
    student, sample, batch, (params,), (dropout_B,), model=model, process=process, chunk=chunk,
    relaxation=relaxation,
  )  # fmt: skip

  def nll(head, fake, hidden, x_gen, z):
    predicted = _logits(student, hidden, sigma_gen_B, model)
    logits = _logits(head, fake, sigma_B, model)
    return jax.vmap(process.nll_predicted)(logits, z, predicted, x_gen, batch["t"]), ()

  fixed = (sample.hidden, sample.x_gen, z_BL)
  weights_BL = _weights(batch, z_BL.shape)
  return sum_positions(nll, head_params(params), (fake_BLD,), fixed, weights_BL, chunk)[0]


def gap(
  params: Params, sample: Sample, batch: Batch, *, model: DiT, process: Absorbing | Uniform,
  teacher: Params, fake: Params, chunk: int | None = None, relaxation: Relaxation | None = None,
) -> tuple[Float[Array, ""], Metrics]:  # fmt: skip
  """Return L(teacher, p) − L(fake, p) on a sample, in nats per sequence, mean over the batch.

  The gradient with respect to `params`, the student's, flows through p: through `sample.hidden`
  and the head, and of a soft state through the inputs of teacher and fake. Metrics, over the
  positions that carry loss: entropy of the student's predictions, and the advantage, the root mean
  square under p of a − ⟨p, a⟩ (nats).
  """
  sigma_gen_B, sigma_B = map(process.schedule.sigma, (batch["t_gen"], batch["t"]))
  z_BL, (teacher_BLD, fake_BLD) = _read(
    params, sample, batch, (teacher, fake), (None, None), model=model, process=process,
    chunk=chunk, relaxation=relaxation,
  )  # fmt: skip

  def difference(head, hidden, teacher_hidden, fake_hidden, x_gen, z):
    predicted = _logits(head, hidden, sigma_gen_B, model)
    of_teacher = _logits(teacher, teacher_hidden, sigma_B, model)
    of_fake = _logits(fake, fake_hidden, sigma_B, model)
    nll = lambda logits: jax.vmap(process.nll_predicted)(  # noqa: E731
      logits, z, predicted, x_gen, batch["t"]
    )
    gap = nll(of_teacher) - nll(of_fake)
    p = jnp.exp(jax.vmap(process.log_x0)(predicted, x_gen))
    log_teacher, log_fake = (jax.vmap(process.log_estimate)(x, z) for x in (of_teacher, of_fake))
    advantage, entropy = log_teacher - log_fake, -jnp.sum(jax.scipy.special.xlogy(p, p), -1)
    mean = jnp.sum(p * advantage, -1)
    variance = jnp.maximum(jnp.sum(p * advantage**2, -1) - mean**2, 0)
    return gap, (variance, entropy)

  # Only a soft state carries gradients through the trunks of teacher and fake.
  arrays = (sample.hidden, teacher_BLD, fake_BLD, sample.x_gen, z_BL)
  moving = 1 if relaxation is None else 3
  value, (variance_BL, entropy_BL) = sum_positions(
    difference, head_params(params), arrays[:moving], arrays[moving:],
    _weights(batch, z_BL.shape), chunk,
  )  # fmt: skip
  if relaxation is None:
    counted_BL = (sample.x_gen == process.mask_id) & (z_BL == process.mask_id)
  else:
    counted_BL = valid_tokens(batch)
  mean = lambda x: jnp.sum(x * counted_BL) / jnp.maximum(counted_BL.sum(), 1)  # noqa: E731
  metrics = {"advantage": jnp.sqrt(mean(variance_BL)), "entropy": mean(entropy_BL)}
  return value, metrics


def make(
  *,
  model: DiT,
  process: Absorbing | Uniform,
  optimizers: dict[str, optax.GradientTransformation],
  time_coupling: str = "same_order",
  accumulate: int = 1,
  ema_decay: float | None = 0.9999,
  chunk: int | None = None,
  gamma_min: float = -3.55,
  gamma_max: float = -1.85,
  tau: float = 1e-3,
  path_gradient: bool = True,
) -> Objective:
  """Build alternating updates, fake first, each on its own fresh batch.

  Args:
    model: network shared by the three trees.
    process: the teacher's forward process. With a uniform one, losses run in the time of the
      Gaussian window below, and only samplers use its own schedule.
    optimizers: "student" and "fake".
    time_coupling: "same_order" or "permuted", see `couple_times`.
    accumulate: micro-batches per update.
    ema_decay: of student and fake; None keeps no average.
    chunk: positions whose [B, chunk, V] logits are alive at a time, recomputed in the backward
      pass; must divide L. None keeps all, or for a uniform process the most that stay below
      2²² entries.
    gamma_min, gamma_max, tau, path_gradient: of a uniform process; see `GaussianDuality` and
      `Relaxation`. The defaults are the released scripts'.

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
  relaxation = None
  if isinstance(process, Uniform):
    if not model.config.time_conditioning:
      raise ValueError("a uniform process needs model.time_conditioning=True.")
    duality = GaussianDuality(
      vocab_size=process.vocab_size, gamma_min=gamma_min, gamma_max=gamma_max
    )
    relaxation = Relaxation(
      duality=duality, tau=tau, few=duality.enough(tau), path_gradient=path_gradient
    )
    process = relaxation.process
    chunk = positions_per_chunk(chunk, model.config.length, process.vocab_size)
  if chunk and model.config.length % chunk:
    raise ValueError(f"chunk={chunk} does not divide the sequence length {model.config.length}.")
  shared = {"model": model, "process": process, "chunk": chunk, "relaxation": relaxation}
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


def _logits(params, hidden, sigma_B, model):
  return model.apply({"params": params}, hidden, sigma_B, method="head")


def _weights(batch, shape):
  """Return weights of positions: L times the mean over valid tokens, averaged over sequences."""
  if "valid" not in batch:
    return jnp.full(shape, 1 / shape[0], jnp.float32)
  valid_BL = batch["valid"]
  count_B1 = jnp.maximum(valid_BL.sum(1, keepdims=True), 1)
  return valid_BL * (shape[1] / shape[0] / count_B1)
