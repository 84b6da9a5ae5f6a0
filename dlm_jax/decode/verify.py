# SPDX-License-Identifier: Apache-2.0
"""What a target says about a drafted block, in one pass after its cache.

Two ways to lay out the query; both have a static shape, whatever was carried into the block:

  simsd    the drafted tokens once, and one mask per position that sees of them what had been
           revealed before it: 2 K tokens. Right sets of visible tokens, but beyond the first layer
           their states belong to other steps. An approximation: equal to the step-by-step logits
           only for one layer, for one reveal step and for the last of two steps.
  stacked  a copy of the block as it stood before every step, and a finished one: (steps + 1) K
           tokens. The step-by-step logits themselves, at any depth, order and number of steps.

Either may start with the block before, if the cache lacks it still: it sees the cache and itself,
and everything else sees it, as if it had been stored first. Nothing here writes to a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dlm_jax.decode.passes import Bound
from dlm_jax.errors import InputError
from dlm_jax.models import KV, masks


class Before(NamedTuple):
  """A finished block that the cache lacks in some rows.

  Attributes:
    tokens_BK: its tokens; anything in other rows.
    pending_B: rows in which it is to be encoded; the drafted block then starts behind it.
  """

  tokens_BK: Int[Array, "B K"]
  pending_B: Bool[Array, "B"]


class Verified(NamedTuple):
  """What a pass found.

  Attributes:
    logits_BNKV: of the target, for N blocks (simsd) or N states of one (stacked).
    before: K/V of the block before, None without one.
    finished: K/V of the finished tokens, stacked only.
  """

  logits_BNKV: Float[Array, "B N K V"]
  before: KV | None = None
  finished: KV | None = None


def verify_simsd(
  network: Bound,
  cache: Any,
  tokens_BNK: Int[Array, "B N K"],
  time_BNK: Int[Array, "B N K"],
  *,
  mask_id: int,
  layout: str = "unified",
  share_positions: bool = True,
  clean: bool = False,
  before: Before | None = None,
) -> Verified:
  """Return the target's logits at the masks that ask about each drafted token.

  A drafted token can reach its own logits: its mask sees the mask of a position revealed later,
  which sees the token. With two layers or more and two steps or more, changing a token changes what
  the target seems to think of it; agreement is partly this leak.

  Args:
    network: the target.
    cache: what comes before the blocks, one length per row.
    tokens_BNK: N drafted blocks of K tokens, carried ones included; the mask where undrafted.
    time_BNK: the step that revealed each, from 1; `masks.CARRIED` or `masks.UNDRAFTED`.
    mask_id: id of the mask token.
    layout: what carried tokens see, see `masks.simsd`; "published" is the release's.
    share_positions: a mask has the rotary position of its token. False, for one block, puts the
      masks after the block: an ablation.
    clean: add a finished copy of every block for later blocks to see. Without it they see drafted
      tokens with partial views, and only the first block means what it means alone.
    before: the block before these, if the cache may lack it.

  Returns:
    Logits, those of carried tokens mean nothing; and the K/V of `before`.

  Raises:
    InputError: unshared positions of several blocks.

  Reference: SimSD, arXiv 2606.02544.
  """
  batch, blocks, size = tokens_BNK.shape
  slots = masks.draft_slots(time_BNK, _start(cache, before), clean=clean)
  if not share_positions:
    if blocks > 1 or clean:
      raise InputError(f"share_positions=False is for one block without a copy, not {blocks}.")
    slots = slots.replace(position=_unshared(slots, size))
  flat = tokens_BNK.reshape(batch, blocks * size)
  tokens = jnp.concatenate([flat, jnp.full_like(flat, mask_id)] + ([flat] if clean else []), axis=1)
  tokens, slots = _prepend(cache, before, masks.PROMPT, tokens, slots)
  visible = masks.simsd(slots, layout=layout, clean=clean)
  hidden, kv = network.extend(tokens, slots.position, visible, cache)
  first = blocks * size + (0 if before is None else size)
  logits = network.head(hidden[:, first : first + blocks * size])
  return Verified(
    logits.reshape(batch, blocks, size, -1), None if before is None else _part(kv, 0, size)
  )


def verify_stacked(
  network: Bound,
  cache: Any,
  states_BNK: Int[Array, "B N K"],
  used_BN: Bool[Array, "B N"],
  finished_BK: Int[Array, "B K"],
  before: Before | None = None,
) -> Verified:
  """Return the target's logits of every state of a block, and the K/V of its finished tokens.

  Each state sees what is cached and itself, so its logits are those of a step on it alone. The K/V
  are what a pass over the finished block returns: if the text agrees, `commit` takes them as they
  are and no such pass is needed.

  Args:
    network: the target.
    cache: what comes before the block, one length per row.
    states_BNK: N states of the block, masks included; see `states`.
    used_BN: the logits of other states mean nothing.
    finished_BK: the block without masks.
    before: the block before this one, if the cache may lack it.

  Related: Spiffy, arXiv 2509.18085.
  """
  batch, copies, size = states_BNK.shape
  step_BN = jnp.where(used_BN, jnp.arange(1, copies + 1)[None, :], -1)
  step_BN = jnp.concatenate([step_BN, jnp.zeros_like(step_BN[:, :1])], axis=1)
  slots = masks.stacked_slots(step_BN, _start(cache, before), size)
  tokens = jnp.concatenate([states_BNK.reshape(batch, -1), finished_BK], axis=1)
  tokens, slots = _prepend(cache, before, masks.COMMITTED, tokens, slots)
  hidden, kv = network.extend(tokens, slots.position, masks.stacked(slots), cache)
  first = 0 if before is None else size
  last = first + copies * size
  logits = network.head(hidden[:, first:last])
  return Verified(
    logits.reshape(batch, copies, size, -1),
    None if before is None else _part(kv, 0, size),
    _part(kv, last, last + size),
  )


def states(
  tokens_BK: Int[Array, "B K"], time_BK: Int[Array, "B K"], steps: int, mask_id: int
) -> tuple[Int[Array, "B N K"], Bool[Array, "B N"]]:
  """Return the block before each of the steps 1 … N, and which steps reveal anything, [B, N].

  Args:
    tokens_BK: drafted tokens.
    time_BK: the step that revealed each, from 1; `masks.CARRIED` or `masks.UNDRAFTED`.
    steps: N.
    mask_id: id of the mask token.
  """
  step_1N1 = jnp.arange(1, steps + 1)[None, :, None]
  time_B1K = time_BK[:, None, :]
  return jnp.where(time_B1K < step_1N1, tokens_BK[:, None], mask_id), (time_B1K == step_1N1).any(2)


def _start(cache, before):
  """Return the first position of the drafted block."""
  if before is None:
    return cache.length_B
  return cache.length_B + before.tokens_BK.shape[1] * before.pending_B


def _prepend(cache, before, kind, tokens, slots):
  """Return tokens and slots with those of the block before in front, PAD where it is stored."""
  if before is None:
    return tokens, slots
  size = before.tokens_BK.shape[1]
  kind_B1 = jnp.where(before.pending_B, kind, masks.PAD)[:, None]
  position_BK = cache.length_B[:, None] + jnp.arange(size)[None, :]
  added = masks.Slots.make(
    jnp.broadcast_to(kind_B1, position_BK.shape), block=-1, position=position_BK
  )
  return jnp.concatenate([before.tokens_BK, tokens], axis=1), masks.join(added, slots)


def _part(kv, start, stop):
  return jax.tree.map(lambda x: x[:, :, start:stop], kv)


def _unshared(slots, size):
  """Return positions as if the masks, in their order, came after the block."""
  asking = (slots.kind == masks.MASK).astype(jnp.int32)
  behind = slots.position[..., :1] + size + jnp.cumsum(asking, axis=-1) - 1
  return jnp.where(asking > 0, behind, slots.position)
