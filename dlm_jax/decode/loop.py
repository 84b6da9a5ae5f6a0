# SPDX-License-Identifier: Apache-2.0
"""`decode`: rounds of block or speculative decoding until every row is done, all on the device.

A decoder is three pure functions. Its state holds a `Progress` under that name, the part that every
decoder shares and that the result is read from; the rest (caches, drafts) is its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from dlm_jax.arrays import Params
from dlm_jax.decode.progress import UNDECIDED
from dlm_jax.errors import InputError

PAD_ID = 0  # what the result holds beyond a row's length


class Decoder(NamedTuple):
  """Three pure functions; `decode` calls them.

  Attributes:
    init: (params, prompt_BP, rng, lengths_B, max_length) -> state, the prompt encoded; the
      arguments are those of `decode`; `progress.begin` checks them.
    round: (params, state) -> state; every running row gains at least one token or ends, and rows
      that are done stay as they are.
    done: state -> bool [B].
  """

  init: Callable[..., Any]
  round: Callable[[Params, Any], Any]
  done: Callable[[Any], Array]


@flax.struct.dataclass
class Info:
  """What `decode` knows about its tokens, L being the window.

  Attributes:
    lengths_B: tokens of each row, prompt included; what follows is 0.
    prompt_B: of these, tokens of the prompt.
    step_BL: the reveal step inside its block of every generated token, −1 elsewhere.
    log_prob_BL: log-probability of every generated token when it was revealed, nats, after
      temperature and before top-k and top-p; 0 elsewhere.
    passes_B: network passes of the row, without the one over the prompt.
    reason_B: 1 (STOP): a stop id; 2 (LENGTH): the limit.
    counts: int32 [B] each, what else the decoder's state counts under that name; {} if nothing.
  """

  lengths_B: Any
  prompt_B: Any
  step_BL: Any
  log_prob_BL: Any
  passes_B: Any
  reason_B: Any
  counts: Any = flax.struct.field(default_factory=dict)


def decode(
  decoder: Decoder,
  params: Params,
  prompt: Int[Array | np.ndarray, "B P"],
  rng: Key[Array, "*batch"],
  *,
  max_length: int | Int[Array | np.ndarray, "..."] | None = None,
  lengths: Int[Array | np.ndarray, "B"] | None = None,
  on_round: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> tuple[Int[Array, "B L"], Info]:
  """Continue prompts until each row has a stop id or its maximum length.

  Pure and unjitted: one `lax.while_loop` on the device, so the whole call may be inside your own
  `jit`. Row i uses `fold_in(rng, i)` only: batch size and order never change it (in float32).

  Args:
    decoder: from `block_decoder` or another maker; it fixes the window L.
    params: of the network, or whatever the decoder was made for.
    prompt: int32 [B, P], P ≤ L; rows padded on the right with anything. See `pad_prompts`.
    rng: one typed key, or one per row, which then are used as they are.
    max_length: tokens per row, prompt included, one for all or one each; None: the window.
    lengths: tokens of each prompt, 0 … P; None: P.
    on_round: called on the host after each round with numpy arrays: tokens [B, L] and the length of
      each row's decided prefix, for streaming. The loop then is on the host, a jitted round each.

  Returns:
    int32 tokens [B, L], prompt included, 0 beyond a row's length, and an `Info`.

  Raises:
    InputError: shapes do not fit, or a length is out of range as far as it is known outside `jit`.
      Inside, a `max_length` above the window means the window.

  Example:
    >>> import jax
    >>> from dlm_jax import models, sample
    >>> model = models.Decoder(models.DecoderConfig(
    ...   vocab_size=9, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8))
    >>> prompt, lengths = sample.pad_prompts([[1, 2, 3], [4]])
    >>> params = model.init(jax.random.key(0), prompt)["params"]
    >>> options = sample.BlockOptions(block_length=4, mask_id=8, stop_ids=(0,))
    >>> decoder = sample.block_decoder(model, options, max_length=10)
    >>> tokens, info = sample.decode(
    ...   decoder, params, prompt, jax.random.key(1), lengths=lengths, max_length=10)
    >>> tokens.shape
    (2, 10)
  """
  state = decoder.init(params, prompt, rng, lengths, max_length)
  if on_round is None:
    return _result(finish(decoder, params, state))
  one_round = jax.jit(decoder.round)
  while not np.all(decoder.done(state)):
    state = one_round(params, state)
    tokens_BL, info = _result(state)
    on_round(np.asarray(tokens_BL), np.asarray(info.lengths_B))
  return _result(state)


def finish(decoder: Decoder, params: Params, state: Any) -> Any:
  """Return the state after the round in which the last row is done; one loop on the device."""
  return jax.lax.while_loop(
    lambda state: ~jnp.all(decoder.done(state)),
    lambda state: decoder.round(params, state),
    state,
  )


def _result(state):
  progress = state.progress
  window = progress.window
  kept_BL = jnp.arange(window)[None, :] < progress.length_B[:, None]
  tokens_BL = jnp.where(kept_BL, progress.tokens_BW[:, :window], PAD_ID)
  return tokens_BL, Info(
    lengths_B=progress.length_B,
    prompt_B=progress.prompt_B,
    step_BL=jnp.where(kept_BL, progress.step_BW[:, :window], UNDECIDED),
    log_prob_BL=jnp.where(kept_BL, progress.log_prob_BW[:, :window], 0.0),
    passes_B=progress.passes_B,
    reason_B=progress.reason_B,
    counts=getattr(state, "counts", {}),
  )


def pad_prompts(
  prompts: Sequence[Sequence[int]], length: int | None = None
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
  """Return prompts of different lengths as one padded array and their lengths.

  Args:
    prompts: token ids of each row; a row may be empty.
    length: P; prompts padded to one of a few lengths share a compiled program. None: the longest.

  Raises:
    InputError: there is no prompt, or one is longer than `length`.
  """
  if not prompts:
    raise InputError("prompts is empty: give at least one row, which may have no tokens.")
  lengths = [len(prompt) for prompt in prompts]
  length = max(lengths) if length is None else length
  if max(lengths) > length:
    raise InputError(f"a prompt has {max(lengths)} tokens and length={length}; raise it.")
  prompt_BP = np.zeros((len(prompts), length), np.int32)
  for row, prompt in enumerate(prompts):
    prompt_BP[row, : len(prompt)] = prompt
  return jnp.asarray(prompt_BP), jnp.asarray(lengths, jnp.int32)
