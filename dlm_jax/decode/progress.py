# SPDX-License-Identifier: Apache-2.0
"""What every decoder's state holds: tokens, when and how surely they were decided, why rows ended.

A decoder writes what it decides with `record`, and `advance` finds out which rows that ends.

The leaves are typed `Any`: a tree of shardings or of None has the same structure.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.errors import InputError

RUNNING, STOP, LENGTH = range(3)
UNDECIDED = -1  # the reveal step of what no step has revealed, and of the prompt


@flax.struct.dataclass
class Progress:
  """How far each row has come; W positions, the window filled up to whole blocks.

  Attributes:
    tokens_BW: prompt and decided tokens, the mask elsewhere.
    step_BW: reveal step inside the block, from 0; UNDECIDED where masked and in the prompt.
    log_prob_BW: log-probability of a token when it was revealed, nats; 0 elsewhere.
    prompt_B: tokens of the prompt.
    limit_B: the length at which a row ends, prompt included.
    length_B: the contiguous decided prefix, cut at the limit and after a stop id.
    passes_B: network passes that decided or stored something of the row, without the prefill.
    reason_B: why the row ended: RUNNING, STOP or LENGTH.
    rng_B: one key per row.
    window: L ≤ W, tokens of the result.
  """

  tokens_BW: Any
  step_BW: Any
  log_prob_BW: Any
  prompt_B: Any
  limit_B: Any
  length_B: Any
  passes_B: Any
  reason_B: Any
  rng_B: Any
  window: int = flax.struct.field(pytree_node=False)

  @property
  def running_B(self) -> Bool[Array, "B"]:
    return self.reason_B == RUNNING

  @property
  def masked_BW(self) -> Bool[Array, "B W"]:
    """Positions after the prompt that no step has revealed."""
    after_BW = jnp.arange(self.tokens_BW.shape[1])[None, :] >= self.prompt_B[:, None]
    return after_BW & (self.step_BW == UNDECIDED)


def begin(
  prompt: ArrayLike,
  rng: Array,
  lengths: ArrayLike | None,
  max_length: ArrayLike | None,
  *,
  window: int,
  block_length: int,
  mask_id: int,
) -> Progress:
  """Return the progress of prompts before the first round.

  A row whose prompt reaches its maximum length is done and keeps its prompt.

  Args:
    prompt: what `decode` was given; so are rng, lengths and max_length.
    rng: as above.
    lengths: as above.
    max_length: as above.
    window: L.
    block_length: W is a multiple of it.
    mask_id: what undecided positions hold.

  Raises:
    InputError: see `decode`.
  """
  prompt_BP = jnp.asarray(prompt, jnp.int32)
  if prompt_BP.ndim != 2 or prompt_BP.shape[1] > window:
    raise InputError(
      f"the prompt has shape {prompt_BP.shape}; it must be [rows, tokens] of at most "
      f"max_length={window} tokens, the window of the decoder."
    )
  batch, columns = prompt_BP.shape
  lengths_B = _per_row("lengths", columns if lengths is None else lengths, batch, columns)
  limit_B = _per_row("max_length", window if max_length is None else max_length, batch, window)
  size = -(-window // block_length) * block_length
  tokens_BW = jnp.pad(prompt_BP, ((0, 0), (0, size - columns)))
  given_BW = jnp.arange(size)[None, :] < lengths_B[:, None]
  progress = Progress(
    tokens_BW=jnp.where(given_BW, tokens_BW, mask_id),
    step_BW=jnp.full((batch, size), UNDECIDED, jnp.int32),
    log_prob_BW=jnp.zeros((batch, size), jnp.float32),
    prompt_B=lengths_B,
    limit_B=limit_B,
    length_B=lengths_B,
    passes_B=jnp.zeros(batch, jnp.int32),
    reason_B=jnp.full(batch, RUNNING, jnp.int32),
    rng_B=_keys(rng, batch),
    window=window,
  )
  return advance(progress, ())


def _per_row(name, given, batch, most):
  """Return int32 [B] in 0 … most; raise for a value outside if values are known."""
  if not isinstance(given, jax.core.Tracer):
    given = np.asarray(given)
    if given.size and not (given.min() >= 0 and given.max() <= most):
      raise InputError(f"{name}={given.tolist()} must be in 0 … {most}.")
  given = jnp.asarray(given, jnp.int32)
  if given.shape not in ((), (batch,)):
    raise InputError(
      f"{name} has shape {given.shape}; give one number, or one for each of {batch} rows."
    )
  return jnp.broadcast_to(jnp.clip(given, 0, most), (batch,))


def _keys(rng, batch):
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise InputError(f"rng has dtype {rng.dtype}; make a typed key with jax.random.key(seed).")
  if rng.shape not in ((), (batch,)):
    raise InputError(f"rng has shape {rng.shape}; give one key, or one for each of {batch} rows.")
  if rng.shape:
    return rng
  return jax.vmap(lambda row: jax.random.fold_in(rng, row))(jnp.arange(batch))


def at_positions(rows_BW: Array, position_BK: Int[Array, "B K"]) -> Array:
  """Return what lies at positions; those outside, of rows that are done, give anything."""
  return jnp.take_along_axis(rows_BW, position_BK, axis=1, mode="clip")


def record(
  progress: Progress,
  position_BK: Int[Array, "B K"],
  revealed_BK: Bool[Array, "B K"],
  tokens_BK: Int[Array, "B K"],
  step_BK: Int[Array, "B K"],
  log_prob_BK: Float[Array, "B K"],
) -> Progress:
  """Write tokens, their reveal steps and log-probabilities where they were revealed.

  Args:
    progress: what was known before.
    position_BK: absolute positions, different ones in a row.
    revealed_BK: which of them to write; positions elsewhere may be anything.
    tokens_BK: their tokens.
    step_BK: the steps inside their blocks.
    log_prob_BK: nats.
  """
  size = progress.tokens_BW.shape[1]
  target_BK = jnp.where(revealed_BK, position_BK, size)  # out of range: dropped
  row_B1 = jnp.arange(target_BK.shape[0])[:, None]
  put = lambda old, new: old.at[row_B1, target_BK].set(new.astype(old.dtype), mode="drop")  # noqa: E731
  return progress.replace(
    tokens_BW=put(progress.tokens_BW, tokens_BK),
    step_BW=put(progress.step_BW, step_BK),
    log_prob_BW=put(progress.log_prob_BW, log_prob_BK),
  )


def advance(progress: Progress, stop_ids: Sequence[int]) -> Progress:
  """Return the progress with the length of each running row's decided prefix, and who ended.

  A row ends after the first stop id in the prefix behind its prompt, or at its limit, whichever is
  first. Rows that had ended stay as they are.
  """
  size = progress.tokens_BW.shape[1]
  position_1W = jnp.arange(size)[None, :]
  first = lambda which_BW: jnp.min(jnp.where(which_BW, position_1W, size), axis=-1)  # noqa: E731
  prefix_B = jnp.minimum(first(progress.masked_BW), progress.limit_B)
  is_stop_BW = jnp.zeros_like(progress.masked_BW)
  for stop_id in stop_ids:
    is_stop_BW |= progress.tokens_BW == stop_id
  stop_B = first(is_stop_BW & (position_1W >= progress.prompt_B[:, None]))
  stopped_B = stop_B < prefix_B
  length_B = jnp.where(stopped_B, stop_B + 1, prefix_B)
  full_B = prefix_B >= progress.limit_B
  reason_B = jnp.where(stopped_B, STOP, jnp.where(full_B, LENGTH, RUNNING))
  running_B = progress.running_B
  return progress.replace(
    length_B=jnp.where(running_B, jnp.maximum(length_B, progress.prompt_B), progress.length_B),
    reason_B=jnp.where(running_B, reason_B, progress.reason_B),
  )
