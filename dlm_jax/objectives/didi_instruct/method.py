# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct: masked teachers distilled on an integral KL divergence, with a discriminator.

The student descends ∫ ω(t) KL(q_ν(·, t) ‖ q_θ(·, t)) dt, the divergence of its own noised samples
from real noised text. With the reward r(z, t) = log q_θ(z, t) − log q_ν(z, t), the gradient is

  −E[ω(t) r(z, t) ∇ log p_ν(x₀)],   x₀ ~ p_ν from masks, z = x₀ noised to t,

where r may be centred by any constant and carries no gradient. A discriminator of real (1) against
generated (0) noised text has the optimal logit r; of labels smoothed to 1 − s and s it is

  log [((1 − s) eʳ + s)/(s eʳ + 1 − s)],   at most log(1/s − 1): 2.2 at the published s = 0.1,

which orders samples as r does and squashes it. That logit is the reward, as in the release: undone,
logit of (σ − s)/(1 − 2s), it would have no bound on its slope where a discriminator is sure. The
student writes x₀ in two steps, through a state at a time t; coupled, the same t is the noise level
of z.

One step: a rollout; an update of the discriminator on it; rewards from the updated discriminator,
normalised in groups; an update of the student, the gradient of whose rollout was kept.

What of the released code is left out: dropout in the student, and in the discriminator while it
rewards; a second run of the student for the gradient; its replacement of infinite gradients; and a
batch of one data row repeated G times, unless rows have prompts. The moving average is ramped up.

Reference: DiDi-Instruct, arXiv 2509.25035, algorithm 1.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dlm_jax.arrays import FloatB, Metrics, Params
from dlm_jax.errors import InputError
from dlm_jax.models import Critic, Discriminator, DiT, discriminator
from dlm_jax.objectives import orders
from dlm_jax.objectives.batch import Batch, fold_each, split_each, stratified_times, valid_tokens
from dlm_jax.objectives.didi_instruct.options import Options
from dlm_jax.objectives.didi_instruct.rewards import (
  beta_times,
  masked_mean,
  normalise_groups,
  omega,
)
from dlm_jax.objectives.didi_instruct.rollout import Path, Terms, rollout, sample
from dlm_jax.objectives.positions import positions_per_chunk
from dlm_jax.objectives.setting import Setting
from dlm_jax.objectives.state import (
  Objective,
  Optimizers,
  TrainState,
  apply_gradients,
  check_class,
  check_teacher,
  make_state,
  over_micro_batches,
  update,
)
from dlm_jax.process import Absorbing

TRAINED = ("discriminator", "student")  # trees with an optimiser
NETWORK = (DiT,)  # classes of networks that it trains


def share_prompts(batch: Batch, options: Options) -> Batch:
  """Give all members of a group the row of the first, where rows have prompts or lengths.

  Rewards of different prompts would compare the prompts.
  """
  if "valid" not in batch:
    return batch
  first = lambda x: jnp.repeat(x[:: options.group_size], options.group_size, axis=0)  # noqa: E731
  return {**batch, "tokens": first(batch["tokens"]), "valid": first(batch["valid"])}


def draw_times(batch: Batch, options: Options, process: Absorbing) -> Batch:
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


def noised(
  batch: Batch, generated: Array, real: Array, process: Absorbing, order: str = "random"
) -> Batch:
  """Add "fake" and "real", both sides masked to time t afresh, and what makes their means global.

  The weights make means over sequences of sums over masked positions into means over all masked
  positions of the global batch, however it is cut.
  """
  masks = []
  for tag, clean_BL in ((100, generated), (101, real)):
    rng_B, valid_BL = fold_each(batch["rng"], tag), valid_tokens(batch)
    kept_BL = jnp.where(valid_BL, clean_BL, batch["tokens"])
    masks.append(orders.masked(order, process, rng_B, kept_BL, valid_BL, batch["t"]))
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
) -> FloatB:
  """Return the discriminator's estimate of log q_θ(z, t) − log q_ν(z, t) of generated sequences.

  Squashed where its labels are smoothed: see the module.
  """
  logits_BL = critic(batch["fake"], process.schedule.sigma(batch["t"]))
  return masked_mean(logits_BL, batch["fake"] == process.mask_id, clip)


