# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: trains the judge, and the autoregressive baseline."""

import functools

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dlm_jax.arrays import Metrics, Params
from dlm_jax.models import Causal, Decoder, next_token_logits
from dlm_jax.objectives.batch import Batch
from dlm_jax.objectives.state import Objective, make_state, update

TRAINED = ("model",)  # trees with an optimiser


def loss(
  params: Params, batch: Batch, *, model: Causal | Decoder, train: bool = True
) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the mean negative log-likelihood of valid tokens 1 … L − 1, in nats per token.

  Token 0 is the document separator that every record starts with; it is given, not predicted.
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
    weight_BL = batch["valid"][:, 1:].astype(nll_BL.dtype)
    return jnp.sum(nll_BL * weight_BL) / jnp.maximum(weight_BL.sum(), 1), ({}, None)
  return nll_BL.mean(), ({}, None)


def make(
  *,
  model: Causal | Decoder,
  process=None,
  optimizers: dict[str, optax.GradientTransformation],
  accumulate: int = 1,
  ema_decay: float | None = 0.999,
) -> Objective:
  """Build autoregressive training of one tree, "model". `process` is not used.

  A decoder's softmax runs over all its rows, the mask's included, which is never a target.

  Reference: A Neural Probabilistic Language Model, JMLR 3 (2003); the chain rule of probability.
  """
  del process
  if not isinstance(model, Causal | Decoder):
    raise ValueError("model.name must be causal or decoder: tokens are predicted one by one.")
  tx = optimizers["model"]

  def init(rng, teacher_params=None):
    params = teacher_params
    if params is None:
      tokens = jnp.zeros((1, model.config.length), jnp.int32)
      params = model.init(rng, tokens)["params"]
    return make_state({"model": params}, {"model": tx}, ("model",) if ema_decay else ())

  def step(state, batch):
    state, metrics, _ = update(
      state,
      "model",
      functools.partial(loss, model=model),
      batch,
      tx,
      accumulate=accumulate,
      decay=ema_decay,
    )
    return state.replace(step=state.step + 1), metrics

  return Objective(init, step, output="model")
