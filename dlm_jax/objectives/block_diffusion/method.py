# SPDX-License-Identifier: Apache-2.0
"""Block diffusion: blocks one after the other, each by masked diffusion; in one pass per step.

The network reads [noisy | clean], a noisy copy of the tokens and the tokens themselves; a noisy
block sees itself and the clean blocks before it, see `masks.doubled`. Only the noisy half reaches
the head.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import Metrics, Params
from dlm_jax.models import Decoder, masks
from dlm_jax.objectives.batch import Batch, split_each, valid_tokens
from dlm_jax.objectives.block_diffusion.documents import (
  number_documents,
  number_padding,
  positions_between,
)
from dlm_jax.objectives.block_diffusion.intervals import WIDTHS, candidates, quietest
from dlm_jax.objectives.positions import map_positions, positions_per_chunk
from dlm_jax.objectives.state import Objective, make_state, over_micro_batches, update
from dlm_jax.process import Absorbing, BlockNoise
from dlm_jax.process.block import FULL, number_blocks

TRAINED = ("model",)  # trees with an optimiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
  """Block lengths by step.

  Attributes:
    lengths: one more than there are steps.
    steps: rising; the step from which the next length holds.

  Raises:
    ValueError: the numbers do not fit.
  """

  lengths: tuple[int, ...]
  steps: tuple[int, ...] = ()

  def __post_init__(self):
    *earlier, final = self.lengths
    if final < 1 or min(earlier, default=1) < 1:
      raise ValueError(
        f"objective.block_length={final} and objective.earlier_lengths={tuple(earlier)} must be at "
        "least 1."
      )
    rising = all(a < b for a, b in zip((0, *self.steps), self.steps, strict=False))
    if len(earlier) != len(self.steps) or not rising:
      raise ValueError(
        f"objective.earlier_steps={self.steps} must rise from 1 or more and be as many as "
        f"objective.earlier_lengths={tuple(earlier)}: the step at which each ends."
      )

  def __call__(self, step: Int[Array, ""]) -> Int[Array, ""] | int:
    """Return the block length at a step; a plain number if there is but one."""
    if not self.steps:
      return self.lengths[0]
    stage = jnp.sum(step >= jnp.asarray(self.steps))
    return jnp.asarray(self.lengths)[stage]


def with_noise(
  batch: Batch,
  *,
  noise: BlockNoise,
  block_length: Int[Array, ""] | int,
  interval: Float[Array, "2"] | tuple[float, float] = FULL,
  first_given: bool = False,
  separator: int = -1,
  row_B: Int[Array, "B"] | None = None,
  rows: int | None = None,
) -> Batch:
  """Draw a noisy copy of a global batch, before it is cut into micro-batches.

  Args:
    batch: "tokens", "rng"; "valid", False on prompts; and "position" if rows hold several
      documents: it starts over in each, and zeros at the end of a row are padding.
    noise: what is masked, and what it counts.
    block_length: tokens per block.
    interval: smallest and largest time.
    first_given: the first token of every document is given, as in next-token prediction.
    separator: the id that every document starts with, to find documents by where there is no
      "position"; below 0: a row is one document.
    row_B: for batches that are part of a larger one, over which levels are stratified: which rows
      of it these are. None: the batch is whole.
    rows: of the larger one.

  Returns:
    "tokens", "noisy", "time" and "weight" per position, "valid", "block" numbers, "count", the mean
    number of valid tokens per row of the whole batch, and, with several documents per row,
    "position" and "document" numbers.
  """
  tokens_BL, valid_BL = batch["tokens"], valid_tokens(batch)
  batch_size, length = tokens_BL.shape
  several = "position" in batch or separator >= 0
  if "position" in batch:
    position_BL = jax.vmap(number_padding)(batch["position"])
  elif several:
    position_BL = jax.vmap(positions_between)(tokens_BL == separator)
  else:
    position_BL = jnp.broadcast_to(jnp.arange(length), (batch_size, length))
  document_BL = jax.vmap(number_documents)(position_BL)
  if first_given:
    valid_BL &= position_BL > 0
  block_BL = jax.vmap(number_blocks, (0, None))(position_BL, block_length)

  def draw(row, rng, *sequence):
    return noise.draw(
      rng, *sequence, interval=interval, single=block_length == 1, row=row, rows=rows or batch_size
    )

  noised = jax.vmap(draw)(
    jnp.arange(batch_size) if row_B is None else row_B,
    batch["rng"],
    tokens_BL,
    block_BL,
    document_BL,
    valid_BL,
  )
  count = jnp.maximum(valid_BL.sum(), 1) / batch_size
  places = {"position": position_BL, "document": document_BL} if several else {}
  return {
    "tokens": tokens_BL, "noisy": noised.tokens_L, "time": noised.time_L,
    "weight": noised.weight_L, "valid": valid_BL, "block": block_BL,
    "count": jnp.full((batch_size,), count), **places,
  }  # fmt: skip


def token_nll(
  params: Params,
  batch: Batch,
  *,
  model: Any,
  process: Absorbing,
  block_length: Int[Array, ""] | int,
  subs: bool = True,
  chunk: int | None = None,
) -> Float[Array, "B L"]:
  """Return weighted nats of every masked token given its block's state and earlier clean blocks.

  Args:
    params: of the network.
    batch: as `with_noise` returns it.
    model: a `Decoder`, or what has its `trunk`, under a mask, and its `head`.
    process: says what the mask is.
    block_length: tokens per block.
    subs: the mask is no possible token; False: the softmax runs over all rows, as in SDAR.
    chunk: positions whose logits are alive at a time; None: all.
  """
  tokens_BL, noisy_BL = batch["tokens"], batch["noisy"]
  length = tokens_BL.shape[1]
  position = batch["position"] if "position" in batch else jnp.arange(length)[None]
  slots = masks.doubled_slots(position, block_length, batch.get("document", 0))
  inputs_BL = jnp.concatenate([noisy_BL, tokens_BL], axis=1)
  hidden_BLD = model.apply(
    {"params": params}, inputs_BL, slots.position, masks.doubled(slots), method="trunk"
  )[:, :length]

  def nll(hidden_BKD, noisy_BK, tokens_BK, weight_BK):
    logits_BKV = model.apply({"params": params}, hidden_BKD, method="head")
    if subs:
      logits_BKV = process.clean_logits(logits_BKV)
    # A sum over V, not a gather: that one's gradient is a scatter into a dense array of zeros.
    at_token_BKV = jnp.arange(logits_BKV.shape[-1])[None, None] == tokens_BK[..., None]
    log_prob_BK = jnp.sum(jnp.where(at_token_BKV, logits_BKV, 0.0), axis=-1)
    nats_BK = jax.nn.logsumexp(logits_BKV, axis=-1) - log_prob_BK
    return jnp.where(noisy_BK == process.mask_id, weight_BK * nats_BK, 0.0)

  return map_positions(nll, (hidden_BLD, noisy_BL, tokens_BL, batch["weight"]), chunk)


def loss(params: Params, batch: Batch, **options) -> tuple[Float[Array, ""], tuple[Metrics, None]]:
  """Return the Monte-Carlo NELBO in nats per valid token of the whole batch.

  The options are those of `token_nll`. Rows with more valid tokens weigh more: a sum over all
  masked tokens divided by the number of all valid ones, whatever the micro-batches.
  """
  nll_BL = token_nll(params, batch, **options)
  masked_BL = batch["noisy"] == options["process"].mask_id
  masked = jnp.mean((masked_BL & batch["valid"]).sum(1) / batch["count"])
  return jnp.mean((nll_BL * batch["valid"]).sum(1) / batch["count"]), ({"masked": masked}, None)


def search(
  params: Params,
  batch: Batch,
  intervals_K2: Float[Array, "K 2"],
  *,
  levels: str = "block",
  accumulate: int = 1,
  **options,
) -> Float[Array, "2"]:
  """Return the interval in which the estimates of the noised groups of a batch vary least.

  Args:
    params: of the network.
    batch: as `with_noise` returns it, its times drawn from the full interval.
    intervals_K2: candidates.
    levels: what shares a level: "block" or "document".
    accumulate: micro-batches.
    **options: of `token_nll`.

  Reference: BD3-LM, arXiv 2503.09573, section 5.3.
  """
  length = batch["tokens"].shape[1]
  nll_BL = over_micro_batches(functools.partial(token_nll, params, **options), batch, accumulate)
  group_BL = batch["block"]
  if levels == "document":
    group_BL = batch.get("document", jnp.zeros_like(group_BL))
  total = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=length))
  count_BL = total(batch["valid"].astype(jnp.float32), group_BL)
  mean_BL = total(nll_BL * batch["valid"], group_BL) / jnp.maximum(count_BL, 1)
  time_BL = jax.vmap(functools.partial(jax.ops.segment_max, num_segments=length))(
    batch["time"], group_BL
  )
  flat = (x.reshape(-1) for x in (time_BL, mean_BL, count_BL > 0))
  return quietest(*flat, intervals_K2)[0]


def make(
  *,
  model: Decoder,
  process: Absorbing | None,
  optimizers: dict[str, optax.GradientTransformation],
  block_length: int = 4,
  earlier_lengths: tuple[int, ...] = (),
  earlier_steps: tuple[int, ...] = (),
  levels: str = "block",
  interval: tuple[float, ...] = FULL,
  weight: str = "nelbo",
  at_least_one: bool = False,
  subs: bool = True,
  first_given: bool = False,
  separator: int = -1,
  search_every: int = 0,
  search_widths: tuple[float, ...] = WIDTHS,
  chunk: int | None = None,
  accumulate: int = 1,
  ema_decay: float | None = 0.9999,
) -> Objective:
  """Build training of one tree, "model", from scratch or from an autoregressive network.

  The defaults are BD3-LM's. SDAR's are levels="document", at_least_one=True, subs=False. Both mean
  a log-linear schedule with ε = 0. A block length of 1 masks everything and is next-token
  prediction, whatever the noise.

  Args:
    model: a decoder; its last row, or the process's choice, is the mask.
    process: absorbing; None is refused.
    optimizers: "model".
    block_length: tokens per block.
    earlier_lengths: a curriculum: block lengths before the last one.
    earlier_steps: the step at which each of them ends.
    levels, weight, at_least_one: see `BlockNoise`.
    interval: smallest and largest time; where the search starts from.
    subs: see `token_nll`.
    first_given, separator: see `with_noise`.
    search_every: steps between searches of the interval with the quietest loss, each one forward
      pass over the batch at hand; it is kept in `state.aux`. 0: never.
    search_widths: of the intervals that are tried.
    chunk: positions whose logits are alive at a time; must divide L. None takes the most that stay
      below 2²² entries per sequence.
    accumulate: micro-batches per update.
    ema_decay: None keeps no average.

  Raises:
    ValueError: another network or process, or a number that does not fit.

  Reference: BD3-LM, arXiv 2503.09573, equations 3 and 8; SDAR, arXiv 2510.06303.
  """
  _check(model, process, interval, search_every)
  lengths = Curriculum(lengths=(*earlier_lengths, block_length), steps=tuple(earlier_steps))
  noise = BlockNoise(process=process, levels=levels, weight=weight, at_least_one=at_least_one)
  chunk = positions_per_chunk(chunk, model.config.length, model.config.vocab_size)
  intervals_K2 = candidates(tuple(search_widths))
  options = {"model": model, "process": process, "subs": subs, "chunk": chunk}
  places = {"first_given": first_given, "separator": separator, "noise": noise}
  tx = optimizers["model"]

  def init(rng, teacher_params=None):
    tokens = jnp.zeros((1, model.config.length), jnp.int32)
    params = model.init(rng, tokens)["params"] if teacher_params is None else teacher_params
    state = make_state({"model": params}, {"model": tx}, ("model",) if ema_decay else ())
    return state.replace(aux={"interval": jnp.asarray(interval)} if search_every else {})

  def searched(params, batch, rng_B, block_length):
    noisy = with_noise({**batch, "rng": rng_B}, block_length=block_length, **places)
    more = {"levels": levels, "accumulate": accumulate, "block_length": block_length, **options}
    return search(params, noisy, jnp.asarray(intervals_K2), **more)

  def step(state, batch):
    rng_noise_B, rng_search_B = split_each(batch["rng"], 2)
    block_length, current, extra = lengths(state.step), interval, {}
    if search_every:
      due = (state.step > 0) & (state.step % search_every == 0)
      find = functools.partial(searched, state.trees["model"], batch, rng_search_B, block_length)
      current = jax.lax.cond(due, find, lambda: state.aux["interval"])
      state = state.replace(aux={"interval": current})
      extra = {"model/interval_low": current[0], "model/interval_high": current[1]}
    batch = {**batch, "rng": rng_noise_B}
    noisy = with_noise(batch, block_length=block_length, interval=current, **places)
    state, metrics, _ = update(
      state, "model", functools.partial(loss, block_length=block_length, **options), noisy, tx,
      accumulate=accumulate, decay=ema_decay,
    )  # fmt: skip
    return state.replace(step=state.step + 1), metrics | extra

  return Objective(init, step, output="model", export=lambda state: {"block_length": block_length})


def _check(model, process, interval, search_every):
  """Refuse what no block diffusion can be trained on."""
  if not isinstance(model, Decoder):
    raise ValueError("model.name must be decoder: blocks need a mask of attention.")
  if not isinstance(process, Absorbing):
    raise ValueError("process.name must be absorbing: blocks are masked.")
  if len(interval) != 2 or not 0 < interval[0] <= interval[1] <= 1:
    raise ValueError(f"objective.interval={tuple(interval)} must be two times in (0, 1], rising.")
  if search_every < 0:
    raise ValueError(f"objective.search_every={search_every} is negative; 0 searches never.")
