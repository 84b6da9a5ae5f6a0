# SPDX-License-Identifier: Apache-2.0
"""Duo: uniform-state diffusion trained first on soft, then on hard tokens; trains teachers.

While step < curriculum_end the state is Gaussian, w = α̃ x₀ + σ̃ ξ, the network reads softmax(w/τ)
and the loss is the NELBO integrand at the hard token argmax w, with the survival α, the derivative
α' and the conditioning σ = −log α of that argmax. Afterwards the network reads hard tokens of the
given process: plain UDLM.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from dlm_jax.arrays import Metrics, Params
from dlm_jax.models import DiT
from dlm_jax.objectives.batch import Batch, split_each, token_mean, valid_tokens
from dlm_jax.objectives.gaussian_states import Relaxation, embed_data
from dlm_jax.objectives.positions import map_positions, positions_per_chunk
from dlm_jax.objectives.state import Objective, make_state, update
from dlm_jax.process import GaussianDuality, Uniform
from dlm_jax.schedules import Derived, Schedule, Times

TRAINED = ("model",)  # trees with an optimiser
_HARD_LOG10 = -10.0  # of τ once the curriculum is over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
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

  def tau(self, step: Int[Array, "*shape"] | int) -> Float[Array, "*shape"]:
    """Return the temperature of a step's soft inputs; 1e-10 once the curriculum is over."""
    step = jnp.asarray(step)
    share = jnp.clip((step - self.start) / max(self.end - self.start, 1), 0.0, 1.0)
    log10 = self.tau_log10_start + share * (self.tau_log10_end - self.tau_log10_start)
    return 10.0 ** jnp.where(step < self.end, log10, _HARD_LOG10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Either(Derived):
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
  params: Params, batch: Batch, rng_B: Key[Array, "B"], *, model: DiT, process: Uniform
) -> tuple[Int[Array, "B L"], Float[Array, "B L D"]]:
  """Return corrupted tokens, prompts kept, and their embeddings."""
  x0_BL = batch["tokens"]
  z_BL = jax.vmap(process.corrupt)(rng_B, x0_BL, batch["t"])
  z_BL = jnp.where(valid_tokens(batch), z_BL, x0_BL)
  return z_BL, model.apply({"params": params}, z_BL, method="embedded")


def soft_inputs(
  params: Params,
  batch: Batch,
  rng_B: Key[Array, "B"],
  *,
  model: DiT,
  duality: GaussianDuality,
  tau: Float[Array, ""] | float,
  chunk: int | None,
  few: int | None = None,
) -> tuple[Int[Array, "B L"], Float[Array, "B L D"]]:
  """Return argmax w of diffused tokens, prompts kept, and the embeddings of softmax(w/τ).

  `few`: see `Relaxation`.
  """
  return embed_data(
    params,
    batch["tokens"],
    rng_B,
    batch["t"],
    valid_tokens(batch),
    model=model,
    relaxation=Relaxation(duality=duality, tau=tau, few=few),
    chunk=chunk,
  )


def token_nll(
  params: Params,
  inputs: tuple[Int[Array, "B L"], Float[Array, "B L D"]],
  batch: Batch,
  dropout_B: Key[Array, "B"] | None,
  *,
  model: DiT,
  process: Uniform,
  chunk: int | None = None,
) -> Float[Array, "B L"]:
  """Return the NELBO integrand in nats at hard tokens whose embeddings may be soft.

  Args:
    params: the network's.
    inputs: hard tokens and embeddings.
    batch: with "tokens" and "t".
    dropout_B: keys of dropout.
    model: the network.
    process: its schedule gives α, α' and σ of the hard tokens.
    chunk: see `make`.
  """
  z_BL, x_BLD = inputs
  t_B = batch["t"]
  sigma_B = process.schedule.sigma(t_B)
  hidden_BLD = model.apply({"params": params}, x_BLD, sigma_B, dropout_B, method="body")

  def nll(hidden_BKD, z_BK, x0_BK):
    logits_BKV = model.apply({"params": params}, hidden_BKD, sigma_B, method="head")
    log_x0_BKV = jax.vmap(process.log_estimate)(logits_BKV, z_BK)
    return jax.vmap(process.nll)(log_x0_BKV, z_BK, x0_BK, t_B)

  return map_positions(nll, (hidden_BLD, z_BL, batch["tokens"]), chunk)


