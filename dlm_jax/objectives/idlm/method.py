# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation (IDLM) of discrete diffusion teachers into few-step students.

Three trees of one network, all started from the teacher. The fake learns to denoise what the
student generates; the student moves to where the teacher's likelihood exceeds the fake's:

  L(θ) = L(teacher, p_θ) − min_f L(f, p_θ)  =  KL between path measures  ≥  KL(p_θ ‖ p_data).

The student sees really corrupted data at t_gen and predicts p, a distribution per position, from
which the state of both losses is made. How, depends on the process: `absorbing`, `uniform`.

Reference: IDLM, arXiv 2602.19066, Algorithm 1 and Theorem 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.arrays import KeyB, Metrics, Params
from dlm_jax.errors import InputError, check_choice
from dlm_jax.fields import Items, Number, Whole
from dlm_jax.models import DiT
from dlm_jax.models.dit import head_params
from dlm_jax.objectives import orders
from dlm_jax.objectives.batch import Batch, counted, split_each, stratified_times
from dlm_jax.objectives.gaussian_states import Relaxation
from dlm_jax.objectives.idlm import guidance, mask_noise
from dlm_jax.objectives.idlm.absorbing import HardSample, HardStates
from dlm_jax.objectives.idlm.groups import GroupedStates
from dlm_jax.objectives.idlm.uniform import SoftSample, SoftStates
from dlm_jax.objectives.options import ChunkedOptions
from dlm_jax.objectives.positions import positions_per_chunk, sum_positions
from dlm_jax.objectives.setting import check_time_conditioning
from dlm_jax.objectives.state import Objective, Optimizers, check_class, init_from_teacher, update
from dlm_jax.process import Absorbing, GaussianDuality, Uniform
from dlm_jax.process.block import FULL

TIME_COUPLINGS = ("same_order", "permuted")

TRAINED = ("fake", "student")  # trees with an optimiser
NETWORK = (DiT,)  # classes of networks that it trains
MASK_NOISE = True  # it trains networks whose masks carry noise
# Forward and backward passes of the network that a step needs at least, by Algorithm 1 of arXiv
# 2602.19066: student 2 + 1, teacher 1, fake 2 + 1. Another update of the fake is 2 and 1 more.
PASSES = (5, 2)


def couple_times(
  batch: Batch, *, coupling: str, interval: tuple[float, float] = FULL, eps: float = FULL[0]
) -> Batch:
  """Add the student's input time "t_gen" to a global batch that holds the loss time "t".

  Loss times, which fill `FULL`, are moved to the interval.

  "same_order" gives sequence i the same stratum for both, so |t_gen − t| < 1/B: what the released
  code does. "permuted" shuffles the strata, the independent draws that the paper's text describes.
  """
  rng_B, rng_time_B, rng_order_B = split_each(batch["rng"], 3)
  t_gen_B = stratified_times(rng_time_B, eps)
  if coupling == "permuted":
    t_gen_B = jax.random.permutation(rng_order_B[0], t_gen_B)
  t_B = batch["t"]
  if tuple(interval) != FULL:
    t_B = interval[0] + (t_B - FULL[0]) / (FULL[1] - FULL[0]) * (interval[1] - interval[0])
  return counted({**batch, "rng": rng_B, "t": t_B, "t_gen": t_gen_B})


