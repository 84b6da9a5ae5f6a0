# SPDX-License-Identifier: Apache-2.0
"""What may attend to what, as predicates of integers: dense masks, tests and kernels share them.

A call's tokens are described by `Slots`, integer arrays that run along the tokens. A predicate
takes the slots of queries and of keys and returns bool [..., Q, K], True where the query sees the
key; without keys, the queries are the keys. Slots of kind PAD see nothing and are seen by nothing,
and no token sees another document. Every predicate is elementwise: any order of the tokens, any
subset of them, any tile of a kernel.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dlm_jax.errors import InputError

# Kinds. NOISY and CLEAN are the halves of a training sequence; DATA and MASK the drafted tokens of
# a block and the masks that ask about them; CLEAN is also a finished copy of a drafted block.
PAD, COMMITTED, PROMPT, DATA, MASK, CLEAN, NOISY = range(7)
CARRIED = 0  # the time of a token that was there before the first step; steps count from 1
UNDRAFTED = 2**30  # the time of a token that no step has revealed

LAYOUTS = ("unified", "published")


@flax.struct.dataclass
class Slots:
  """Integers of every token of a call; all int32 [..., L].

  Attributes:
    kind: one of the kinds above.
    time: the step that revealed the token, or that a copy belongs to.
    block: number of its block; only order and equality matter.
    document: tokens of different documents never meet.
    position: for the rotary embedding; repeats are fine.
  """

  kind: Any
  time: Any
  block: Any
  document: Any
  position: Any

  @classmethod
  def make(cls, kind, time=0, block=0, document=0, position=0) -> "Slots":
    """Return slots of a common shape from arrays or numbers; axes beyond the last are batch."""
    arrays = [jnp.asarray(x, jnp.int32) for x in (kind, time, block, document, position)]
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    return cls(*(jnp.broadcast_to(x, shape) for x in arrays))


def join(*parts: Slots) -> Slots:
  """Return slots one after the other along the last axis."""
  fields = zip(*((p.kind, p.time, p.block, p.document, p.position) for p in parts), strict=True)
  return Slots(*(jnp.concatenate(field, axis=-1) for field in fields))


def _pair(q: Slots, k: Slots | None):
  """Return both with axes for Q and K, and where neither pads and the documents agree."""
  k = q if k is None else k
  q = Slots(*(x[..., :, None] for x in (q.kind, q.time, q.block, q.document, q.position)))
  k = Slots(*(x[..., None, :] for x in (k.kind, k.time, k.block, k.document, k.position)))
  return q, k, (q.document == k.document) & (q.kind != PAD) & (k.kind != PAD)


def causal(q: Slots, k: Slots | None = None) -> Bool[Array, "*batch Q K"]:
  """See positions up to one's own."""
  q, k, meet = _pair(q, k)
  return meet & (k.position <= q.position)


def block_causal(q: Slots, k: Slots | None = None) -> Bool[Array, "*batch Q K"]:
  """See one's own block, in both directions, and earlier ones."""
  q, k, meet = _pair(q, k)
  return meet & (k.block <= q.block)


def doubled(q: Slots, k: Slots | None = None) -> Bool[Array, "*batch Q K"]:
  """See as in training on a NOISY and a CLEAN copy of each document.

  A noisy token sees its own noisy block and all earlier clean ones; the clean copy is block-causal
  and never sees noise.

  Reference: BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303.
  """
  q, k, meet = _pair(q, k)
  noisy_q, noisy_k = q.kind == NOISY, k.kind == NOISY
  noisy = jnp.where(noisy_k, k.block == q.block, k.block < q.block)
  return meet & jnp.where(noisy_q, noisy, ~noisy_k & (k.block <= q.block))


