# SPDX-License-Identifier: Apache-2.0
"""What a target says about a drafted block, in one pass after its cache.

Two ways to lay out the query; both have a static shape, whatever was carried into the block:

  simsd    the drafted tokens once, and one mask per position that sees of them what had been
           revealed before it: 2 K tokens. Right sets of visible tokens, but beyond the first layer
           their states belong to other steps. An approximation: equal to the step-by-step logits
           only for one layer, for one reveal step and for the last of two steps.
  stacked  a copy of the block as it stood before every step, and a finished one: (steps + 1) K
           tokens. The step-by-step logits themselves, at any depth, order and number of steps.

Nothing here writes to a cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import Params
from dlm_jax.models import KV, masks


def verify_simsd(
  model: Any,
  params: Params,
  cache: Any,
  tokens_BNK: Int[Array, "B N K"],
  time_BNK: Int[Array, "B N K"],
  *,
  mask_id: int,
  layout: str = "unified",
  share_positions: bool = True,
  clean: bool = False,
) -> Float[Array, "B N K V"]:
  """Return the target's logits at the masks that ask about each drafted token.

  A drafted token can reach its own logits: its mask sees the mask of a position revealed later,
  which sees the token. With two layers or more and two steps or more, changing a token changes what
  the target seems to think of it; agreement is partly this leak.

  Args:
    model: a `models.Decoder`.
    params: its parameters.
    cache: what comes before the blocks, one length per row.
    tokens_BNK: N drafted blocks of K tokens, carried ones included; the mask where undrafted.
    time_BNK: the step that revealed each, from 1; `masks.CARRIED` or `masks.UNDRAFTED`.
    mask_id: id of the mask token.
    layout: what carried tokens see, see `masks.simsd`; "published" is the release's.
    share_positions: a mask has the rotary position of its token. False, for one block, puts the
      masks after the block: an ablation.
    clean: add a finished copy of every block for later blocks to see. Without it they see drafted
      tokens with partial views, and only the first block means what it means alone.

  Returns:
    Logits; those of carried tokens mean nothing.

  Raises:
    ValueError: unshared positions of several blocks.

  Reference: SimSD, arXiv 2606.02544.
  """
  batch, blocks, size = tokens_BNK.shape
  slots = masks.draft_slots(time_BNK, cache.length_B, clean=clean)
  if not share_positions:
    if blocks > 1 or clean:
      raise ValueError(f"share_positions=False is for one block without a copy, not {blocks}.")
    slots = slots.replace(position=_unshared(slots, size))
  flat = tokens_BNK.reshape(batch, blocks * size)
  parts = [flat, jnp.full_like(flat, mask_id)] + ([flat] if clean else [])
  visible = masks.simsd(slots, layout=layout, clean=clean)
  hidden, _ = _extend(model, params, cache, jnp.concatenate(parts, axis=1), slots, visible)
  logits = _head(model, params, hidden[:, blocks * size : 2 * blocks * size])
  return logits.reshape(batch, blocks, size, -1)


def verify_stacked(
  model: Any,
  params: Params,
  cache: Any,
  states_BNK: Int[Array, "B N K"],
  used_BN: Array,
  finished_BK: Int[Array, "B K"],
) -> tuple[Float[Array, "B N K V"], KV]:
  """Return the target's logits of every state of a block, and the K/V of its finished tokens.

  Each state sees what is cached and itself, so its logits are those of a step on it alone. The K/V
  are what a pass over the finished block returns: if the text agrees, `commit` takes them as they
  are and no such pass is needed.

  Args:
    model: a `models.Decoder`.
    params: its parameters.
    cache: what comes before the block, one length per row.
    states_BNK: N states of the block, masks included; see `states`.
    used_BN: bool; the logits of other states mean nothing.
    finished_BK: the block without masks.

  Reference: section 3.9 of the notes; the idea is in Spiffy, arXiv 2509.18085.
  """
  batch, copies, size = states_BNK.shape
  step_BN = jnp.where(used_BN, jnp.arange(1, copies + 1)[None, :], -1)
  step_BN = jnp.concatenate([step_BN, jnp.zeros_like(step_BN[:, :1])], axis=1)
  slots = masks.stacked_slots(step_BN, cache.length_B, size)
  tokens = jnp.concatenate([states_BNK.reshape(batch, -1), finished_BK], axis=1)
  hidden, kv = _extend(model, params, cache, tokens, slots, masks.stacked(slots))
  logits = _head(model, params, hidden[:, : copies * size])
  kv = jax.tree.map(lambda x: x[:, :, copies * size :], kv)
  return logits.reshape(batch, copies, size, -1), kv


def states(
  tokens_BK: Int[Array, "B K"], time_BK: Int[Array, "B K"], steps: int, mask_id: int
) -> tuple[Int[Array, "B N K"], Array]:
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


def _unshared(slots, size):
  """Return positions as if the masks, in their order, came after the block."""
  asking = (slots.kind == masks.MASK).astype(jnp.int32)
  behind = slots.position[..., :1] + size + jnp.cumsum(asking, axis=-1) - 1
  return jnp.where(asking > 0, behind, slots.position)


def _extend(model, params, cache, tokens, slots, visible):
  return model.apply({"params": params}, tokens, slots.position, visible, cache, method="extend")


def _head(model, params, hidden):
  return model.apply({"params": params}, hidden, method="head")
