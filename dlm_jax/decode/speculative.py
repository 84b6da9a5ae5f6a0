# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of blocks: a small network drafts, the target verifies in one pass.

A round: the draft denoises the rest of each running row's block, remembering the order; the target
sees the outcome in one pass; what it confirms is decided, and one step or token of its own beyond
that. Two ways to verify, see `verify`:

  stacked  exact. The target applies its own rule to every state the draft went through; as long as
           the same positions get the same tokens, they are what the target alone would have
           decided. At the first difference its own outcome is taken, which may leave holes for the
           next round to go on from. Draws share their noise, a function of key, position and step,
           so the text is the one that `block_decoder` gives for the target with the same key, token
           for token, whatever the draft, the strategy and the temperature. Up to rounding, which
           decides where positions tie, as masks before the very first token of a text do.
  simsd    an approximation, with fewer tokens per pass. Logits from masks that see the draft, then
           a rule from left to right, see `accept`: where the row's temperature is 0 tokens are
           accepted while they are the target's most probable ones, elsewhere by rejection.

Passes: the block before rides along with a round's first pass of either network, as in folded block
decoding, unless its keys and values are known from a stacked pass in which everything agreed. So a
round is one target pass, and settles at least one step (stacked) or token (simsd).
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from dlm_jax import models
from dlm_jax.decode import law
from dlm_jax.decode.accept import greedy_match, rejection
from dlm_jax.decode.block import BlockState, block_decoder, done
from dlm_jax.decode.draft import propose
from dlm_jax.decode.interfaces import COLD, STOP_WIDTH, Rounds
from dlm_jax.decode.passes import Bound, block_at
from dlm_jax.decode.progress import advance, at_positions, record
from dlm_jax.decode.rule import Block, reveal
from dlm_jax.decode.speculative_options import SpeculativeOptions
from dlm_jax.decode.verify import Before, states, verify_simsd, verify_stacked
from dlm_jax.errors import InputError

_COUNTS = ("target_passes", "draft_passes", "drafted", "accepted")
_ROUNDS = 2**31 - 2  # no position has this number: a child of the row's key of its own


@flax.struct.dataclass
class SpeculativeState:
  """Rows between two rounds.

  Attributes:
    progress: tokens and their history; `passes_B` counts the target's.
    target_cache: all blocks before `start_B`, or all but the last of them.
    draft_cache: the same of the draft.
    start_B: first position of the block in work.
    step_B: steps that the block has behind it; 0 in every round of "simsd".
    counts: int32 [B] each: "target_passes" and "draft_passes", in which the row took part;
      "drafted" and "accepted" tokens. `decode` puts them into `Info.counts`.
  """

  progress: Any
  target_cache: Any
  draft_cache: Any
  start_B: Any
  step_B: Any
  counts: Any


class Outcome(NamedTuple):
  """What a verification decided.

  Attributes:
    revealed_BK: positions decided now.
    tokens_BK: their tokens.
    step_BK: their reveal steps.
    log_prob_BK: their log-probabilities under the target, nats.
    settled_B: steps that the block has behind it now, more than before.
    accepted_B: drafted tokens confirmed.
    before: K/V of the block before.
    finished: K/V of the drafted block, None without.
    agreed_B: rows whose block is exactly the drafted one, so that `finished` is its K/V.
  """

  revealed_BK: Array
  tokens_BK: Array
  step_BK: Array
  log_prob_BK: Array
  settled_B: Array
  accepted_B: Array
  before: models.KV
  finished: models.KV | None
  agreed_B: Array