def simsd(
  q: Slots, k: Slots | None = None, *, layout: str = "unified", clean: bool = False
) -> Bool[Array, "*batch Q K"]:
  """See as in one pass that verifies drafted blocks.

  DATA i stands for the block right after step tᵢ, MASK i for the block right before it: of every
  position of its block each sees exactly one of the two. Earlier blocks show their data, never
  their masks; PROMPT and COMMITTED tokens are seen by all of them. PROMPT tokens are block-causal
  among themselves and see nothing drafted.

  Args:
    q: slots of the queries.
    k: slots of the keys; None: the queries.
    layout: what DATA of time CARRIED sees. "unified": the masks of its block too, as in the block
      before step 1. "published": the carried tokens only, as if they were PROMPT.
    clean: every drafted block has a CLEAN copy, which sees itself, earlier clean copies, PROMPT and
      COMMITTED; later blocks then see it in place of the data.

  Raises:
    InputError: the layout is unknown.

  Reference: SimSD, arXiv 2606.02544.
  """
  if layout not in LAYOUTS:
    raise InputError(f"layout={layout!r} is unknown; use {' or '.join(LAYOUTS)}.")
  q, k, meet = _pair(q, k)
  before = (k.kind == COMMITTED) | (k.kind == PROMPT)
  # of the own block
  after_step = jnp.where(k.kind == DATA, k.time <= q.time, k.time > q.time)
  if layout == "published":
    after_step &= (k.kind == DATA) | (q.time > CARRIED)
  before_step = jnp.where(k.kind == DATA, k.time < q.time, k.time >= q.time)
  stepwise = jnp.where(q.kind == DATA, after_step, before_step)
  stepwise &= (k.kind == DATA) | (k.kind == MASK)
  own = jnp.where(q.kind == CLEAN, k.kind == CLEAN, stepwise)
  earlier = k.kind == (CLEAN if clean else DATA)
  drafted = before | ((k.block == q.block) & own) | ((k.block < q.block) & earlier)
  prompt = (k.kind == COMMITTED) | ((k.kind == PROMPT) & (k.block <= q.block))
  committed = (k.kind == COMMITTED) & (k.block <= q.block)
  seen = jnp.where(q.kind == PROMPT, prompt, jnp.where(q.kind == COMMITTED, committed, drafted))
  return meet & seen


def stacked(q: Slots, k: Slots | None = None) -> Bool[Array, "*batch Q K"]:
  """See COMMITTED tokens and one's own copy of the block: copies are told apart by their time."""
  q, k, meet = _pair(q, k)
  copy = (k.kind == COMMITTED) | ((k.time == q.time) & (k.block == q.block))
  committed = (k.kind == COMMITTED) & (k.block <= q.block)
  return meet & jnp.where(q.kind == COMMITTED, committed, copy)


def sequence_slots(
  position: Int[Array, "*batch L"],
  block_length: Int[Array, ""] | int,
  document=0,
  kind: int = COMMITTED,
) -> Slots:
  """Describe plain tokens; blocks lie on the grid of their positions."""
  return Slots.make(kind, block=position // block_length, document=document, position=position)


def doubled_slots(
  position: Int[Array, "*batch L"], block_length: Int[Array, ""] | int, document=0
) -> Slots:
  """Describe [noisy | clean] copies of tokens, 2 L in all, for `doubled`.

  Args:
    position: of each token, from 0 in every document.
    block_length: tokens per block.
    document: which one each token belongs to.
  """
  halves = (sequence_slots(position, block_length, document, kind) for kind in (NOISY, CLEAN))
  return join(*halves)


def draft_slots(
  time: Int[Array, "*batch blocks size"], start: Int[Array, "*batch"] | int, *, clean: bool = False
) -> Slots:
  """Describe [data | masks] of K drafted blocks, 2 K · size in all, for `simsd`.

  The masks of carried tokens are PAD, so that the shape never depends on how many there are. A mask
  has the position of its data.

  Args:
    time: the step that revealed each position, from 1; CARRIED or UNDRAFTED.
    start: position of the first token of the first block.
    clean: append K · size slots of finished copies.
  """
  *batch, blocks, size = time.shape
  flat = time.reshape(*batch, blocks * size)
  inside = jnp.broadcast_to(jnp.arange(blocks * size), flat.shape)
  block, position = inside // size, _offset(start, inside)
  data = Slots.make(DATA, flat, block, position=position)
  masks = Slots.make(jnp.where(flat == CARRIED, PAD, MASK), flat, block, position=position)
  return join(data, masks, *([data.replace(kind=jnp.full_like(flat, CLEAN))] if clean else []))


def stacked_slots(
  step: Int[Array, "*batch copies"], start: Int[Array, "*batch"] | int, size: int
) -> Slots:
  """Describe one copy of a block per step, copies · size in all, for `stacked`.

  Args:
    step: the step that each copy precedes, all different; below 0 the copy is padding. A finished
      copy takes any number that no step has.
    start: position of the first token of the block.
    size: tokens per block.
  """
  inside = jnp.tile(jnp.arange(size), step.shape[-1])
  step = jnp.repeat(step, size, axis=-1)
  position = _offset(start, jnp.broadcast_to(inside, step.shape))
  return Slots.make(jnp.where(step < 0, PAD, DATA), step, position=position)


def _offset(start, inside):
  return jnp.broadcast_to(jnp.asarray(start), inside.shape[:-1])[..., None] + inside
