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
           an acceptance rule from left to right, see `accept`.

Passes: the block before rides along with a round's first pass of either network, as in folded block
decoding, unless its keys and values are known from a stacked pass in which everything agreed. So a
round is one target pass, and settles at least one step (stacked) or token (simsd).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from dlm_jax import models
from dlm_jax.decode.accept import FILLS, greedy_match, rejection
from dlm_jax.decode.block import block_decoder
from dlm_jax.decode.draft import propose
from dlm_jax.decode.loop import Decoder
from dlm_jax.decode.progress import advance, at_positions, record
from dlm_jax.decode.rule import BlockOptions, law, reveal
from dlm_jax.decode.verify import Before, states, verify_simsd, verify_stacked
from dlm_jax.errors import InputError, check_choice
from dlm_jax.models import masks

VERIFICATIONS = ("stacked", "simsd")
ACCEPTANCES = ("greedy_match", "rejection")
STACKED_MOST = 8  # tokens per block up to which stacked states are nearly free
_ROUNDS = 2**31 - 2  # no position has this number: a child of the row's key of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeOptions:
  """How a draft is made and verified.

  Attributes:
    target: the target's rule; also gives block length, mask and stop ids.
    draft: the draft's rule; None: the target's. Another one never changes the text of "stacked",
      but agreement needs the same order of the same tokens.
    verify: "stacked" or "simsd", see the module; None: "stacked" up to 8 tokens per block.
    layout: of "simsd": "unified" or, as released, "published"; see `models.masks.simsd`.
    acceptance: of "simsd": "greedy_match", with a target of temperature 0; or "rejection", with
      two temperatures above 0.
    fill: of "simsd": what becomes of the tokens after a rejection, see `accept`.
    eos_min_prob: of "simsd": where the target has less than this on the stop ids, a token of its
      own after a rejection is never one of them; 0 is off.

  Raises:
    InputError: an option is unknown, or options do not go together.
  """

  target: BlockOptions
  draft: BlockOptions | None = None
  verify: str | None = None
  layout: str = "unified"
  acceptance: str = "greedy_match"
  fill: str = "truncate"
  eos_min_prob: float = 0.0

  def __post_init__(self):
    if self.draft is None:
      object.__setattr__(self, "draft", self.target)
    if self.verify is None:
      object.__setattr__(self, "verify", _default_verify(self.target))
    check_choice("verify", self.verify, VERIFICATIONS)
    check_choice("layout", self.layout, masks.LAYOUTS)
    check_choice("acceptance", self.acceptance, ACCEPTANCES)
    check_choice("fill", self.fill, FILLS)
    for name in ("block_length", "mask_id"):
      ours, theirs = getattr(self.target, name), getattr(self.draft, name)
      if ours != theirs:
        raise InputError(f"draft.{name}={theirs} must be target.{name}={ours}.")
    self._check_acceptance()

  def _check_acceptance(self):
    temperatures = (self.target.temperature, self.draft.temperature)
    if not 0 <= self.eos_min_prob <= 1:
      raise InputError(f"eos_min_prob={self.eos_min_prob} must be in 0 … 1.")
    if self.exact:
      for field in dataclasses.fields(self)[3:]:
        if getattr(self, field.name) != field.default:
          raise InputError(
            f"{field.name}={getattr(self, field.name)!r} is an option of verify='simsd'; "
            f"verify='stacked' accepts what the target alone would decide. Leave it out."
          )
    elif self.acceptance == "greedy_match" and self.target.temperature != 0:
      raise InputError(
        f"acceptance='greedy_match' emits the target's most probable tokens and target.temperature="
        f"{self.target.temperature}; set it to 0, or take acceptance='rejection' or "
        "verify='stacked'."
      )
    elif self.acceptance == "rejection" and 0 in temperatures:
      raise InputError(
        f"acceptance='rejection' needs drawn tokens: temperatures of target and draft above 0, not "
        f"{temperatures[0]} and {temperatures[1]}; or take acceptance='greedy_match'."
      )

  @property
  def exact(self) -> bool:
    """Whether the text is the target's own, token for token; up to float32 rounding."""
    return self.verify == "stacked"


def _default_verify(target):
  return "stacked" if target.block_length <= STACKED_MOST else "simsd"