def fake_loss(
  params: Params, batch: Batch, *, states: HardStates | SoftStates, student: Params
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return `cross_entropy` of the fake, with dropout, on samples of the student, without."""
  *rngs, dropout_B = split_each(batch["rng"], 4)
  sample = states.rollout(student, batch, tuple(rngs), None)
  options = {"states": states, "student": student, "dropout_B": dropout_B}
  return cross_entropy(params, sample, batch, **options), ({}, None)


def student_loss(
  params: Params,
  batch: Batch,
  *,
  states: HardStates | SoftStates,
  teacher: Params,
  fake: Params,
  anchor: float = 0.0,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the `gap` on samples of the student, which alone runs with dropout.

  Where masks carry noise, `anchor` times `mask_noise.anchor` is added.
  """
  rng_B, noise_B = split_each(batch["rng"], 2) if states.mask_noise else (batch["rng"], None)
  *rngs, dropout_B = split_each(rng_B, 4)
  sample = states.rollout(params, batch, tuple(rngs), dropout_B)
  value, metrics = gap(params, sample, batch, states=states, teacher=teacher, fake=fake)
  if states.mask_noise and anchor:
    weights_BL = states.weights(sample, batch)
    given = (params, sample, batch, noise_B, weights_BL)
    distance = mask_noise.anchor(*given, states=states, teacher=teacher)
    value, metrics = value + anchor * distance, {**metrics, "anchor": distance}
  return value, (metrics, None)


def cross_entropy(
  params: Params,
  sample: HardSample | SoftSample,
  batch: Batch,
  *,
  states: HardStates | SoftStates,
  student: Params,
  dropout_B: KeyB | None = None,
) -> Float[Array, ""]:
  """Return the teacher's own training loss on a sample; for MDLM −(1/t) Σ_masked ⟨p, log f⟩.

  Nats per sequence, mean over the batch; differentiate with respect to `params`, the fake's.
  """
  z_BL, (fake_BLD,) = states.read(student, sample, batch, (params,), (dropout_B,))
  told_B = states.told(sample, batch)

  def nll(head, fake, hidden, x_gen, z):
    predicted = states.head(student, hidden, batch["t_gen"])
    logits = states.head(head, fake, told_B)
    return jax.vmap(states.process.nll_predicted)(logits, z, predicted, x_gen, batch["t"]), ()

  fixed = (sample.hidden, sample.x_gen, z_BL)
  weights_BL = states.weights(sample, batch)
  return sum_positions(nll, head_params(params), (fake_BLD,), fixed, weights_BL, states.chunk)[0]


def gap(
  params: Params,
  sample: HardSample | SoftSample,
  batch: Batch,
  *,
  states: HardStates | SoftStates,
  teacher: Params,
  fake: Params,
) -> tuple[Float[Array, ""], Metrics]:
  """Return L(teacher, p) − L(fake, p) on a sample, in nats per sequence, mean over the batch.

  The gradient with respect to `params`, the student's, flows through p: through `sample.hidden`
  and the head, and of a soft state through the inputs of teacher and fake. Metrics, over the
  positions that carry loss: entropy of the student's predictions, and the advantage, the root mean
  square under p of a − ⟨p, a⟩ (nats).
  """
  process, t_B, told_B = states.process, batch["t"], states.told(sample, batch)
  z_BL, read = states.read(params, sample, batch, (teacher, fake), (None, None))
  length, weight = z_BL.shape[1], states.guidance
  nothing = (guidance.of_nothing(states, teacher, length),) if weight else ()

  def difference(head, hidden, teacher_hidden, fake_hidden, x_gen, z, *nothing):
    predicted = states.head(head, hidden, batch["t_gen"])
    of_teacher = states.head(teacher, teacher_hidden, told_B)
    for trunk in nothing:
      of_nothing = states.head(teacher, trunk, jnp.ones(1))
      of_teacher = guidance.sharpened(of_teacher, of_nothing, weight)
    of_fake = states.head(fake, fake_hidden, told_B)
    nll = lambda logits: jax.vmap(process.nll_predicted)(logits, z, predicted, x_gen, t_B)  # noqa: E731
    gap = nll(of_teacher) - nll(of_fake)
    p = jnp.exp(jax.vmap(process.log_x0)(predicted, x_gen))
    log_teacher, log_fake = (jax.vmap(process.log_estimate)(x, z) for x in (of_teacher, of_fake))
    advantage, entropy = log_teacher - log_fake, -jnp.sum(jax.scipy.special.xlogy(p, p), -1)
    mean = jnp.sum(p * advantage, -1)
    variance = jnp.maximum(jnp.sum(p * advantage**2, -1) - mean**2, 0)
    return gap, (variance, entropy)

  arrays = (sample.hidden, *read, sample.x_gen, z_BL, *nothing)
  moving = 3 if states.through_inputs else 1  # of the arrays, how many carry gradients
  value, (variance_BL, entropy_BL) = sum_positions(
    difference,
    head_params(params),
    arrays[:moving],
    arrays[moving:],
    states.weights(sample, batch),
    states.chunk,
  )
  counted_BL = states.counted(sample, z_BL, batch)
  mean = lambda x: jnp.sum(x * counted_BL) / jnp.maximum(counted_BL.sum(), 1)  # noqa: E731
  metrics = {"advantage": jnp.sqrt(mean(variance_BL)), "entropy": mean(entropy_BL)}
  return value, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChunkedOptions):
  """How times are drawn and, for a uniform process, states made; see also `ChunkedOptions`.

  Without a chunk an absorbing process keeps all positions alive. The defaults are the released
  scripts'.

  Attributes:
    time_coupling: "same_order" or "permuted", see `couple_times`; with `steps` always "permuted".
    order: of an absorbing process: "random" or "spaced", which positions are masked together, as a
      sampler of that order meets them; see `objectives.orders`.
    steps: of an absorbing process: numbers of steps K of the samplers whose own loss is taken, see
      `groups`; (): that of the whole prediction.
    interval: smallest and largest loss time. Under `steps` few hidden positions at a time, a
      largest of 0.3, bring the gradient nearer to that of the joint law, see `groups`.
    fake_updates: updates of the fake before each of the student, each on a fresh batch. The gap is
      one only while the fake keeps up; its own learning rate is `optim.fake.lr`.
    guidance: w of the teacher's, see `guidance`; 0: the teacher itself.
    gamma_min, gamma_max: of a uniform process; see `GaussianDuality`.
    tau, path_gradient: of a uniform process; see `Relaxation`.
    anchor, noise_scale: where `model.mask_noise` gives masks noise; see `mask_noise`: weight of the
      distance of the student's mean prediction from the teacher's, and size of the noise's part of
      a mask at the start, over that of an embedding.

  Raises:
    InputError: an unknown name, or a number out of range.
  """

  time_coupling: str = "same_order"
  order: str = "random"
  steps: tuple[int, ...] = ()
  interval: tuple[float, ...] = FULL
  fake_updates: int = 1
  guidance: float = 0.0
  gamma_min: float = -3.55
  gamma_max: float = -1.85
  tau: float = 1e-3
  path_gradient: bool = True
  anchor: float = 10.0
  noise_scale: float = 2.0

  def __post_init__(self):
    super().__post_init__()
    check_choice("objective.time_coupling", self.time_coupling, TIME_COUPLINGS)
    orders.check(self.order)
    Items(Whole(1)).check("objective.steps", self.steps)
    Whole(1).check("objective.fake_updates", self.fake_updates)
    if len(self.interval) != 2 or not 0 < self.interval[0] <= self.interval[1] <= 1:
      raise InputError(f"objective.interval={self.interval} must be two times in (0, 1], rising.")
    Number("[0, ∞)").check("objective.guidance", self.guidance)
    Number("(0, ∞)").check("objective.tau", self.tau)
    Number("[0, ∞)").check("objective.anchor", self.anchor)
    Number("[0, ∞)").check("objective.noise_scale", self.noise_scale)


