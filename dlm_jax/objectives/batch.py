# SPDX-License-Identifier: Apache-2.0
"""What a method gets to see: records with a key and a time per sequence, and which tokens count."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import BoolBL, FloatB, FloatBL, KeyB, Record, RngKey

Batch = dict[str, Any]


def stratified_times(rng_B: KeyB, eps: float) -> FloatB:
  """Draw one time per sequence, stratified over the batch: t = (1 − ε) u + ε, u_i ∈ [i/B, (i+1)/B).

  Sequence i owns stratum i, so a time depends on its own key and place only.
  """
  size = rng_B.shape[0]
  u_B = jax.vmap(jax.random.uniform)(rng_B)
  return (1 - eps) * ((u_B + jnp.arange(size)) / size) + eps


def draw_batch(record: Record, rng: RngKey, *, eps: float = 1e-3) -> Batch:
  """Add one key and one stratified time per sequence to records.

  Args:
    record: the global batch; cut into micro-batches only afterwards.
    rng: this batch's key.
    eps: smallest time.

  Returns:
    The record, "rng" (B keys) and "t" (float32 [B]).
  """
  size = record["tokens"].shape[0]
  rng_B = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(size))
  rng_B, rng_time_B = split_each(rng_B, 2)
  return {**record, "rng": rng_B, "t": stratified_times(rng_time_B, eps)}


def split_each(rng_B: KeyB, count: int) -> tuple[KeyB, ...]:
  """Split every sequence's key; return `count` arrays of keys."""
  keys = jax.vmap(lambda rng: jax.random.split(rng, count))(rng_B)
  return tuple(keys[:, i] for i in range(count))


def fold_each(rng_B: KeyB, tag: Int[Array, ""] | int) -> KeyB:
  """Fold a number into every sequence's key."""
  return jax.vmap(jax.random.fold_in, (0, None))(rng_B, tag)


def valid_tokens(batch: Batch) -> BoolBL:
  """Return where tokens are scored: everywhere without prompts."""
  return batch["valid"] if "valid" in batch else jnp.ones(batch["tokens"].shape, bool)


def counted(batch: Batch, skip: int = 0) -> Batch:
  """Add to a whole batch "count": its valid tokens per row, on average, in every row.

  So a mean over all of them is one whatever the micro-batches that it is taken in. The first `skip`
  tokens of a row do not count. A batch without "valid" stays as it is.
  """
  if "valid" not in batch:
    return batch
  rows = batch["valid"].shape[0]
  count = jnp.maximum(batch["valid"][:, skip:].sum() / rows, 1 / rows)
  return {**batch, "count": jnp.broadcast_to(count, (rows,))}


def position_weights(batch: Batch, shape: tuple[int, ...], *, by_sequence: bool) -> FloatBL:
  """Return weights of positions that make a sum L times a mean over valid tokens.

  Args:
    batch: with "valid", or all tokens count.
    shape: [B, L].
    by_sequence: a mean in each sequence first, then over sequences; else over all of them at once.
  """
  if "valid" not in batch:
    return jnp.full(shape, 1 / shape[0], jnp.float32)
  valid_BL = batch["valid"]
  count_B = jnp.maximum(valid_BL.sum(1), 1)
  if not by_sequence:
    count_B = (batch if "count" in batch else counted(batch))["count"]
  return valid_BL * (shape[1] / shape[0] / count_B[:, None])


def token_mean(loss_BL: FloatBL, batch: Batch) -> Float[Array, ""]:
  """Return the mean over all valid tokens of the whole batch, see `counted`; 0 without any.

  Rows with more valid tokens weigh more, as in the public MDLM and Duo code.
  """
  if "valid" not in batch:
    return loss_BL.mean()
  batch = batch if "count" in batch else counted(batch)
  return jnp.mean((loss_BL * batch["valid"]).sum(1) / batch["count"])
