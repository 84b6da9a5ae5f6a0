# SPDX-License-Identifier: Apache-2.0
"""Duo: uniform-state diffusion trained first on soft, then on hard tokens; trains teachers.

While step < curriculum_end the state is Gaussian, w = α̃ x₀ + σ̃ ξ, the network reads softmax(w/τ)
and the loss is the NELBO integrand at the hard token argmax w, with the survival α, the derivative
α' and the conditioning σ = −log α of that argmax. Afterwards the network reads hard tokens of the
given process: plain UDLM.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.arrays import FloatBL, FloatBLD, IntBL, KeyB, Metrics, Params
from dlm_jax.errors import InputError
from dlm_jax.models import DiT
from dlm_jax.objectives.batch import Batch, counted, split_each, token_mean, valid_tokens
from dlm_jax.objectives.gaussian_states import Noising, Relaxation, embed_data
from dlm_jax.objectives.options import ChunkedOptions
from dlm_jax.objectives.positions import map_positions, positions_per_chunk
from dlm_jax.objectives.setting import Setting, check_time_conditioning
from dlm_jax.objectives.state import Objective, Optimizers, check_class, init_alone, update
from dlm_jax.process import GaussianDuality, Uniform
from dlm_jax.schedules import Schedule, Times

TRAINED = ("model",)  # trees with an optimiser
NETWORK = (DiT,)  # classes of networks that it trains
PASSES = (1, 1)  # forward and backward passes of the network that a step needs at least
_HARD_LOG10 = -10.0  # of τ once the curriculum is over


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftCurriculum:
  """When and how soft inputs replace hard tokens.

  Attributes:
    duality: the Gaussian process; its window of γ belongs to the soft phase.
    start: step at which the temperature begins to fall.
    end: first step on hard tokens.
    tau_log10_start, tau_log10_end: log₁₀ τ up to `start` and towards `end`, linear between.
  """

  duality: GaussianDuality
  start: int
  end: int
  tau_log10_start: float
  tau_log10_end: float

  @property
  def few(self) -> int | None:
    """How many entries hold the softmax at any temperature of the curriculum; None above 3e-3."""
    return self.duality.enough(10.0 ** max(self.tau_log10_start, self.tau_log10_end))

  def relaxation(self, step: Int[Array, ""] | int) -> Relaxation:
    """Return how tokens are softened at a step."""
    return Relaxation(duality=self.duality, tau=self.tau(step), few=self.few)

  def tau(self, step: Int[Array, "*shape"] | int) -> Float[Array, "*shape"]:
    """Return the temperature of a step's soft inputs; 1e-10 once the curriculum is over."""
    step = jnp.asarray(step)
    share = jnp.clip((step - self.start) / max(self.end - self.start, 1), 0.0, 1.0)
    log10 = self.tau_log10_start + share * (self.tau_log10_end - self.tau_log10_start)
    return 10.0 ** jnp.where(step < self.end, log10, _HARD_LOG10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Either(Schedule):
  """One of two schedules, chosen while running."""

  first: Bool[Array, ""]
  schedules: tuple[Schedule, Schedule]

  def alpha(self, t: Times) -> Float[Array, "*shape"]:
    one, other = self.schedules
    return jnp.where(self.first, one.alpha(t), other.alpha(t))

  def dalpha(self, t: Times) -> Float[Array, "*shape"]:
    one, other = self.schedules
    return jnp.where(self.first, one.dalpha(t), other.dalpha(t))

  def sigma(self, t: Times) -> Float[Array, "*shape"]:
    one, other = self.schedules
    return jnp.where(self.first, one.sigma(t), other.sigma(t))


def hard_inputs(
  params: Params, batch: Batch, rng_B: KeyB, *, setting: Setting
) -> tuple[IntBL, FloatBLD]:
  """Return corrupted tokens, prompts kept, and their embeddings."""
  x0_BL = batch["tokens"]
  z_BL = jax.vmap(setting.process.corrupt)(rng_B, x0_BL, batch["t"])
  z_BL = jnp.where(valid_tokens(batch), z_BL, x0_BL)
  return z_BL, setting.embedded(params, z_BL)


def soft_inputs(
  params: Params, batch: Batch, rng_B: KeyB, *, setting: Setting, relaxation: Relaxation
) -> tuple[IntBL, FloatBLD]:
  """Return argmax w of diffused tokens, prompts kept, and the embeddings of softmax(w/τ)."""
  given = Noising(batch["tokens"], rng_B, batch["t"], valid_tokens(batch))
  return embed_data(params, given, setting=setting, relaxation=relaxation)


def token_nll(
  params: Params,
  inputs: tuple[IntBL, FloatBLD],
  batch: Batch,
  dropout_B: KeyB | None,
  *,
  setting: Setting,
) -> FloatBL:
  """Return the NELBO integrand in nats at hard tokens whose embeddings may be soft.

  Args:
    params: the network's.
    inputs: hard tokens and embeddings.
    batch: with "tokens" and "t".
    dropout_B: keys of dropout.
    setting: the process's schedule gives α, α' and σ of the hard tokens.
  """
  z_BL, x_BLD = inputs
  t_B, process = batch["t"], setting.process
  hidden_BLD = setting.body(params, x_BLD, t_B, dropout_B)

  def nll(hidden_BKD, z_BK, x0_BK):
    log_x0_BKV = jax.vmap(process.log_estimate)(setting.head(params, hidden_BKD, t_B), z_BK)
    return jax.vmap(process.nll)(log_x0_BKV, z_BK, x0_BK, t_B)

  return map_positions(nll, (hidden_BLD, z_BL, batch["tokens"]), setting.chunk)


def loss(
  params: Params,
  batch: Batch,
  *,
  setting: Setting,
  curriculum: SoftCurriculum | None = None,
  step: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the Monte-Carlo NELBO in nats per valid token, one corruption per sequence.

  Soft inputs while `step` is below the curriculum's end, hard ones otherwise or without a
  curriculum. Only the inputs are made in a branch; network and head are shared.
  """
  rng_noise_B, rng_dropout_B = split_each(batch["rng"], 2)
  harden = functools.partial(hard_inputs, params, batch, rng_noise_B, setting=setting)
  if curriculum is None:
    inputs = harden()
  else:
    soften = functools.partial(
      soft_inputs,
      params,
      batch,
      rng_noise_B,
      setting=setting,
      relaxation=curriculum.relaxation(step),
    )
    soft = step < curriculum.end
    inputs = jax.lax.cond(soft, soften, harden)
    schedules = (curriculum.duality.process.schedule, setting.process.schedule)
    either = _Either(first=soft, schedules=schedules)
    process = dataclasses.replace(setting.process, schedule=either)
    setting = dataclasses.replace(setting, process=process)
  nll_BL = token_nll(params, inputs, batch, rng_dropout_B, setting=setting)
  changed = jnp.mean(inputs[0] != batch["tokens"])
  return token_mean(nll_BL, batch), ({"changed": changed}, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChunkedOptions):
  """The curriculum; its defaults are the released configuration's; see also `ChunkedOptions`.

  The released scripts keep τ = 1e-3 for 500,000 steps: curriculum_start=0, curriculum_end=500_000
  and both log₁₀ τ at −3.

  Attributes:
    curriculum_start: step at which τ begins to fall.
    curriculum_end: first step on hard tokens; 0 is plain UDLM from the start.
    gamma_min, gamma_max: window of the soft phase, see `GaussianDuality`.
    tau_log10_start, tau_log10_end: log₁₀ τ before and at the end of the curriculum.

  Raises:
    InputError: a number does not fit.
  """

  curriculum_start: int = 100_000
  curriculum_end: int = 200_000
  gamma_min: float = -3.5
  gamma_max: float = -1.75
  tau_log10_start: float = -1.0
  tau_log10_end: float = -2.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.curriculum_start <= max(self.curriculum_end, 0) and self.curriculum_end:
      raise InputError(
        f"objective.curriculum_start={self.curriculum_start} must lie between 0 and"
        f" objective.curriculum_end={self.curriculum_end}."
      )

  def curriculum(self, vocab_size: int) -> SoftCurriculum | None:
    """Return the curriculum; None where tokens are hard from the start."""
    if self.curriculum_end <= 0:
      return None
    return SoftCurriculum(
      duality=GaussianDuality(
        vocab_size=vocab_size, gamma_min=self.gamma_min, gamma_max=self.gamma_max
      ),
      start=self.curriculum_start,
      end=self.curriculum_end,
      tau_log10_start=self.tau_log10_start,
      tau_log10_end=self.tau_log10_end,
    )


def make(*, model: DiT, process: Uniform, optimizers: Optimizers, **options: Any) -> Objective:
  """Build training of one tree, "model", with a curriculum of soft inputs.

  Args:
    model: a time-conditioned network.
    process: of the hard tokens, and of sampling.
    optimizers: "model".
    **options: fields of `Options`.

  Raises:
    InputError: the network is not time-conditioned, or an option does not fit.

  Reference: Duo, arXiv 2506.10892, section 4; UDLM, arXiv 2412.10193.
  """
  chosen = Options.of(options)
  check_class("model.name", model, NETWORK, "a denoiser is trained")
  check_time_conditioning(model)
  chunk = positions_per_chunk(chosen.chunk, model.config.length, process.vocab_size)
  total = functools.partial(
    loss,
    setting=Setting(model=model, process=process, chunk=chunk),
    curriculum=chosen.curriculum(process.vocab_size),
  )

  def step(state, batch):
    now, batch = functools.partial(total, step=state.step), counted(batch)
    state, metrics, _ = update(state, "model", now, batch, optimizers["model"], **chosen.updates)
    return state.replace(step=state.step + 1), metrics

  return Objective(init_alone(model, optimizers["model"], chosen), step, output="model")
