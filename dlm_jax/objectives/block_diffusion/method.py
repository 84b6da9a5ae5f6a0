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
import numpy as np
from jaxtyping import Array, Float, Int

from dlm_jax.arrays import FloatBL, Metrics, Params
from dlm_jax.errors import InputError
from dlm_jax.models import Decoder, masks
from dlm_jax.objectives.batch import Batch, split_each, valid_tokens
from dlm_jax.objectives.block_diffusion.documents import (
  number_documents,
  number_padding,
  positions_between,
)
from dlm_jax.objectives.block_diffusion.intervals import WIDTHS, candidates, quietest
from dlm_jax.objectives.block_diffusion.lengths import LengthCurriculum
from dlm_jax.objectives.options import ChunkedOptions
from dlm_jax.objectives.positions import map_positions, positions_per_chunk
from dlm_jax.objectives.state import (
  Objective,
  Optimizers,
  check_class,
  init_alone,
  over_micro_batches,
  update,
)
from dlm_jax.process import Absorbing, BlockNoise
from dlm_jax.process.block import FULL, number_blocks

TRAINED = ("model",)  # trees with an optimiser
NETWORK = (Decoder,)  # classes of networks that it trains


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
    "tokens": tokens_BL,
    "noisy": noised.tokens_L,
    "time": noised.time_L,
    "weight": noised.weight_L,
    "valid": valid_BL,
    "block": block_BL,
    "count": jnp.full((batch_size,), count),
    **places,
  }


def token_nll(
  params: Params,
  batch: Batch,
  *,
  model: Any,
  process: Absorbing,
  block_length: Int[Array, ""] | int,
  subs: bool = True,
  chunk: int | None = None,
) -> FloatBL:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChunkedOptions):
  """How blocks are noised and scored; the defaults are BD3-LM's; see also `ChunkedOptions`.

  SDAR's are levels="document", at_least_one=True, subs=False. Both mean a log-linear schedule with
  ε = 0. A block length of 1 masks everything and is next-token prediction, whatever the noise.

  Attributes:
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

  Raises:
    InputError: a number that does not fit.
  """

  block_length: int = 4
  earlier_lengths: tuple[int, ...] = ()
  earlier_steps: tuple[int, ...] = ()
  levels: str = "block"
  interval: tuple[float, ...] = FULL
  weight: str = "nelbo"
  at_least_one: bool = False
  subs: bool = True
  first_given: bool = False
  separator: int = -1
  search_every: int = 0
  search_widths: tuple[float, ...] = WIDTHS

  def __post_init__(self):
    super().__post_init__()
    _ = self.lengths, self.intervals_K2  # these raise for numbers that do not fit
    low_high = self.interval
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
      raise InputError(f"objective.interval={tuple(low_high)} must be two times in (0, 1], rising.")
    if self.search_every < 0:
      raise InputError(f"objective.search_every={self.search_every} is negative; 0 searches never.")

  @property
  def lengths(self) -> LengthCurriculum:
    """Block lengths by step."""
    return LengthCurriculum(
      lengths=(*self.earlier_lengths, self.block_length), steps=tuple(self.earlier_steps)
    )

  @property
  def intervals_K2(self) -> Float[np.ndarray, "K 2"]:
    """Intervals that are tried."""
    return candidates(tuple(self.search_widths))

  def noise(self, process: Absorbing) -> BlockNoise:
    """Return what is masked, and what it counts."""
    return BlockNoise(
      process=process, levels=self.levels, weight=self.weight, at_least_one=self.at_least_one
    )


def make(
  *, model: Decoder, process: Absorbing | None, optimizers: Optimizers, **options: Any
) -> Objective:
  """Build training of one tree, "model", from scratch or from an autoregressive network.

  Args:
    model: a decoder; its last row, or the process's choice, is the mask.
    process: absorbing; None is refused.
    optimizers: "model".
    **options: fields of `Options`.

  Raises:
    InputError: another network or process, or a number that does not fit.

  Reference: BD3-LM, arXiv 2503.09573, equations 3 and 8; SDAR, arXiv 2510.06303.
  """
  chosen = Options.of(options)
  check_class("model.name", model, NETWORK, "blocks need a mask of attention")
  check_class("process.name", process, (Absorbing,), "blocks are masked")
  chunk = positions_per_chunk(chosen.chunk, model.config.length, model.config.vocab_size)
  scoring = {"model": model, "process": process, "subs": chosen.subs, "chunk": chunk}
  places = {"first_given": chosen.first_given, "separator": chosen.separator}
  noised = functools.partial(with_noise, noise=chosen.noise(process), **places)
  every, intervals_K2 = chosen.search_every, jnp.asarray(chosen.intervals_K2)
  lengths, tx = chosen.lengths, optimizers["model"]
  init_tree = init_alone(model, tx, chosen, timed=False)

  def init(rng, teacher_params=None):
    state = init_tree(rng, teacher_params)
    return state.replace(aux={"interval": jnp.asarray(chosen.interval)} if every else {})

  def searched(params, batch, rng_B, block_length):
    noisy = noised({**batch, "rng": rng_B}, block_length=block_length)
    more = {"levels": chosen.levels, "accumulate": chosen.accumulate, "block_length": block_length}
    return search(params, noisy, intervals_K2, **more, **scoring)

  def step(state, batch):
    rng_noise_B, rng_search_B = split_each(batch["rng"], 2)
    block_length, current, extra = lengths(state.step), chosen.interval, {}
    if every:
      due = (state.step > 0) & (state.step % every == 0)
      find = functools.partial(searched, state.trees["model"], batch, rng_search_B, block_length)
      current = jax.lax.cond(due, find, lambda: state.aux["interval"])
      state = state.replace(aux={"interval": current})
      extra = {"model/interval_low": current[0], "model/interval_high": current[1]}
    batch = {**batch, "rng": rng_noise_B}
    noisy = noised(batch, block_length=block_length, interval=current)
    total = functools.partial(loss, block_length=block_length, **scoring)
    state, metrics, _ = update(state, "model", total, noisy, tx, **chosen.updates)
    return state.replace(step=state.step + 1), metrics | extra

  return Objective(
    init, step, output="model", export=lambda state: {"block_length": chosen.block_length}
  )