def fitting_acceptance(target: BlockOptions, verify: str | None = None) -> str:
  """Return the acceptance that goes with a rule of both networks: "rejection" of drawn tokens.

  Args:
    target: the rule.
    verify: see `SpeculativeOptions`; "stacked" has no choice but the default.
  """
  drawn = target.temperature > 0 and (verify or _default_verify(target)) == "simsd"
  return "rejection" if drawn else "greedy_match"


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
) -> Decoder:
  """Return a decoder for `sample.decode` whose parameters are {"target": …, "draft": …}.

  Rows are independent and advance at their own pace. `Info.counts` has passes of either network and
  drafted and accepted tokens, per row. With "stacked" tokens, steps and log-probabilities are those
  of `block_decoder(target_model, options.target, max_length)` for the same key.

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
    >>> rule = sample.BlockOptions(block_length=4, mask_id=8)
    >>> options = sample.SpeculativeOptions(target=rule)
    >>> decoder = sample.speculative_decoder(model, model, options, max_length=12)
    >>> tokens, info = sample.decode(
    ...   decoder, {"target": params, "draft": params}, prompt, jax.random.key(1))
    >>> info.counts["target_passes"].tolist()  # one per block: the draft is the target
    [3]
  """
  sizes = (target_model.config.vocab_size, draft_model.config.vocab_size)
  if sizes[0] != sizes[1]:
    raise InputError(f"the draft has vocab_size={sizes[1]}; it must be the target's, {sizes[0]}.")
  target = block_decoder(target_model, options.target, max_length)
  draft = block_decoder(draft_model, options.draft, max_length)

  def init(params, prompt, rng, lengths=None, max_length=None):
    state = target.init(params["target"], prompt, rng, lengths, max_length)
    other = draft.init(params["draft"], prompt, rng, lengths, max_length)
    zero_B = jnp.zeros_like(state.start_B)
    counts = dict.fromkeys(("target_passes", "draft_passes", "drafted", "accepted"), zero_B)
    return SpeculativeState(state.progress, state.cache, other.cache, state.start_B, zero_B, counts)

  return Decoder(
    init=init,
    round=functools.partial(_round, target_model, draft_model, options),
    done=lambda state: ~state.progress.running_B,
  )


def _round_keys(rng_B, round_B):
  """Return two keys per row for a round; a row's key itself only has children."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  rng_B = jax.vmap(jax.random.fold_in)(fold(rng_B, _ROUNDS), round_B)
  return fold(rng_B, 0), fold(rng_B, 1)


def _round(target_model, draft_model, options, params, state):
  """Draft and verify the rest of the block of every running row."""
  progress, size = state.progress, options.target.block_length
  position_BK = state.start_B[:, None] + jnp.arange(size)[None, :]
  tokens_BK = at_positions(progress.tokens_BW, position_BK)
  masked_BK = at_positions(progress.masked_BW, position_BK) & progress.running_B[:, None]
  before_BK = at_positions(progress.tokens_BW, jnp.maximum(position_BK - size, 0))
  pending_B = progress.running_B & (state.target_cache.length_B < state.start_B)
  before = Before(before_BK, pending_B)

  rng_B, want_probs = progress.rng_B, options.acceptance == "rejection"
  if not options.exact:  # fresh noise every round: what was rejected must not come back
    rng_B, rng_accept_B = _round_keys(rng_B, state.counts["target_passes"])
  draft = propose(
    draft_model,
    params["draft"],
    options.draft,
    rng_B,
    progress,
    state.draft_cache,
    position_BK,
    tokens_BK,
    masked_BK,
    state.step_B,
    want_probs=want_probs,
  )
  target = (target_model, params["target"], state.target_cache)
  if options.exact:
    out = _replay(target, before, options, rng_B, draft, position_BK, masked_BK, state.step_B)
  else:
    out = _judge(target, before, options, rng_accept_B, draft, masked_BK)
  return _settle(options, state, draft, out, position_BK, masked_BK, pending_B)


def _replay(target, before, options, rng_B, draft, position_BK, masked_BK, step_B):
  """Apply the target's rule to every state of the draft; stop after the first other outcome."""
  copies, mask_id = options.draft.steps, options.target.mask_id
  states_BNK, used_BN = states(draft.tokens_BK, draft.time_BK, copies, mask_id)
  found = verify_stacked(*target, states_BNK, used_BN, draft.tokens_BK, before)
  number_1N = jnp.arange(copies)[None, :]
  time_BNK = jnp.broadcast_to(draft.time_BK[:, None], states_BNK.shape)
  open_BNK = masked_BK[:, None] & (time_BNK > number_1N[..., None])
  step_BN = step_B[:, None] + number_1N
  by_state = jax.vmap(functools.partial(reveal, options.target), in_axes=(None, 0, 0, 0, 0, None))
  out = jax.vmap(by_state)(rng_B, states_BNK, open_BNK, found.logits_BNKV, step_BN, position_BK)

  same_BNK = out.tokens_K == draft.tokens_BK[:, None]
  same_BNK = jnp.where(
    time_BNK == number_1N[..., None] + 1, out.revealed_K & same_BNK, ~out.revealed_K
  )
  agree_BN = used_BN & jnp.all(same_BNK, axis=-1)
  agreed_B = jnp.cumprod(agree_BN, axis=1).sum(axis=1)  # steps, from the first
  taken_BN = used_BN & (number_1N <= agreed_B[:, None])
  taken_BNK = taken_BN[..., None] & out.revealed_K  # a position is in one state at most

  def merge(x_BNK):
    return jnp.sum(jnp.where(taken_BNK, x_BNK, 0), axis=1)

  confirmed_BK = masked_BK & (draft.time_BK <= agreed_B[:, None])
  return Outcome(
    revealed_BK=taken_BNK.any(axis=1),
    tokens_BK=merge(out.tokens_K),
    step_BK=merge(jnp.broadcast_to(step_BN[..., None], time_BNK.shape)),
    log_prob_BK=merge(out.log_prob_K),
    settled_B=step_B + taken_BN.sum(axis=1),
    accepted_B=confirmed_BK.sum(axis=1),
    before=found.before,
    finished=found.finished,
    agreed_B=jnp.all(confirmed_BK == masked_BK, axis=1),
  )