def loss(
  params: Params,
  batch: Batch,
  *,
  model: DiT,
  process: Uniform,
  curriculum: Curriculum | None = None,
  step: Int[Array, ""] | None = None,
  chunk: int | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the Monte-Carlo NELBO in nats per valid token, one corruption per sequence.

  Soft inputs while `step` is below the curriculum's end, hard ones otherwise or without a
  curriculum. Only the inputs are made in a branch; network and head are shared.
  """
  rng_noise_B, rng_dropout_B = split_each(batch["rng"], 2)
  harden = functools.partial(hard_inputs, params, batch, rng_noise_B, model=model, process=process)
  if curriculum is None:
    inputs = harden()
  else:
    soft, duality = step < curriculum.end, curriculum.duality
    soften = functools.partial(
      soft_inputs,
      params,
      batch,
      rng_noise_B,
      model=model,
      duality=duality,
      tau=curriculum.tau(step),
      chunk=chunk,
      few=curriculum.few,
    )
    inputs = jax.lax.cond(soft, soften, harden)
    schedules = (duality.process.schedule, process.schedule)
    either = _Either(first=soft, schedules=schedules)
    process = dataclasses.replace(process, schedule=either)
  nll_BL = token_nll(
    params, inputs, batch, rng_dropout_B, model=model, process=process, chunk=chunk
  )
  changed = jnp.mean(inputs[0] != batch["tokens"])
  return token_mean(nll_BL, batch), ({"changed": changed}, None)


def make(
  *,
  model: DiT,
  process: Uniform,
  optimizers: dict[str, optax.GradientTransformation],
  curriculum_start: int = 100_000,
  curriculum_end: int = 200_000,
  gamma_min: float = -3.5,
  gamma_max: float = -1.75,
  tau_log10_start: float = -1.0,
  tau_log10_end: float = -2.0,
  accumulate: int = 1,
  ema_decay: float | None = 0.9999,
  chunk: int | None = None,
) -> Objective:
  """Build training of one tree, "model", with a curriculum of soft inputs.

  The defaults of the curriculum are the released configuration's. The released scripts keep
  τ = 1e-3 for 500,000 steps: curriculum_start=0, curriculum_end=500_000 and both log₁₀ τ at −3.

  Args:
    model: a time-conditioned network.
    process: of the hard tokens, and of sampling.
    optimizers: "model".
    curriculum_start: step at which τ begins to fall.
    curriculum_end: first step on hard tokens; 0 is plain UDLM from the start.
    gamma_min, gamma_max: window of the soft phase, see `GaussianDuality`.
    tau_log10_start, tau_log10_end: log₁₀ τ before and at the end of the curriculum.
    accumulate: micro-batches per update.
    ema_decay: None keeps no average.
    chunk: positions whose [B, chunk, V] arrays are alive at a time, recomputed in the backward
      pass; must divide L. None takes the most that stay below 2²² entries per sequence.

  Raises:
    ValueError: the network is not time-conditioned, or a number does not fit.

  Reference: Duo, arXiv 2506.10892, section 4; UDLM, arXiv 2412.10193.
  """
  if not isinstance(model, DiT):
    raise ValueError("model.name must be dit: a denoiser is trained.")
  if not model.config.time_conditioning:
    raise ValueError("a uniform process needs model.time_conditioning=True.")
  if not 0 <= curriculum_start <= max(curriculum_end, 0) and curriculum_end:
    raise ValueError(
      f"objective.curriculum_start={curriculum_start} must lie between 0 and"
      f" objective.curriculum_end={curriculum_end}."
    )
  chunk = positions_per_chunk(chunk, model.config.length, process.vocab_size)
  curriculum = None
  if curriculum_end > 0:
    duality = GaussianDuality(
      vocab_size=process.vocab_size, gamma_min=gamma_min, gamma_max=gamma_max
    )
    curriculum = Curriculum(
      duality=duality,
      start=curriculum_start,
      end=curriculum_end,
      tau_log10_start=tau_log10_start,
      tau_log10_end=tau_log10_end,
    )
  tx = optimizers["model"]

  def init(rng, teacher_params=None):
    params = teacher_params
    if params is None:
      tokens = jnp.zeros((1, model.config.length), jnp.int32)
      params = model.init(rng, tokens, jnp.zeros((1,)))["params"]
    return make_state({"model": params}, {"model": tx}, ("model",) if ema_decay else ())

  def step(state, batch):
    options = {"model": model, "process": process, "curriculum": curriculum, "chunk": chunk}
    state, metrics, _ = update(
      state,
      "model",
      functools.partial(loss, step=state.step, **options),
      batch,
      tx,
      accumulate=accumulate,
      decay=ema_decay,
    )
    return state.replace(step=state.step + 1), metrics

  return Objective(init, step, output="model")