def policy_loss(terms: Terms, batch: Batch, options: Options) -> tuple[Array, Metrics]:
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
  params: Params, batch: Batch, *, setting: Setting, options: Options, teacher: Params | None
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return `policy_loss` of the rollout that the batch holds as "z" and "x0": for micro-batches."""
  path = Path(batch["z"], batch["x0"])
  terms, _ = rollout(params, batch, setting=setting, options=options, teacher=teacher, path=path)
  value, metrics = policy_loss(terms, batch, options)
  return value, (metrics, None)


def make(*, model: DiT, process: Absorbing, optimizers: Optimizers, **options: Any) -> Objective:
  """Build updates of a discriminator and a student, in this order, on one rollout.

  Args:
    model: network of teacher and student.
    process: absorbing.
    optimizers: "student" and "discriminator", each with its own clipping.
    **options: fields of `Options`.

  Returns:
    An objective with trees "teacher" (frozen), "student" and "discriminator", whose spectral state
    is `aux["discriminator"]`.

  Raises:
    InputError: an option does not fit.

  Reference: DiDi-Instruct, arXiv 2509.25035, algorithm 1.
  """
  chosen = Options.of(options)
  check_class("model.name", model, NETWORK, "a denoiser is distilled")
  if model.config.time_conditioning:
    raise InputError("DiDi-Instruct distils masked teachers that are not told the time.")
  length = model.config.length
  chunk = positions_per_chunk(chosen.chunk, length, process.vocab_size)
  setting = Setting(model=model, process=process, chunk=chunk)
  layers = chosen.layers_to_train(model.config.layers)
  network = Discriminator(model.config, trained_layers=layers)
  inputs = jnp.zeros((1, length), jnp.int32), jnp.zeros((1,))
  optimizers = {**optimizers, "discriminator": _freeze(optimizers["discriminator"])}

  def init(rng, teacher_params=None):
    teacher = check_teacher("DiDi-Instruct", teacher_params)
    fresh = network.init(rng, *inputs)
    trees = {
      "teacher": teacher,
      "student": teacher,
      "discriminator": discriminator.from_trunk(network, teacher, fresh["params"]["head"]),
    }
    state = make_state(trees, optimizers, chosen.averaged("student"))
    return state.replace(aux={"discriminator": fresh["spectral"]})

  def critic(state: TrainState) -> Critic:
    spectral = state.aux["discriminator"]
    return Critic(model=network, params=state.trees["discriminator"], spectral=spectral)

  def step(state, batch):
    return _step(state, batch, setting=setting, options=chosen, critic=critic, txs=optimizers)

  axes = network.axes(*inputs)
  return Objective(
    init,
    step,
    output="student",
    check=functools.partial(check_start, network),
    axes=(axes, axes["upper"], axes["head"]),
    export=lambda state: {"beside": {"discriminator": critic(state)}},
  )


def check_start(network: Discriminator, state: TrainState) -> None:
  """Raise InputError unless student and discriminator start from the teacher."""
  trunk = discriminator.to_trunk(network, state.trees["discriminator"])
  teacher = state.trees["teacher"]
  pairs = ((teacher, state.trees["student"]), ({name: teacher[name] for name in trunk}, trunk))
  if not all(bool(jax.tree.all(jax.tree.map(jnp.array_equal, *pair))) for pair in pairs):
    raise InputError("DiDi-Instruct: student or discriminator does not start from the teacher.")


def _freeze(tx):
  """Return an optimiser of a discriminator that leaves what was trained before alone."""
  labels = dict.fromkeys(discriminator.FROZEN, "frozen")
  labels |= dict.fromkeys(discriminator.TRAINED, "trained")
  return optax.multi_transform(
    {"trained": tx, "frozen": optax.set_to_zero()},
    lambda params: {name: labels[name] for name in params},
  )


def _step(state, batch, *, setting, options, critic, txs):
  """Draw a rollout, update the discriminator on it, reward it, update the student."""
  process, count = setting.process, options.accumulate
  batch = draw_times(share_prompts(batch, options), options, process)
  teacher, student = state.trees["teacher"], state.trees["student"]
  frozen = teacher if options.kl_beta else None
  roll = functools.partial(rollout, setting=setting, options=options, teacher=frozen)
  kept = None
  if count == 1:
    *kept, path = jax.vjp(functools.partial(roll, batch=batch), student, has_aux=True)
  else:
    path = over_micro_batches(lambda b: roll(student, b)[1], batch, count)
  real_BL = _real(teacher, batch, setting, options)
  batch = noised(batch, path.x0, real_BL, process, options.order)

  loss = functools.partial(
    discriminator_loss,
    model=critic(state).model,
    process=process,
    spectral=state.aux["discriminator"],
    smoothing=options.label_smoothing,
  )
  tx = txs["discriminator"]
  state, metrics, spectral = update(state, "discriminator", loss, batch, tx, accumulate=count)
  state = state.replace(aux={"discriminator": spectral})

  score = functools.partial(reward, critic(state), process=process, clip=options.reward_clip)
  reward_B = over_micro_batches(score, batch, count)
  advantage_B = normalise_groups(
    reward_B,
    options.group_size,
    options.advantage_clip,
    counted_B=jnp.any(batch["fake"] == process.mask_id, axis=1),
  )
  batch = {**batch, "z": path.z, "x0": path.x0, "advantage": advantage_B}
  loss = functools.partial(student_loss, setting=setting, options=options, teacher=frozen)
  after, student_metrics = _update_student(state, batch, loss, txs["student"], options, kept)
  if options.warmup:
    wait = state.step < options.warmup
    after = jax.tree.map(lambda old, new: jnp.where(wait, old, new), state, after)
  scores = {"student/reward": reward_B.mean(), "student/reward_std": reward_B.std()}
  return after.replace(step=state.step + 1), {**metrics, **student_metrics, **scores}


def _real(teacher, batch, setting, options):
  """Return the discriminator's other side, clean."""
  if options.real == "data":
    return batch["tokens"]
  batch = {**batch, "rng_real": fold_each(batch["rng"], 300)}
  draw = lambda b: sample(teacher, b, b["rng_real"], options.teacher_steps, setting=setting)  # noqa: E731
  return over_micro_batches(draw, batch, options.accumulate)


def _update_student(state, batch, loss, tx, options, kept):
  """Take the student's step: from the terms and the gradient that its rollout kept, or anew."""
  if kept is None:
    return update(state, "student", loss, batch, tx, **options.updates)[:2]
  terms, pull_back = kept
  value = functools.partial(policy_loss, batch=batch, options=options)
  (value, metrics), slope = jax.value_and_grad(value, has_aux=True)(terms)
  gradient, metrics = pull_back(slope)[0], {"loss": value, **metrics}
  decay = options.ema_decay
  return apply_gradients(state, "student", gradient, tx, decay=decay, metrics=metrics)