def hard_states(model: DiT, process: Absorbing, options: Options) -> HardStates:
  """Return the states of an absorbing process; None for a chunk keeps all positions alive."""
  if options.chunk:
    positions_per_chunk(options.chunk, model.config.length, process.vocab_size)
  shared = {"model": model, "process": process, "chunk": options.chunk, "order": options.order}
  shared["guidance"] = options.guidance
  if not options.steps:
    return HardStates(**shared)
  if max(options.steps) > model.config.length:
    raise InputError(
      f"objective.steps={options.steps}: a sequence of {model.config.length} tokens is revealed in "
      "at most as many steps."
    )
  return GroupedStates(**shared, steps=options.steps)


def soft_states(model: DiT, process: Uniform, options: Options) -> SoftStates:
  """Return the states of a uniform process, in the time of the Gaussian window.

  Only samplers use the schedule of the process itself.
  """
  for name, unset in (("order", "random"), ("steps", ())):
    if getattr(options, name) != unset:
      raise InputError(
        f"objective.{name}={getattr(options, name)!r} says which masks are revealed together, and "
        f"process.name='uniform' has no masks; leave it at {unset!r}."
      )
  check_time_conditioning(model)
  duality = GaussianDuality(
    vocab_size=process.vocab_size, gamma_min=options.gamma_min, gamma_max=options.gamma_max
  )
  relaxation = Relaxation(
    duality=duality,
    tau=options.tau,
    few=duality.enough(options.tau),
    path_gradient=options.path_gradient,
  )
  chunk = positions_per_chunk(options.chunk, model.config.length, process.vocab_size)
  return SoftStates(model=model, process=relaxation.process, chunk=chunk, relaxation=relaxation)