def _judge(target, before, options, rng_B, draft, masked_BK):
  """Read the target's opinions from one pass and accept from left to right."""
  found = verify_simsd(
    *target,
    draft.tokens_BK[:, None],
    draft.time_BK[:, None],
    mask_id=options.target.mask_id,
    layout=options.layout,
    before=before,
  )
  logits_BKV = found.logits_BNKV[:, 0]
  gate = {"stop_ids": options.target.stop_ids, "eos_min_prob": options.eos_min_prob}
  if options.acceptance == "greedy_match":
    probs_BKV = jax.nn.softmax(law(options.target, logits_BKV, filtered=False), axis=-1)
    verdict = greedy_match(draft.tokens_BK, probs_BKV, masked_BK, fill=options.fill, **gate)
  else:
    size = masked_BK.shape[1]
    uniform = lambda rng: jax.random.uniform(rng, (size + 2,))  # noqa: E731
    uniform_BQ = jax.vmap(uniform)(rng_B)
    probs_BKV = jax.nn.softmax(law(options.target, logits_BKV), axis=-1)
    verdict = rejection(
      draft.tokens_BK,
      draft.probs_BKV,
      probs_BKV,
      masked_BK,
      uniform_BQ[:, :size],
      uniform_BQ[:, size:],
      fill=options.fill,
      **gate,
    )
  log_probs_BKV = jax.nn.log_softmax(law(options.target, logits_BKV, filtered=False), axis=-1)
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


def _settle(options, state, draft, out, position_BK, masked_BK, pending_B):
  """Write what was decided, store what is known of finished blocks, and count."""
  size, took_part_B = options.target.block_length, state.progress.running_B.astype(jnp.int32)
  progress = record(
    state.progress, position_BK, out.revealed_BK, out.tokens_BK, out.step_BK, out.log_prob_BK
  )
  progress = progress.replace(passes_B=progress.passes_B + took_part_B)
  progress = advance(progress, options.target.stop_ids)
  full_B = progress.running_B & ~jnp.any(at_positions(progress.masked_BW, position_BK), axis=1)
  cache = models.commit(state.target_cache, out.before, jnp.where(pending_B, size, 0))
  if out.finished is not None:
    reused_B = full_B & out.agreed_B
    cache = models.commit(cache, out.finished, jnp.where(reused_B, size, 0))
  added = {
    "target_passes": took_part_B,
    "draft_passes": draft.passes_B,
    "drafted": jnp.sum(masked_BK & (draft.time_BK < masks.UNDRAFTED), axis=1),
    "accepted": out.accepted_B,
  }
  return SpeculativeState(
    progress=progress,
    target_cache=cache,
    draft_cache=draft.cache,
    start_B=jnp.where(full_B, state.start_B + size, state.start_B),
    step_B=jnp.where(full_B, 0, out.settled_B),
    counts={name: total + added[name] for name, total in state.counts.items()},
  )
