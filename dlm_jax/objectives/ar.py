# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: trains the judge, and the autoregressive baseline."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dlm_jax.arrays import Metrics, Params
from dlm_jax.models import Causal, Decoder, next_token_logits
from dlm_jax.objectives.batch import Batch, counted
from dlm_jax.objectives.options import MethodOptions
from dlm_jax.objectives.state import Objective, Optimizers, check_class, init_alone, update

TRAINED = ("model",)  # trees with an optimiser
NETWORK = (Causal, Decoder)  # classes of networks that it trains
PASSES = (1, 1)  # forward and backward passes of the network that a step needs at least


def loss(
  params: Params, batch: Batch, *, model: Causal | Decoder, train: bool = True
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the mean negative log-likelihood of valid tokens 1 … L − 1, in nats per token.

  Token 0 is the document separator that every record starts with; it is given, not predicted.
  Rows with more valid tokens weigh more: see `counted`.
  Sequences that share a row ("position", "segment") are kept apart by a decoder; other networks
  take no such rows.
  """
  tokens_BL = batch["tokens"]
  places = {name: batch[name] for name in ("position", "segment") if name in batch}
  logits_BLV = next_token_logits(
    model, params, tokens_BL, batch["rng"] if train else None, **places
  )
  nll_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV[:, :-1], tokens_BL[:, 1:])
  if "valid" in batch:
    batch = batch if "count" in batch else counted(batch, skip=1)
    return jnp.mean((nll_BL * batch["valid"][:, 1:]).sum(1) / batch["count"]), ({}, None)
  return nll_BL.mean(), ({}, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
  """How tokens are learnt one by one; see `MethodOptions`."""

  ema_decay: float | None = 0.999


def make(
  *, model: Causal | Decoder, process=None, optimizers: Optimizers, **options: Any
) -> Objective:
  """Build autoregressive training of one tree, "model". `process` is not used.

  A decoder's softmax runs over all its rows, the mask's included, which is never a target.

  Args:
    model: the network.
    process: none is needed.
    optimizers: "model".
    **options: fields of `Options`.

  Reference: A Neural Probabilistic Language Model, JMLR 3 (2003); the chain rule of probability.
  """
  del process
  chosen = Options.of(options)
  check_class("model.name", model, NETWORK, "tokens are predicted one by one")
  total = functools.partial(loss, model=model)

  def step(state, batch):
    batch = counted(batch, skip=1)
    state, metrics, _ = update(state, "model", total, batch, optimizers["model"], **chosen.updates)
    return state.replace(step=state.step + 1), metrics

  init = init_alone(model, optimizers["model"], chosen, timed=False)
  return Objective(init, step, output="model")