def speculative_decoder(
  target_model: Any, draft_model: Any, options: SpeculativeOptions, max_length: int
) -> Rounds:
  """Return rounds for `sample.decode` whose parameters are {"target": …, "draft": …}.

  Rows are independent and advance at their own pace. `Info.counts` has passes of either network and
  drafted and accepted tokens, per row. With "stacked" tokens, steps and log-probabilities are those
  of `block_decoder(target_model, options.target, max_length)` for the same key and row options.

  Args:
    target_model: a `models.Decoder` trained on blocks of this length.
    draft_model: another one with the same vocabulary, or the same one.
    options: how to draft and verify; `options.exact` says whether the text is the target's own.
    max_length: the window: most tokens of a row, prompt included.

  Raises:
    InputError: the vocabularies differ, or see `block_decoder`.

  Reference: SimSD, arXiv 2606.02544; the stacked mode is related to Spiffy, arXiv 2509.18085.

  Example:
    >>> import jax
    >>> from dlm_jax import models, sample
    >>> model = models.Decoder(models.DecoderConfig(
    ...   vocab_size=9, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8))
    >>> prompt = jax.numpy.asarray([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), prompt)["params"]
    >>> rule = sample.BlockRule(block_length=4, mask_id=8)
    >>> options = sample.SpeculativeOptions(target=rule)
    >>> rounds = sample.speculative_decoder(model, model, options, max_length=12)
    >>> tokens, info = sample.decode(
    ...   rounds, {"target": params, "draft": params}, prompt, jax.random.key(1))
    >>> info.counts["target_passes"].tolist()  # one per block: the draft is the target
    [3]
  """
  sizes = (target_model.config.vocab_size, draft_model.config.vocab_size)
  if sizes[0] != sizes[1]:
    raise InputError(f"the draft has vocab_size={sizes[1]}; it must be the target's, {sizes[0]}.")
  target = block_decoder(target_model, options.target, max_length)
  draft = block_decoder(draft_model, options.draft, max_length)
  return Rounds(
    init=functools.partial(_init, target, draft),
    admit=functools.partial(_admit, target, draft),
    round=functools.partial(_round, target_model, draft_model, options),
    done=done,
  )


def _init(target, draft, slots, stop_width=STOP_WIDTH, law="any"):
  state = target.init(slots, stop_width, law)
  other = draft.init(slots, stop_width, law)
  counts = {name: jnp.zeros(slots, jnp.int32) for name in _COUNTS}
  step_B = jnp.zeros(slots, jnp.int32)
  return SpeculativeState(state.progress, state.cache, other.cache, state.start_B, step_B, counts)


def _admit(target, draft, params, state, row_R, *request):
  """Put prompts into rows of both networks' caches."""
  ours = BlockState(state.progress, state.target_cache, state.start_B)
  theirs = BlockState(state.progress, state.draft_cache, state.start_B)
  ours = target.admit(params["target"], ours, row_R, *request)
  theirs = draft.admit(params["draft"], theirs, row_R, *request)
  fresh = lambda x_B: x_B.at[row_R].set(0, mode="drop")  # noqa: E731
  return SpeculativeState(
    progress=ours.progress,
    target_cache=ours.cache,
    draft_cache=theirs.cache,
    start_B=ours.start_B,
    step_B=fresh(state.step_B),
    counts=jax.tree.map(fresh, state.counts),
  )


def _round_keys(rng_B, round_B):
  """Return two keys per row for a round; a row's key itself only has children."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  rng_B = jax.vmap(jax.random.fold_in)(fold(rng_B, _ROUNDS), round_B)
  return fold(rng_B, 0), fold(rng_B, 1)


def _draft_rows(options, rows, rng_B):
  """Return the row options of the draft: the target's, with a temperature of its own if given."""
  rows = rows.replace(rng_B=rng_B)
  if options.draft_temperature is None:
    return rows
  temperature_B = jnp.full_like(rows.temperature_B, options.draft_temperature)
  plain = "greedy" if options.draft_temperature < COLD else "drawn"
  law = "any" if rows.law == "any" else plain
  return rows.replace(temperature_B=temperature_B, law=law)