STATES = {Absorbing: hard_states, Uniform: soft_states}


def make(
  *, model: DiT, process: Absorbing | Uniform, optimizers: Optimizers, **options: Any
) -> Objective:
  """Build alternating updates, fake first, each on its own fresh batch.

  Args:
    model: network shared by the three trees.
    process: the teacher's forward process.
    optimizers: "student" and "fake".
    **options: fields of `Options`.

  Returns:
    An objective with trees "teacher" (frozen), "fake" and "student". Its step takes a tuple of
    batches (one per update of the fake, and one for the student); a single batch serves all.

  Raises:
    InputError: the network, the process or an option does not fit.

  Reference: IDLM, arXiv 2602.19066, Algorithm 1.
  """
  chosen = Options.of(options)
  check_class("model.name", model, NETWORK, "a denoiser is distilled")
  check_class("process.name", process, tuple(STATES), "states are drawn from predictions")
  width = model.config.mask_noise
  mask_noise.check(process, width)
  guidance.check(process, chosen.guidance)
  make_states = next(make for kind, make in STATES.items() if isinstance(process, kind))
  states = make_states(model, process, chosen)
  coupling = "permuted" if chosen.steps else chosen.time_coupling
  couple = functools.partial(couple_times, coupling=coupling, interval=chosen.interval)
  if isinstance(states, GroupedStates):
    couple = lambda batch, at=couple: states.choose(at(batch))  # noqa: E731

  def step(state, batch):
    batches = batch if isinstance(batch, tuple) else (batch,) * (chosen.fake_updates + 1)
    *fake_batches, student_batch = batches
    loss = functools.partial(fake_loss, states=states, student=state.trees["student"])
    for fake_batch in fake_batches:
      batch, tx = couple(fake_batch), optimizers["fake"]
      state, fake_metrics, _ = update(state, "fake", loss, batch, tx, **chosen.updates)
    frozen = {"teacher": state.trees["teacher"], "fake": state.trees["fake"]}
    loss = functools.partial(student_loss, states=states, anchor=chosen.anchor, **frozen)
    batch, tx = couple(student_batch), optimizers["student"]
    state, student_metrics, _ = update(state, "student", loss, batch, tx, **chosen.updates)
    return state.replace(step=state.step + 1), {**fake_metrics, **student_metrics}

  def with_noise(trees, rng):
    return mask_noise.started(trees, rng, width, chosen.noise_scale) if width else trees

  init = init_from_teacher("IDLM", ("fake", "student"), optimizers, chosen, with_noise)
  return Objective(init, step, output="student", batches=chosen.fake_updates + 1)
