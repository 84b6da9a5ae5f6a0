# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion language modelling: the NELBO of an absorbing process; trains teachers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.arrays import FloatBL, Metrics, Params
from dlm_jax.models import DiT
from dlm_jax.objectives.batch import Batch, counted, split_each, token_mean, valid_tokens
from dlm_jax.objectives.options import MethodOptions
from dlm_jax.objectives.state import Objective, Optimizers, check_class, init_alone, update
from dlm_jax.process import Absorbing

TRAINED = ("model",)  # trees with an optimiser
NETWORK = (DiT,)  # classes of networks that it trains
PASSES = (1, 1)  # forward and backward passes of the network that a step needs at least


def loss(
  params: Params,
  batch: Batch,
  *,
  model: DiT,
  process: Absorbing,
  weight: Callable[[FloatBL], FloatBL] | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the Monte-Carlo NELBO in nats per valid token, one corruption per sequence.

  Weight 1/t under the log-linear schedule; times are stratified over the global batch.

  Args:
    params: of the network.
    batch: see `draw_batch`.
    model: the network.
    process: absorbing.
    weight: for methods of one's own: (log p of the clean tokens) -> factor of every token's nats.
  """
  x0_BL, t_B = batch["tokens"], batch["t"]
  rng_noise_B, rng_dropout_B = split_each(batch["rng"], 2)
  xt_BL = jax.vmap(process.corrupt)(rng_noise_B, x0_BL, t_B)
  xt_BL = jnp.where(valid_tokens(batch), xt_BL, x0_BL)
  logits_BLV = model.apply({"params": params}, xt_BL, process.schedule.sigma(t_B), rng_dropout_B)
  log_x0_BLV = jax.vmap(process.log_estimate)(logits_BLV, xt_BL)
  nll_BL = jax.vmap(process.nll)(log_x0_BLV, xt_BL, x0_BL, t_B)
  if weight is not None:
    clean_BLV = jnp.arange(process.vocab_size)[None, None] == x0_BL[..., None]
    nll_BL *= weight(jnp.sum(jnp.where(clean_BLV, log_x0_BLV, 0.0), axis=-1))
  masked = jnp.mean(xt_BL == process.mask_id)
  return token_mean(nll_BL, batch), ({"masked": masked}, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
  """How one network is trained on a NELBO; see `MethodOptions`."""


def make(*, model: DiT, process: Absorbing, optimizers: Optimizers, **options: Any) -> Objective:
  """Build training of one tree, "model", on the continuous-time NELBO.

  Args:
    model: the network.
    process: absorbing.
    optimizers: "model".
    **options: fields of `Options`.

  Reference: MDLM, arXiv 2406.07524, equation 10.
  """
  chosen = Options.of(options)
  check_class("model.name", model, NETWORK, "a denoiser is trained")
  total = functools.partial(loss, model=model, process=process)

  def step(state, batch):
    batch = counted(batch)
    state, metrics, _ = update(state, "model", total, batch, optimizers["model"], **chosen.updates)
    return state.replace(step=state.step + 1), metrics

  return Objective(init_alone(model, optimizers["model"], chosen), step, output="model")
