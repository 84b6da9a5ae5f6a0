# SPDX-License-Identifier: Apache-2.0
"""Which drafted tokens of a block are kept: rules that run from left to right, row by row.

A block has K positions; the open ones are those still to decide, in position order, whichever way
the draft revealed them. Accepted tokens come first; at the first one that is not, the target's
token is put instead, the bonus, and the rule stops. Full acceptance has no bonus. Unless nothing is
open, every rule decides at least one position.

What becomes of the open positions after the stop is the `fill`:

  truncate           they stay open; the next round drafts them again
  truncate_no_bonus  so does the bonus, unless it is the only token
  target_argmax      the target's most probable tokens, as verified
  target_argmax_all  these at every open position, accepted or not
  draft_argmax       the draft's tokens

The release has one more mode, "redraft": draft and verify the rest at once, inside the round. It is
left out: a loop over rounds already does just that under "truncate".

Reference: SimSD, arXiv 2606.02544.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from dlm_jax import draw
from dlm_jax.arrays import BoolBK, FloatBK, FloatBKV, IntBK
from dlm_jax.errors import InputError

FILLS = ("truncate", "truncate_no_bonus", "target_argmax", "target_argmax_all", "draft_argmax")


@flax.struct.dataclass
class Verdict:
  """What a round decided.

  Attributes:
    tokens_BK: the draft's tokens, the target's where they replace them.
    kept_BK: open positions that are now decided.
    accepted_B: drafted tokens that passed, however they were filled afterwards.
    bonus_B: whether a token of the target ended the run.
  """

  tokens_BK: Any
  kept_BK: Any
  accepted_B: Any
  bonus_B: Any


def greedy_match(
  draft_BK: IntBK,
  target_BKV: FloatBKV,
  open_BK: BoolBK,
  *,
  fill: str = "truncate",
  stop_BV: Bool[Array, "B V"] | None = None,
  eos_min_prob: float = 0.0,
) -> Verdict:
  """Accept tokens while they are the target's most probable ones.

  Args:
    draft_BK: drafted tokens; anything where nothing is open.
    target_BKV: probabilities q of the target at every position.
    open_BK: positions to decide.
    fill: see the module.
    stop_BV: which ids end the text of each row; None: none.
    eos_min_prob: where q has less than this on the stop ids, a bonus is never one of them.
  """
  best_BK = jnp.argmax(target_BKV, axis=-1).astype(draft_BK.dtype)
  first_B = _first(open_BK & (best_BK != draft_BK))
  target_BV, banned_BV = _row(target_BKV, first_B, stop_BV, eos_min_prob)
  bonus_B = jnp.argmax(jnp.where(banned_BV, -1.0, target_BV), axis=-1).astype(draft_BK.dtype)
  return _settle(draft_BK, best_BK, bonus_B, open_BK, first_B, fill)


def rejection(
  draft_BK: IntBK,
  draft_BKV: FloatBKV,
  target_BKV: FloatBKV,
  open_BK: BoolBK,
  uniform_BK: FloatBK,
  bonus_B2: Float[Array, "B 2"],
  *,
  fill: str = "truncate",
  stop_BV: Bool[Array, "B V"] | None = None,
  eos_min_prob: float = 0.0,
) -> Verdict:
  """Accept token d with probability min(1, q(d) / p(d)); the bonus is drawn from max(0, q − p).

  The tokens must be drawn from p, the draft's law when it revealed each position. With exact q and
  tokens revealed from left to right the text then has the target's law; in an order that depends
  on the tokens, such as the most confident first, it has not: a revealed token is not one from p.

  Args:
    draft_BK: drafted tokens.
    draft_BKV: their probabilities p.
    target_BKV: probabilities q of the target.
    open_BK: positions to decide.
    uniform_BK: a uniform per position.
    bonus_B2: two per row for the bonus, see `draw.uniforms`.
    fill: as in `greedy_match`; so are the others.
    stop_BV: as there.
    eos_min_prob: as there.
  """
  at_draft = draft_BK[..., None]
  p_BK = jnp.take_along_axis(draft_BKV, at_draft, axis=-1)[..., 0]
  q_BK = jnp.take_along_axis(target_BKV, at_draft, axis=-1)[..., 0]
  first_B = _first(open_BK & ~(uniform_BK * p_BK < q_BK))
  target_BV, banned_BV = _row(target_BKV, first_B, stop_BV, eos_min_prob)
  draft_BV = _row(draft_BKV, first_B)[0]
  target_BV = jnp.where(banned_BV, 0.0, target_BV)
  residual_BV = jnp.where(banned_BV, 0.0, jnp.maximum(target_BV - draft_BV, 0.0))
  some_B1 = residual_BV.sum(axis=-1, keepdims=True) > 0
  bonus_B = draw.categorical(jnp.where(some_B1, residual_BV, target_BV), bonus_B2)
  best_BK = jnp.argmax(target_BKV, axis=-1).astype(draft_BK.dtype)
  return _settle(draft_BK, best_BK, bonus_B.astype(draft_BK.dtype), open_BK, first_B, fill)


def _first(failed_BK):
  """Return the first failed position of each row, K if there is none."""
  size = failed_BK.shape[1]
  return jnp.where(failed_BK.any(axis=1), jnp.argmax(failed_BK, axis=1), size)


def _row(probs_BKV, first_B, stop_BV=None, eos_min_prob=0.0):
  """Return probabilities at the first failed position, and the ids that may not be its bonus."""
  at = jnp.minimum(first_B, probs_BKV.shape[1] - 1)[:, None, None]
  probs_BV = jnp.take_along_axis(probs_BKV, at, axis=1)[:, 0]
  if stop_BV is None or eos_min_prob <= 0:
    return probs_BV, jnp.zeros_like(probs_BV, bool)
  mass_B1 = jnp.sum(probs_BV, axis=-1, where=stop_BV, keepdims=True)
  return probs_BV, stop_BV & (mass_B1 < eos_min_prob)


def _settle(draft_BK, best_BK, bonus_B, open_BK, first_B, fill):
  """Put the bonus at the first failed position and fill what comes after it."""
  if fill not in FILLS:
    raise InputError(f"fill={fill!r} is unknown; use one of {', '.join(FILLS)}.")
  size = draft_BK.shape[1]
  at_BK, first_B1 = jnp.arange(size)[None, :], first_B[:, None]
  passed_BK = open_BK & (at_BK < first_B1)
  accepted_B, failed_B = passed_BK.sum(axis=1, dtype=jnp.int32), first_B < size
  tokens_BK = jnp.where(at_BK == first_B1, bonus_B[:, None], draft_BK)
  kept_BK = open_BK & (at_BK <= first_B1)
  if fill == "truncate_no_bonus":
    kept_BK = jnp.where(accepted_B[:, None] > 0, passed_BK, kept_BK)
  elif fill == "target_argmax":
    tokens_BK = jnp.where(at_BK > first_B1, best_BK, tokens_BK)
  elif fill == "target_argmax_all":
    tokens_BK = jnp.where(failed_B[:, None], best_BK, tokens_BK)
  if fill in ("target_argmax", "target_argmax_all", "draft_argmax"):
    kept_BK = open_BK
  return Verdict(tokens_BK, kept_BK, accepted_B, failed_B)