def _round(target_model, draft_model, options, params, state):
  """Draft and verify the rest of the block of every running row."""
  target = Bound(target_model, params["target"])
  draft_network = Bound(draft_model, params["draft"])
  progress, size = state.progress, options.target.block_length
  rows = progress.options.only(progress.running_B)
  block = block_at(progress, state.start_B, size)
  before_BK = at_positions(progress.tokens_BW, jnp.maximum(block.position_BK - size, 0))
  pending_B = progress.running_B & (state.target_cache.length_B < state.start_B)
  before = Before(before_BK, pending_B)

  rng_B = rows.rng_B
  if not options.exact:  # fresh noise every round: what was rejected must not come back
    rng_B, rng_accept_B = _round_keys(rng_B, state.counts["target_passes"])
  draft_rows = _draft_rows(options, rows, rng_B)
  draft = propose(
    draft_network,
    options.draft,
    draft_rows,
    progress,
    state.draft_cache,
    block,
    state.step_B,
    want_logits=not options.exact,
  )
  if options.exact:
    out = _replay(target, state, before, options, rows, draft, block)
  else:
    rows = rows.replace(rng_B=rng_accept_B)
    out = _judge(target, state, before, options, (rows, draft_rows), draft, block)
  return _settle(options, state, draft, out, block, pending_B)


def _replay(target, state, before, options, rows, draft, block):
  """Apply the target's rule to every state of the draft; stop after the first other outcome."""
  copies, mask_id = options.draft.steps, options.target.mask_id
  states_BNK, used_BN = states(draft.tokens_BK, draft.time_BK, copies, mask_id)
  cache = state.target_cache
  found = verify_stacked(target, cache, states_BNK, used_BN, draft.tokens_BK, before)
  number_1N = jnp.arange(copies)[None, :]
  time_BNK = jnp.broadcast_to(draft.time_BK[:, None], states_BNK.shape)
  open_BNK = block.masked_BK[:, None] & (time_BNK > number_1N[..., None])
  step_BN = state.step_B[:, None] + number_1N
  by_state = jax.vmap(
    functools.partial(reveal, options.target, rows),
    in_axes=(Block(None, 1, 1, None), 1, 1),
    out_axes=1,
  )
  copied = block._replace(tokens_BK=states_BNK, masked_BK=open_BNK)
  out = by_state(copied, found.logits_BNKV, step_BN)  # [B, N, K]

  same_BNK = out.tokens_BK == draft.tokens_BK[:, None]
  same_BNK = jnp.where(
    time_BNK == number_1N[..., None] + 1, out.revealed_BK & same_BNK, ~out.revealed_BK
  )
  agree_BN = used_BN & jnp.all(same_BNK, axis=-1)
  whole = {"axis": 1, "dtype": jnp.int32}  # also where numbers have 64 bits: what loops carry
  agreed_B = jnp.sum(jnp.cumprod(agree_BN, axis=1), **whole)  # steps, from the first
  taken_BN = used_BN & (number_1N <= agreed_B[:, None])
  taken_BNK = taken_BN[..., None] & out.revealed_BK  # a position is in one state at most

  def merge(x_BNK):
    return jnp.sum(jnp.where(taken_BNK, x_BNK, 0), axis=1)

  confirmed_BK = block.masked_BK & (draft.time_BK <= agreed_B[:, None])
  return Outcome(
    revealed_BK=taken_BNK.any(axis=1),
    tokens_BK=merge(out.tokens_BK),
    step_BK=merge(jnp.broadcast_to(step_BN[..., None], time_BNK.shape)),
    log_prob_BK=merge(out.log_prob_BK),
    settled_B=state.step_B + jnp.sum(taken_BN, **whole),
    accepted_B=jnp.sum(confirmed_BK, **whole),
    before=found.before,
    finished=found.finished,
    agreed_B=jnp.all(confirmed_BK == block.masked_BK, axis=1),
  )


