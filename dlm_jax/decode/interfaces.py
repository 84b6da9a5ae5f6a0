# SPDX-License-Identifier: Apache-2.0
"""What a way of decoding is, `Rounds`, and what belongs to one request, `RowOptions`.

A batch is a number of slots. Prompts enter slots that are free, at any round, and leave when they
are done; nothing of a row depends on its slot, on its neighbours or on who was there before.

The leaves of options are typed `Any`: a tree of shardings or of None has the same structure.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Key

from dlm_jax.arrays import Params
from dlm_jax.errors import InputError

STOP_WIDTH = 16  # stop ids that a row of an empty batch has room for
NO_LIMIT = 2**31 - 1
COLD = 1e-6  # temperatures below are 0: logits are no finer, and over less they overflow
NO_ID = -1  # fills up rows of stop ids; no token has it
LAWS = ("greedy", "drawn", "any")  # each has what those before it have


class Rounds(NamedTuple):
  """A way of decoding as pure functions; a state is a pytree and has a `progress`.

  A round of a running row settles at least one position of its window. So W rounds end every row,
  W being the width of `state.progress.tokens_BW`: the bound of every loop over rounds.

  Attributes:
    init: (slots, stop_width=STOP_WIDTH, law="any") -> state of so many free rows, which will not
      ask for more than this law, see `RowOptions`.
    admit: (params, state, row_R, prompt_RP, lengths_R, options) -> state in which R rows are those
      of new prompts, all of them reset, and the others are as they were, bit for bit. Rows are
      different numbers; one beyond the last admits nothing, which fills up a fixed R. lengths None:
      P each. `options` are R rows of `RowOptions`, keys included.
    round: (params, state) -> state; rows that are done stay as they are.
    done: state -> bool [B]; free rows are done.
  """

  init: Callable[..., Any]
  admit: Callable[..., Any]
  round: Callable[[Params, Any], Any]
  done: Callable[[Any], Array]


@flax.struct.dataclass
class RowOptions:
  """What one request asks for: arrays per row, so other values are no other program.

  The law is the exception. What rows may ask for costs something in every pass, also where they do
  not: asking the device is a round trip to the host, which small networks notice.

  Attributes:
    temperature_B: divides the logits; 0, or less than 1e-6, takes the most probable token, and
      confidence is then that of temperature 1.
    top_k_B: draw from the k most probable tokens and their ties; 0: all.
    top_p_B: draw from the smallest set of this mass; 1: all.
    threshold_B: of the strategy "low_confidence_dynamic"; above 1 it is the static one.
    stop_BS: ids after which a row ends, padded with −1; those of the prompt do not count.
    minimum_B: so many new tokens are no stop ids: these have no probability there.
    limit_B: the length at which a row ends, prompt included; above the window it is the window.
    rng_B: a key per row; None: `decode` makes them.
    law: the most that rows ask for; it shapes the program. "greedy": temperature 0, and neither
      top-k, top-p nor a minimum. "drawn": any temperature, and none of the others. "any": all of
      it. `make` finds it; whoever replaces values by others that ask for more replaces it too.
  """

  temperature_B: Any
  top_k_B: Any
  top_p_B: Any
  threshold_B: Any
  stop_BS: Any
  minimum_B: Any
  limit_B: Any
  rng_B: Any = None
  law: str = flax.struct.field(pytree_node=False, default="any")

  @classmethod
  def make(
    cls,
    rows: int,
    rng: Array | None = None,
    *,
    temperature: ArrayLike | Sequence[Any] = 1.0,
    top_k: ArrayLike | Sequence[Any] = 0,
    top_p: ArrayLike | Sequence[Any] = 1.0,
    threshold: ArrayLike | Sequence[Any] = 0.9,
    stop_ids: ArrayLike | Sequence[Any] = (),
    minimum: ArrayLike | Sequence[Any] = 0,
    limit: ArrayLike | Sequence[Any] | None = None,
  ) -> "RowOptions":
    """Return options; each argument is one value for all rows, or one per row.

    Args:
      rows: how many.
      rng: one key, of which row i takes the child i, or one per row; None: none yet.
      temperature: see the class; so are the others.
      top_k: as above.
      top_p: as above.
      threshold: as above.
      stop_ids: one list for all rows, or one list per row, of any lengths.
      minimum: as above.
      limit: as above; None: the window.

    Raises:
      InputError: a value is out of range, as far as it is known outside `jit`, or misshapen.
    """
    _check_law(temperature, top_k, top_p)
    _check_least("threshold", threshold)
    _check_least("minimum", minimum)
    limit = NO_LIMIT if limit is None else limit
    _check_least("limit", limit)
    return cls(
      temperature_B=per_row("temperature", temperature, rows, jnp.float32),
      top_k_B=per_row("top_k", top_k, rows),
      top_p_B=per_row("top_p", top_p, rows, jnp.float32),
      threshold_B=per_row("threshold", threshold, rows, jnp.float32),
      stop_BS=_stop_rows(stop_ids, rows),
      minimum_B=per_row("minimum", minimum, rows),
      limit_B=per_row("limit", limit, rows),
      rng_B=None if rng is None else row_keys(rng, rows),
      law=_least_law(temperature, top_k, top_p, minimum),
    )

  @property
  def draws_B(self) -> Bool[Array, "B"]:
    """Rows whose tokens are drawn, not the most probable ones."""
    return self.temperature_B >= COLD

  @property
  def truncates_B(self) -> Bool[Array, "B"]:
    """Rows with top-k or top-p."""
    return (self.top_k_B > 0) | (self.top_p_B < 1)

  def only(self, running_B: Bool[Array, "B"]) -> "RowOptions":
    """Return options in which other rows ask for nothing that costs a pass."""
    if self.law != "any":
      return self
    put = lambda x_B, plain: jnp.where(running_B, x_B, plain)  # noqa: E731
    return self.replace(
      temperature_B=put(self.temperature_B, 0.0),
      top_k_B=put(self.top_k_B, 0),
      top_p_B=put(self.top_p_B, 1.0),
      minimum_B=put(self.minimum_B, 0),
    )

  def widen(self, width: int, law: str = "any") -> "RowOptions":
    """Return options with room for so many stop ids, as rows of a batch of this law.

    Raises:
      InputError: there are more, or they ask for more.
    """
    asked = (self.temperature_B, self.top_k_B, self.top_p_B, self.minimum_B)
    if known(*asked) and LAWS.index(_least_law(*asked)) > LAWS.index(self.law):
      raise InputError(
        f"rows have values beyond their law={self.law!r}; whoever replaces values that "
        f"RowOptions.make checked replaces the law too, here by {_least_law(*asked)!r}."
      )
    if LAWS.index(self.law) > LAWS.index(law):
      raise InputError(
        f"rows ask for the law {self.law!r} and the batch was made for {law!r}; make it for "
        f"{self.law!r}, see Rounds.init."
      )
    size = self.stop_BS.shape[1]
    if size > width:
      raise InputError(f"rows have up to {size} stop ids and the batch has room for {width}.")
    stop_BS = jnp.pad(self.stop_BS, ((0, 0), (0, width - size)), constant_values=NO_ID)
    return self.replace(stop_BS=stop_BS, law=law)


def known(*given: Any) -> bool:
  """Return whether values can be read: they are not those of a traced function."""
  return not any(isinstance(one, jax.core.Tracer) for one in given)


def per_row(name: str, given: Any, rows: int, dtype: DTypeLike = jnp.int32) -> Array:
  """Return one value per row.

  Raises:
    InputError: it is neither one value nor one per row.
  """
  found = jnp.asarray(given, dtype)
  if found.shape not in ((), (rows,)):
    raise InputError(
      f"{name} has shape {found.shape}; give one number, or one for each of {rows} rows."
    )
  return jnp.broadcast_to(found, (rows,))


def row_keys(rng: Array, rows: int) -> Key[Array, "B"]:
  """Return a key per row: those given, or the children of one.

  Raises:
    InputError: it is no typed key, or there is another number of them.
  """
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise InputError(f"rng has dtype {rng.dtype}; make a typed key with jax.random.key(seed).")
  if rng.shape not in ((), (rows,)):
    raise InputError(f"rng has shape {rng.shape}; give one key, or one for each of {rows} rows.")
  if rng.shape:
    return rng
  return jax.vmap(lambda row: jax.random.fold_in(rng, row))(jnp.arange(rows))


def _holds(test, given):
  """Return whether values pass, as far as they are known; what is no number does not."""
  return not known(given) or bool(np.all(test(np.asarray(given))))


def _least_law(temperature, top_k, top_p, minimum):
  """Return the first of LAWS that values are known to be content with."""
  says = lambda given, value: known(given) and bool(np.all(np.asarray(given) == value))  # noqa: E731
  if not (says(top_k, 0) and says(top_p, 1) and says(minimum, 0)):
    return "any"
  cold = known(temperature) and bool(np.all(np.asarray(temperature) < COLD))
  return "greedy" if cold else "drawn"


def _check_law(temperature, top_k, top_p):
  if not (
    _holds(lambda x: x >= 0, temperature)
    and _holds(lambda x: x >= 0, top_k)
    and _holds(lambda x: (x > 0) & (x <= 1), top_p)
  ):
    raise InputError(
      f"temperature={temperature} must be 0 or more, top_k={top_k} 0 (off) or more, and "
      f"top_p={top_p} in (0, 1]."
    )


def _check_least(name, given):
  if not _holds(lambda x: x >= 0, given):
    raise InputError(f"{name}={given} must be 0 or more.")


def _stop_rows(stop_ids, rows):
  """Return int32 [B, S] from one list, a list per row, or such an array."""
  if getattr(stop_ids, "ndim", 0) != 2:
    several = any(np.ndim(one) for one in stop_ids)
    lists = [list(map(int, one)) for one in (stop_ids if several else [stop_ids] * rows)]
    width = max(map(len, lists), default=0)
    padded = [one + [NO_ID] * (width - len(one)) for one in lists]
    stop_ids = np.asarray(padded, np.int32).reshape(len(lists), width)
  if stop_ids.shape[0] != rows:
    raise InputError(
      f"stop_ids are {stop_ids.shape[0]} lists; give one list, or one for each of {rows} rows."
    )
  if not _holds(lambda x: x >= NO_ID, stop_ids):
    raise InputError(f"stop_ids={np.asarray(stop_ids).tolist()} must be token ids, 0 or more.")
  return jnp.asarray(stop_ids, jnp.int32)
