# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion language modelling: the NELBO of an absorbing process; trains teachers."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dlm_jax.arrays import Metrics, Params
from dlm_jax.models import DiT
from dlm_jax.objectives.batch import Batch, split_each, token_mean, valid_tokens
from dlm_jax.objectives.state import Objective, make_state, update
from dlm_jax.process import Absorbing

TRAINED = ("model",)  # trees with an optimiser


def loss(
  params: Params, batch: Batch, *, model: DiT, process: Absorbing
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the Monte-Carlo NELBO in nats per valid token, one corruption per sequence.

  Weight 1/t under the log-linear schedule; times are stratified over the global batch.
  """
  x0_BL, t_B = batch["tokens"], batch["t"]
  rng_noise_B, rng_dropout_B = split_each(batch["rng"], 2)
  xt_BL = jax.vmap(process.corrupt)(rng_noise_B, x0_BL, t_B)
  xt_BL = jnp.where(valid_tokens(batch), xt_BL, x0_BL)
  logits_BLV = model.apply({"params": params}, xt_BL, process.schedule.sigma(t_B), rng_dropout_B)
  log_x0_BLV = jax.vmap(process.log_estimate)(logits_BLV, xt_BL)
  nll_BL = jax.vmap(process.nll)(log_x0_BLV, xt_BL, x0_BL, t_B)
  masked = jnp.mean(xt_BL == process.mask_id)
  return token_mean(nll_BL, batch), ({"masked": masked}, None)


def make(
  *,
  model: DiT,
  process: Absorbing,
  optimizers: dict[str, optax.GradientTransformation],
  accumulate: int = 1,
  ema_decay: float | None = 0.9999,
) -> Objective:
  """Build training of one tree, "model", on the continuous-time NELBO.

  Reference: MDLM, arXiv 2406.07524, equation 10.
  """
  if not isinstance(model, DiT):
    raise ValueError("model.name must be dit: a denoiser is trained.")
  tx = optimizers["model"]

  def init(rng, teacher_params=None):
    params = teacher_params
    if params is None:
      tokens = jnp.zeros((1, model.config.length), jnp.int32)
      params = model.init(rng, tokens, jnp.zeros((1,)))["params"]
    return make_state({"model": params}, {"model": tx}, ("model",) if ema_decay else ())

  def step(state, batch):
    state, metrics, _ = update(
      state,
      "model",
      functools.partial(loss, model=model, process=process),
      batch,
      tx,
      accumulate=accumulate,
      decay=ema_decay,
    )
    return state.replace(step=state.step + 1), metrics

  return Objective(init, step, output="model")