def _judge(target, state, before, options, both_rows, draft, block):
  """Read the target's opinions from one pass and accept from left to right."""
  mask_id = options.target.mask_id
  found = verify_simsd(
    target,
    state.target_cache,
    draft.tokens_BK[:, None],
    draft.time_BK[:, None],
    mask_id=mask_id,
    layout=options.layout,
    before=before,
  )
  rows, draft_rows = both_rows
  logits_BKV = found.logits_BNKV[:, 0]
  plain_BKV = law.law(mask_id, rows, logits_BKV, block.early_BK, truncated=False)
  gate = {"fill": options.fill, "eos_min_prob": options.eos_min_prob}
  gate["stop_BV"] = law.stop_table(rows, plain_BKV.shape[-1])

  def most_probable():
    return greedy_match(
      draft.tokens_BK, jax.nn.softmax(plain_BKV, axis=-1), block.masked_BK, **gate
    )

  def by_row():
    drawn = _reject(mask_id, rows, draft_rows, draft, block, logits_BKV, gate)
    choose = lambda x, y: jnp.where(rows.draws_B.reshape(-1, *(1,) * (x.ndim - 1)), x, y)  # noqa: E731
    return jax.tree.map(choose, drawn, most_probable())

  if rows.law == "greedy":
    verdict = most_probable()
  else:
    verdict = jax.lax.cond(jnp.any(rows.draws_B), by_row, most_probable)
  log_probs_BKV = jax.nn.log_softmax(plain_BKV, axis=-1)
  at_tokens = jnp.take_along_axis(log_probs_BKV, verdict.tokens_BK[..., None], axis=-1)
  return Outcome(
    revealed_BK=verdict.kept_BK,
    tokens_BK=verdict.tokens_BK,
    step_BK=jnp.minimum(draft.time_BK - 1, options.draft.steps),
    log_prob_BK=at_tokens[..., 0],
    settled_B=jnp.zeros_like(verdict.accepted_B),
    accepted_B=verdict.accepted_B,
    before=found.before,
    finished=None,
    agreed_B=jnp.zeros_like(verdict.bonus_B),
  )


def _reject(mask_id, rows, draft_rows, draft, block, logits_BKV, gate):
  """Accept by rejection, which is right for rows that draw."""
  size = block.masked_BK.shape[1]
  uniform_BQ = jax.vmap(lambda rng: jax.random.uniform(rng, (size + 2,)))(rows.rng_B)
  draft_BKV = law.law(mask_id, draft_rows, draft.logits_BKV, block.early_BK)
  target_BKV = law.law(mask_id, rows, logits_BKV, block.early_BK)
  return rejection(
    draft.tokens_BK,
    jnp.where(draft.drafted_BK[..., None], jax.nn.softmax(draft_BKV, axis=-1), 0.0),
    jax.nn.softmax(target_BKV, axis=-1),
    block.masked_BK,
    uniform_BQ[:, :size],
    uniform_BQ[:, size:],
    **gate,
  )


def _settle(options, state, draft, out, block, pending_B):
  """Write what was decided, store what is known of finished blocks, and count."""
  size, took_part_B = options.target.block_length, state.progress.running_B.astype(jnp.int32)
  progress = record(
    state.progress, block.position_BK, out.revealed_BK, out.tokens_BK, out.step_BK, out.log_prob_BK
  )
  progress = advance(progress.replace(passes_B=progress.passes_B + took_part_B))
  left_BK = at_positions(progress.masked_BW, block.position_BK)
  full_B = progress.running_B & ~jnp.any(left_BK, axis=1)
  cache = models.commit(state.target_cache, out.before, jnp.where(pending_B, size, 0))
  if out.finished is not None:
    reused_B = full_B & out.agreed_B
    cache = models.commit(cache, out.finished, jnp.where(reused_B, size, 0))
  drafted_BK = block.masked_BK & draft.drafted_BK
  added = (
    took_part_B,
    draft.passes_B,
    jnp.sum(drafted_BK, axis=1, dtype=jnp.int32),
    out.accepted_B,
  )
  return SpeculativeState(
    progress=progress,
    target_cache=cache,
    draft_cache=draft.cache,
    start_B=jnp.where(full_B, state.start_B + size, state.start_B),
    step_B=jnp.where(full_B, 0, out.settled_B),
    counts={n: state.counts[n] + more for n, more in zip(_COUNTS, added, strict=True)},
  )
