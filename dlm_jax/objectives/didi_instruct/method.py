# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct: masked teachers distilled on an integral KL divergence, with a discriminator.

The student descends ∫ ω(t) KL(q_ν(·, t) ‖ q_θ(·, t)) dt, the divergence of its own noised samples
from real noised text. With the reward r(z, t) = log q_θ(z, t) − log q_ν(z, t), the gradient is

  −E[ω(t) r(z, t) ∇ log p_ν(x₀)],   x₀ ~ p_ν from masks, z = x₀ noised to t,

where r may be centred by any constant and carries no gradient. A discriminator of real (1) against
generated (0) noised text has the optimal logit r. The student writes x₀ in two steps, through a
state at a time t; coupled, the same t is the noise level of z.

One step: a rollout; an update of the discriminator on it; rewards from the updated discriminator,
normalised in groups; an update of the student, the gradient of whose rollout was kept.

What of the released code is left out: dropout in the student, and in the discriminator while it
rewards; a second run of the student for the gradient; its replacement of infinite gradients; and a
batch of one data row repeated G times, unless rows have prompts. The moving average is ramped up.

Reference: DiDi-Instruct, arXiv 2509.25035, algorithm 1.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dlm_jax.arrays import Metrics, Params
from dlm_jax.errors import InputError
from dlm_jax.models import Critic, Discriminator, DiT, discriminator
from dlm_jax.objectives.batch import Batch, fold_each, split_each, stratified_times, valid_tokens
from dlm_jax.objectives.didi_instruct.options import DiDiOptions
from dlm_jax.objectives.didi_instruct.rewards import (
  beta_times,
  masked_mean,
  normalise_groups,
  omega,
)
from dlm_jax.objectives.didi_instruct.rollout import Path, Terms, rollout, sample
from dlm_jax.objectives.positions import positions_per_chunk
from dlm_jax.objectives.state import (
  Objective,
  TrainState,
  apply_gradients,
  make_state,
  over_micro_batches,
  update,
)
from dlm_jax.process import Absorbing

TRAINED = ("discriminator", "student")  # trees with an optimiser


def share_prompts(batch: Batch, options: DiDiOptions) -> Batch:
  """Give all members of a group the row of the first, where rows have prompts or lengths.

  Rewards of different prompts would compare the prompts.
  """
  if "valid" not in batch:
    return batch
  first = lambda x: jnp.repeat(x[:: options.group_size], options.group_size, axis=0)  # noqa: E731
  return {**batch, "tokens": first(batch["tokens"]), "valid": first(batch["valid"])}


def draw_times(batch: Batch, options: DiDiOptions, process: Absorbing) -> Batch:
  """Add to a global batch the noise level "t", the intermediate time "t_mid" and "weight" ω(t).

  Strata are dealt out anew, so that a group's members have times of their own.
  """
  rng_B, rng_one_B, rng_two_B = split_each(batch["rng"], 3)

  repeats = options.group_size if options.shared_time else 1

  def times(rng_B):
    rng_u_B, rng_order_B = split_each(rng_B, 2)
    u_B = stratified_times(rng_u_B[::repeats], 0.0)
    u_B = jnp.repeat(jax.random.permutation(rng_order_B[0], u_B), repeats)
    t_B, density_B = beta_times(u_B, *options.time_beta)
    return jnp.clip(t_B, *options.time_clip), density_B

  t_B, density_B = times(rng_one_B)
  t_mid_B = t_B if options.coupled_time else times(rng_two_B)[0]
  weight_B = omega(t_B, process.schedule, options.omega, options.omega_clip)
  if options.importance_weight:
    weight_B = weight_B / density_B
  return {**batch, "rng": rng_B, "t": t_B, "t_mid": t_mid_B, "weight": weight_B}


