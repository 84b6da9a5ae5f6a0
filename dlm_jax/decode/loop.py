# SPDX-License-Identifier: Apache-2.0
"""`decode`: rounds of block or speculative decoding until every row is done, all on the device.

A server does the same with other hands: `init` once, then `admit` and `round` as requests come.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key

from dlm_jax.arrays import Params
from dlm_jax.decode.interfaces import Rounds, RowOptions, row_keys
from dlm_jax.decode.progress import UNDECIDED, up_to
from dlm_jax.errors import InputError

PAD_ID = 0  # what the result holds beyond a row's length


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
    counts: int32 [B] each, what else the state counts under that name; {} if nothing.
  """

  lengths_B: Any
  prompt_B: Any
  step_BL: Any
  log_prob_BL: Any
  passes_B: Any
  reason_B: Any
  counts: Any = flax.struct.field(default_factory=dict)


def decode(
  rounds: Rounds,
  params: Params,
  prompt: Int[Array | np.ndarray, "B P"],
  rng: Key[Array, "*batch"],
  *,
  max_length: int | Int[Array | np.ndarray, "..."] | None = None,
  lengths: Int[Array | np.ndarray, "B"] | None = None,
  options: RowOptions | None = None,
  on_round: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> tuple[Int[Array, "B L"], Info]:
  """Continue prompts until each row has a stop id or its maximum length.

  Pure and unjitted: one `lax.while_loop` on the device, so the whole call may be inside your own
  `jit`. Row i uses `fold_in(rng, i)` only: batch size and order never change it (in float32).

  Args:
    rounds: from `block_decoder` or another maker; they fix the window L.
    params: of the network, or whatever the rounds were made for.
    prompt: int32 [B, P], P ≤ L; rows padded on the right with anything. See `pad_prompts`.
    rng: one typed key, or one per row, which then are used as they are.
    max_length: tokens per row, prompt included, one for all or one each; None: the options' limit,
      by default the window.
    lengths: tokens of each prompt, 0 … P; None: P.
    options: what each row asks for, see `RowOptions.make`; its keys are those of `rng`. None: its
      defaults.
    on_round: called on the host after each round with numpy arrays: tokens [B, L] and the length of
      each row's decided prefix, for streaming. The loop then is on the host, a jitted round each.

  Returns:
    int32 tokens [B, L], prompt included, 0 beyond a row's length, and an `Info`.

  Raises:
    InputError: shapes do not fit, or a value is out of range as far as it is known outside `jit`.
      Inside, a `max_length` above the window means the window.

  Example:
    >>> import jax
    >>> from dlm_jax import models, sample
    >>> model = models.Decoder(models.DecoderConfig(
    ...   vocab_size=9, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8))
    >>> prompt, lengths = sample.pad_prompts([[1, 2, 3], [4]])
    >>> params = model.init(jax.random.key(0), prompt)["params"]
    >>> rule = sample.BlockRule(block_length=4, mask_id=8)
    >>> rounds = sample.block_decoder(model, rule, max_length=10)
    >>> options = sample.RowOptions.make(2, temperature=[0.0, 0.7], stop_ids=[0])
    >>> tokens, info = sample.decode(
    ...   rounds, params, prompt, jax.random.key(1), lengths=lengths, options=options)
    >>> tokens.shape
    (2, 10)
  """
  state = start(
    rounds, params, prompt, rng, max_length=max_length, lengths=lengths, options=options
  )
  if on_round is None:
    return _result(finish(rounds, params, state))
  one_round = jax.jit(rounds.round)
  for _ in range(_most(state)):
    if np.all(rounds.done(state)):
      break
    state = one_round(params, state)
    tokens_BL, info = _result(state)
    on_round(np.asarray(tokens_BL), np.asarray(info.lengths_B))
  return _result(state)


def start(
  rounds: Rounds,
  params: Params,
  prompt: ArrayLike,
  rng: Array,
  *,
  max_length: ArrayLike | None = None,
  lengths: ArrayLike | None = None,
  options: RowOptions | None = None,
) -> Any:
  """Return the state of a batch that has just these prompts, all admitted at once.

  Arguments are those of `decode`, which calls this.
  """
  rows = jnp.shape(prompt)[0]
  options = RowOptions.make(rows) if options is None else options
  if options.temperature_B.shape != (rows,):
    raise InputError(
      f"options are of {options.temperature_B.shape[0]} rows and there are {rows} prompts."
    )
  state = rounds.init(rows, options.stop_BS.shape[1], options.law)
  options = options.replace(rng_B=row_keys(rng, rows))
  if max_length is not None:
    limit_B = up_to("max_length", max_length, rows, state.progress.window)
    options = options.replace(limit_B=limit_B)
  return rounds.admit(params, state, jnp.arange(rows), prompt, lengths, options)


def finish(rounds: Rounds, params: Params, state: Any) -> Any:
  """Return the state after the round in which the last row is done; one loop on the device.

  At most W rounds: each settles a position of every running row.
  """

  def some_left(carry):
    state, count = carry
    return (count < _most(state)) & ~jnp.all(rounds.done(state))

  one_more = lambda carry: (rounds.round(params, carry[0]), carry[1] + 1)  # noqa: E731
  return jax.lax.while_loop(some_left, one_more, (state, jnp.zeros((), jnp.int32)))[0]


def _most(state):
  """Return how many rounds end every row: as many as a row has positions."""
  return state.progress.tokens_BW.shape[1]


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
