# SPDX-License-Identifier: Apache-2.0
"""What every state holds: tokens, when and how surely they were decided, what rows ask for.

A way of decoding writes what it decides with `record`, and `advance` finds out which rows that
ends. `begin` makes the rows of new prompts, and `place` puts rows into a running batch.

The leaves are typed `Any`: a tree of shardings or of None has the same structure.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.decode.interfaces import LAWS, NO_ID, NO_LIMIT, RowOptions, known, per_row
from dlm_jax.errors import InputError, check_choice

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
    length_B: the contiguous decided prefix, cut at the limit and after a stop id.
    passes_B: network passes that decided or stored something of the row, without the prefill.
    reason_B: why the row ended: RUNNING, STOP or LENGTH, which free rows have too.
    options: the `RowOptions`; limits are at most the window.
    window: L ≤ W, tokens of the result.
  """

  tokens_BW: Any
  step_BW: Any
  log_prob_BW: Any
  prompt_B: Any
  length_B: Any
  passes_B: Any
  reason_B: Any
  options: Any
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
  lengths: ArrayLike | None,
  options: RowOptions,
  *,
  window: int,
  block_length: int,
  mask_id: int,
) -> Progress:
  """Return the rows of new prompts before their first round.

  A row whose prompt reaches its limit is done and keeps its prompt.

  Args:
    prompt: [R, P] with P ≤ window, padded on the right with anything.
    lengths: tokens of each prompt, 0 … P; None: P.
    options: of these rows.
    window: L.
    block_length: W is a multiple of it.
    mask_id: what undecided positions hold.

  Raises:
    InputError: shapes do not fit; or, as far as values are known, lengths or limits are out of
      range or the mask is a stop id.
  """
  prompt_BP = jnp.asarray(prompt, jnp.int32)
  if prompt_BP.ndim != 2 or prompt_BP.shape[1] > window:
    raise InputError(
      f"the prompt has shape {prompt_BP.shape}; it must be [rows, tokens] of at most "
      f"max_length={window} tokens, the window of the decoder."
    )
  rows, columns = prompt_BP.shape
  lengths_B = up_to("lengths", columns if lengths is None else lengths, rows, columns)
  options = options.replace(limit_B=up_to("max_length", options.limit_B, rows, window))
  if known(options.stop_BS) and np.any(np.asarray(options.stop_BS) == mask_id):
    raise InputError(f"mask_id={mask_id} is among stop_ids: the mask must not be a stop id.")
  size = -(-window // block_length) * block_length
  tokens_BW = jnp.pad(prompt_BP, ((0, 0), (0, size - columns)))
  given_BW = jnp.arange(size)[None, :] < lengths_B[:, None]
  progress = Progress(
    tokens_BW=jnp.where(given_BW, tokens_BW, mask_id),
    step_BW=jnp.full((rows, size), UNDECIDED, jnp.int32),
    log_prob_BW=jnp.zeros((rows, size), jnp.float32),
    prompt_B=lengths_B,
    length_B=lengths_B,
    passes_B=jnp.zeros(rows, jnp.int32),
    reason_B=jnp.full(rows, RUNNING, jnp.int32),
    options=options,
    window=window,
  )
  return advance(progress)


def free(slots: int, stop_width: int, law: str, **shape: int) -> Progress:
  """Return free rows, which are done.

  Args:
    slots: how many.
    stop_width: stop ids that each has room for.
    law: the most that rows will ask for, see `RowOptions`.
    **shape: window, block_length and mask_id, as of `begin`.
  """
  check_choice("law", law, LAWS)
  options = RowOptions.make(
    slots, jax.random.key(0), limit=0, stop_ids=np.full((slots, stop_width), NO_ID)
  )
  return begin(np.zeros((slots, 0), np.int32), None, options.replace(law=law), **shape)


def place(tree: Any, row_R: Int[Array, "R"], new: Any) -> Any:
  """Return a tree of rows [B, …] in which some are those of another tree, [R, …].

  Rows beyond the last are dropped.
  """
  return jax.tree.map(lambda x, y: x.at[row_R].set(y, mode="drop"), tree, new)


def up_to(name: str, given: Any, rows: int, most: int) -> Int[Array, "B"]:
  """Return int32 [B] in 0 … most, `NO_LIMIT` being most.

  Raises:
    InputError: a value is outside, as far as it is known outside `jit`; see `per_row`.
  """
  if known(given):
    values = np.asarray(given)
    if np.any((values < 0) | ((values > most) & (values != NO_LIMIT))):
      raise InputError(f"{name}={values.tolist()} must be in 0 … {most}.")
  return jnp.clip(per_row(name, given, rows), 0, most)


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


def advance(progress: Progress) -> Progress:
  """Return the progress with the length of each running row's decided prefix, and who ended.

  A row ends after its first stop id in the prefix behind its prompt, or at its limit, whichever is
  first. Rows that had ended stay as they are.
  """
  size, options = progress.tokens_BW.shape[1], progress.options
  position_1W = jnp.arange(size)[None, :]
  first = lambda which_BW: jnp.min(jnp.where(which_BW, position_1W, size), axis=-1)  # noqa: E731
  prefix_B = jnp.minimum(first(progress.masked_BW), options.limit_B)
  stop_BS1 = options.stop_BS[..., None]
  is_stop_BW = jnp.any((progress.tokens_BW[:, None, :] == stop_BS1) & (stop_BS1 >= 0), axis=1)
  stop_B = first(is_stop_BW & (position_1W >= progress.prompt_B[:, None]))
  stopped_B = stop_B < prefix_B
  length_B = jnp.where(stopped_B, stop_B + 1, prefix_B)
  full_B = prefix_B >= options.limit_B
  reason_B = jnp.where(stopped_B, STOP, jnp.where(full_B, LENGTH, RUNNING))
  running_B = progress.running_B
  return progress.replace(
    length_B=jnp.where(running_B, jnp.maximum(length_B, progress.prompt_B), progress.length_B),
    reason_B=jnp.where(running_B, reason_B, progress.reason_B),
  )