def noised(batch: Batch, generated: Array, real: Array, process: Absorbing) -> Batch:
  """Add "fake" and "real", both sides masked to time t afresh, and what makes their means global.

  The weights make means over sequences of sums over masked positions into means over all masked
  positions of the global batch, however it is cut.
  """
  masks = []
  for tag, clean_BL in ((100, generated), (101, real)):
    noisy_BL = jax.vmap(process.corrupt)(fold_each(batch["rng"], tag), clean_BL, batch["t"])
    masks.append(jnp.where(valid_tokens(batch), noisy_BL, batch["tokens"]))
  size = batch["t"].shape[0]
  counts = [jnp.maximum(jnp.sum(x == process.mask_id), 1) for x in masks]
  weights = [jnp.full((size,), size / count) for count in counts]
  return {
    **batch,
    "fake": masks[0],
    "real": masks[1],
    "fake_weight": weights[0],
    "real_weight": weights[1],
  }


def discriminator_loss(
  params: Params,
  batch: Batch,
  *,
  model: Discriminator,
  spectral: Params,
  process: Absorbing,
  smoothing: float = 0.1,
) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:
  """Return the mean binary cross-entropy in nats over masked positions, real ones labelled 1.

  Each side counts half. Labels are smoothed to 1 − s and s. The extra output is the new spectral
  state, one power step on.
  """
  tokens = jnp.concatenate([batch["real"], batch["fake"]])
  sigma_B = process.schedule.sigma(batch["t"])
  keys = [fold_each(batch["rng"], tag) for tag in (200, 201)]
  logits, changed = model.apply(
    {"params": params, "spectral": spectral},
    tokens,
    jnp.concatenate([sigma_B, sigma_B]),
    jnp.concatenate(keys),
    advance=True,
    frozen=True,
    mutable=["spectral"],
  )
  halves = jnp.split(logits, 2)
  total, metrics = 0.0, {}
  for name, logits_BL, label in (
    ("real", halves[0], 1 - smoothing),
    ("fake", halves[1], smoothing),
  ):
    masked_BL = batch[name] == process.mask_id
    nll_BL = jnp.where(masked_BL, jax.nn.softplus(logits_BL) - label * logits_BL, 0.0)
    total += 0.5 * jnp.mean(batch[f"{name}_weight"] * nll_BL.sum(1))
    right_BL = masked_BL & ((logits_BL > 0) == (name == "real"))
    metrics[f"{name}_accuracy"] = jnp.mean(batch[f"{name}_weight"] * right_BL.sum(1))
  return total, (metrics, changed["spectral"])


def reward(
  critic: Callable[..., Array], batch: Batch, process: Absorbing, clip: float = 8.0
) -> Float[Array, "B"]:
  """Return the estimate of log q_θ(z, t) − log q_ν(z, t) of every generated sequence."""
  logits_BL = critic(batch["fake"], process.schedule.sigma(batch["t"]))
  return masked_mean(logits_BL, batch["fake"] == process.mask_id, clip)


def policy_loss(terms: Terms, batch: Batch, options: DiDiOptions) -> tuple[Array, Metrics]:
  """Return the student's loss of a rollout whose batch holds "weight" and "advantage"."""
  policy = -jnp.mean(batch["weight"] * batch["advantage"] * terms.log_prob)
  scales = options.kl_scales if len(terms.divergences) == 2 else options.kl_scales[:1]
  divergence = sum(c * jnp.mean(x) for c, x in zip(scales, terms.divergences, strict=True))
  entropy = jnp.mean(terms.entropy)
  value = policy + options.kl_beta * divergence - options.entropy_beta * entropy
  metrics = {"policy": policy, "entropy": entropy}
  if options.kl_beta:
    metrics["teacher_kl"] = sum(map(jnp.mean, terms.divergences))
  return value, metrics


def student_loss(
  params: Params, batch: Batch, *, options: DiDiOptions, **shared
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return `policy_loss` of the rollout that the batch holds as "z" and "x0": for micro-batches."""
  terms, _ = rollout(params, batch, path=Path(batch["z"], batch["x0"]), **shared)
  value, metrics = policy_loss(terms, batch, options)
  return value, (metrics, None)


def make(
  *,
  model: DiT,
  process: Absorbing,
  optimizers: dict[str, optax.GradientTransformation],
  accumulate: int = 1,
  ema_decay: float | None = 0.999,
  chunk: int | None = None,
  **options: Any,
) -> Objective:
  """Build updates of a discriminator and a student, in this order, on one rollout.

  Args:
    model: network of teacher and student.
    process: absorbing.
    optimizers: "student" and "discriminator", each with its own clipping.
    accumulate: micro-batches per update. With one, the student runs once; with more, its rollout is
      drawn first and run again for its gradient, from the same keys: the same numbers.
    ema_decay: of the student; None keeps no average.
    chunk: positions whose [B, chunk, V] arrays are alive at a time, recomputed in the backward
      pass; must divide L. None takes the most that stay below 2²² entries per sequence.
    **options: fields of `DiDiOptions`.

  Returns:
    An objective with trees "teacher" (frozen), "student" and "discriminator", whose spectral state
    is `aux["discriminator"]`.

  Raises:
    ValueError: an option does not fit.

  Reference: DiDi-Instruct, arXiv 2509.25035, algorithm 1.
  """
  if not isinstance(model, DiT):
    raise ValueError("model.name must be dit: a denoiser is distilled.")
  if model.config.time_conditioning:
    raise ValueError("DiDi-Instruct distils masked teachers that are not told the time.")
  chunk = positions_per_chunk(chunk, model.config.length, process.vocab_size)
  settings = DiDiOptions(**options)
  layers = model.config.layers
  trained = settings.trained_layers if settings.trained_layers is not None else min(4, layers)
  if not 1 <= trained <= layers:
    raise ValueError(f"objective.trained_layers={trained} must be in [1, {layers}], model.layers.")
  judge = Discriminator(model.config, trained_layers=trained)
  frozen = _freeze(optimizers["discriminator"])
  method = _Method(
    model=model,
    judge=judge,
    process=process,
    settings=settings,
    accumulate=accumulate,
    decay=ema_decay,
    chunk=chunk,
    optimizers={**optimizers, "discriminator": frozen},
  )
  axes = judge.axes(jnp.zeros((1, model.config.length), jnp.int32), jnp.zeros((1,)))
  return Objective(
    method.init,
    method.step,
    output="student",
    check=method.check,
    axes=(axes, axes["upper"], axes["head"]),
    export=lambda state: {"beside": {"discriminator": method.critic(state)}},
  )


def _freeze(tx):
  """Return an optimiser of a discriminator that leaves what was trained before alone."""
  labels = dict.fromkeys(discriminator.FROZEN, "frozen")
  labels |= dict.fromkeys(discriminator.TRAINED, "trained")
  return optax.multi_transform(
    {"trained": tx, "frozen": optax.set_to_zero()},
    lambda params: {name: labels[name] for name in params},
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Method:
  """`init`, `step` and `check` of an objective, with what they share."""

  model: DiT
  judge: Discriminator
  process: Absorbing
  settings: DiDiOptions
  optimizers: dict[str, optax.GradientTransformation]
  accumulate: int
  decay: float | None
  chunk: int | None

  def init(self, rng, teacher_params=None):
    if teacher_params is None:
      raise ValueError("DiDi-Instruct starts from a teacher; give teacher_params (teacher.path).")
    tokens = jnp.zeros((1, self.model.config.length), jnp.int32)
    fresh = self.judge.init(rng, tokens, jnp.zeros((1,)))
    trees = dict.fromkeys(("teacher", "student"), teacher_params)
    trees["discriminator"] = discriminator.from_trunk(
      self.judge, teacher_params, fresh["params"]["head"]
    )
    state = make_state(trees, self.optimizers, ("student",) if self.decay else ())
    return state.replace(aux={"discriminator": fresh["spectral"]})

  def step(self, state, batch):
    batch = draw_times(share_prompts(batch, self.settings), self.settings, self.process)
    roll = functools.partial(rollout, **self._rollout(state))
    student = state.trees["student"]
    if self.accumulate == 1:
      run = functools.partial(roll, batch=batch)
      terms, pull_back, path = jax.vjp(run, student, has_aux=True)
    else:
      path = self._in_parts(lambda b: roll(student, b)[1], batch)
    batch = noised(batch, path.x0, self._real(state, batch), self.process)
    state, metrics = self._update_discriminator(state, batch)

    critic = self.critic(state)
    clip, size = self.settings.reward_clip, self.settings.group_size
    reward_B = self._in_parts(lambda b: reward(critic, b, self.process, clip), batch)
    seen_B = jnp.any(batch["fake"] == self.process.mask_id, axis=1)
    advantage_B = normalise_groups(reward_B, size, self.settings.advantage_clip, counted_B=seen_B)
    batch = {**batch, "z": path.z, "x0": path.x0, "advantage": advantage_B}
    if self.accumulate == 1:
      value = functools.partial(policy_loss, batch=batch, options=self.settings)
      (value, student_metrics), slope = jax.value_and_grad(value, has_aux=True)(terms)
      after, student_metrics = apply_gradients(
        state,
        "student",
        pull_back(slope)[0],
        self.optimizers["student"],
        decay=self.decay,
        metrics={"loss": value, **student_metrics},
      )
    else:
      loss = functools.partial(student_loss, options=self.settings, **self._rollout(state))
      after, student_metrics, _ = update(
        state,
        "student",
        loss,
        batch,
        self.optimizers["student"],
        accumulate=self.accumulate,
        decay=self.decay,
      )
    if self.settings.warmup:
      wait = state.step < self.settings.warmup
      after = jax.tree.map(lambda old, new: jnp.where(wait, old, new), state, after)
    scores = {"student/reward": reward_B.mean(), "student/reward_std": reward_B.std()}
    return after.replace(step=state.step + 1), {**metrics, **student_metrics, **scores}

  def critic(self, state: TrainState) -> Critic:
    """Return the discriminator."""
    return Critic(
      model=self.judge, params=state.trees["discriminator"], spectral=state.aux["discriminator"]
    )

  def check(self, state: TrainState) -> None:
    """Raise InputError unless student and discriminator start from the teacher."""
    trunk = discriminator.to_trunk(self.judge, state.trees["discriminator"])
    teacher = state.trees["teacher"]
    pairs = ((teacher, state.trees["student"]), ({name: teacher[name] for name in trunk}, trunk))
    if not all(bool(jax.tree.all(jax.tree.map(jnp.array_equal, *pair))) for pair in pairs):
      raise InputError("DiDi-Instruct: student or discriminator does not start from the teacher.")

  def _rollout(self, state):
    chosen = self.settings
    return {
      "teacher": state.trees["teacher"] if chosen.kl_beta else None,
      "model": self.model,
      "process": self.process,
      "two_steps": chosen.score_decomposition,
      "t0": chosen.t0,
      "remask": chosen.remask,
      "jeffreys": chosen.jeffreys,
      "train": chosen.dropout,
      "chunk": self.chunk,
    }

  def _in_parts(self, function, batch):
    return over_micro_batches(function, batch, self.accumulate)

  def _real(self, state, batch):
    """Return the discriminator's other side, clean."""
    if self.settings.real == "data":
      return batch["tokens"]
    rng_B = fold_each(batch["rng"], 300)
    draw = functools.partial(
      sample,
      state.trees["teacher"],
      steps=self.settings.teacher_steps,
      model=self.model,
      process=self.process,
      chunk=self.chunk,
    )
    return self._in_parts(lambda b: draw(b, b["rng_real"]), {**batch, "rng_real": rng_B})

  def _update_discriminator(self, state, batch):
    loss = functools.partial(
      discriminator_loss,
      model=self.judge,
      process=self.process,
      spectral=state.aux["discriminator"],
      smoothing=self.settings.label_smoothing,
    )
    state, metrics, spectral = update(
      state,
      "discriminator",
      loss,
      batch,
      self.optimizers["discriminator"],
      accumulate=self.accumulate,
    )
    return state.replace(aux={"discriminator": spectral}), metrics
