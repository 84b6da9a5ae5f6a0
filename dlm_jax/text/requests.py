# SPDX-License-Identifier: Apache-2.0
"""What is asked of a decoder, checked: block length, numbers, seeds, draft, room."""

import dataclasses
import numbers
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dlm_jax import draw, fields, mesh, sample
from dlm_jax.errors import InputError, hint
from dlm_jax.text.prompts import is_whole, unwrapped

VERIFY = ("stacked", "simsd", "none")
OF_ROWS = ("temperature", "top_k", "top_p", "threshold")  # these may differ from text to text
_FEWEST_STOPS = 4  # rows of stop ids are padded to this or a power of two above
_SHORTEST = 32  # prompts are padded to this or a power of two above: they share a program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A checked request: what to decode and how.

  Attributes:
    prompt_BP: ids, padded on the right.
    lengths_B: tokens of each prompt.
    options: of every row; without keys.
    stop_ids: of every row, those in the options.
    stop_texts: of every row; found in decided text, where they may be parts of tokens.
    watched: whether one of these is several tokens, which only a host sees in time.
    window: tokens of the longest possible row.
    rule: how the network decides a block.
    speculative: how the draft is verified; None: there is none.
  """

  prompt_BP: Any
  lengths_B: Any
  options: sample.RowOptions
  stop_ids: tuple[tuple[int, ...], ...]
  window: int
  rule: sample.BlockRule
  speculative: sample.SpeculativeOptions | None = None
  stop_texts: tuple[tuple[str, ...], ...] = ()
  watched: bool = False

  @property
  def limits_B(self) -> Any:
    """The most tokens of each row, prompt included."""
    return self.options.limit_B

  @property
  def mode(self) -> str:
    """One line: how it is decoded, and whether that is exact."""
    if self.speculative is None:
      return "no draft: exact, the network's own decode"
    if self.speculative.exact:
      return "verify=stacked: exact up to rounding, the text that the target writes alone"
    layout = self.speculative.layout
    return f"verify=simsd, layout={layout}: not exact, an approximation of the target's text"


def block_length(source: pathlib.Path, trained: int | None, asked: Any) -> int:
  """Return the block length: what is asked must be what the checkpoint was trained with.

  Raises:
    InputError: it is another one, or neither is known.
  """
  if asked is not None and not is_whole(asked):
    raise InputError(f"block_length={asked!r} is a {type(asked).__name__}; give a whole number.")
  if asked is None and trained is None:
    raise InputError(
      f"{source} does not say its block length; give what it was trained with: block_length=4 for "
      "public SDAR checkpoints without a suffix -bN."
    )
  if asked is not None and trained is not None and asked != trained:
    raise InputError(
      f"block_length={asked}, but {source} was trained with {trained}; leave it out, or take the "
      "checkpoint of that length."
    )
  return trained if asked is None else asked


def rule(
  length: int,
  mask_id: int,
  stops: tuple[tuple[int, ...], ...],
  fewest: list[int],
  options: dict[str, Any],
) -> tuple[sample.BlockRule, sample.RowOptions]:
  """Return what shapes the program, and what each text asks of it.

  Args:
    length: of a block.
    mask_id: the mask.
    stops: stop ids of every text.
    fewest: new tokens of every text that are no stop ids.
    options: of `BlockRule`, or, one value or one per text, of `RowOptions.make`; the temperature is
      0 unless given.

  Raises:
    InputError: an option is unknown or out of range.
  """
  static = {field.name for field in dataclasses.fields(sample.BlockRule)}
  static -= {"block_length", "mask_id"}
  for name in options:
    if name not in static | set(OF_ROWS):
      raise InputError(f"{name} is no option of decoding{hint(name, static | set(OF_ROWS))}.")
    _check_option(name, options[name])
  shaping = {name: value for name, value in options.items() if name in static}
  asked = {name: value for name, value in options.items() if name not in static}
  width = max(_FEWEST_STOPS, 1 << (max(map(len, stops), default=0) - 1).bit_length())
  padded = [[*ids, *[-1] * (width - len(ids))] for ids in stops]  # few widths, few programs
  rows = sample.RowOptions.make(
    len(stops),
    **{"temperature": 0.0, **asked},
    stop_ids=np.asarray(padded).reshape(-1, width),
    minimum=fewest,
  )
  return sample.BlockRule(block_length=length, mask_id=mask_id, **shaping), rows


def speculative(
  drafted: bool, block: sample.BlockRule, verify: Any, layout: Any
) -> sample.SpeculativeOptions | None:
  """Return how a draft is verified; None: there is none, or it is left aside.

  Raises:
    InputError: an option is unknown or needs another one.
  """
  if verify is not None and verify not in VERIFY:
    near = hint(verify, VERIFY) if isinstance(verify, str) else ""
    raise InputError(f"verify={verify!r} is unknown{near}; use {', '.join(VERIFY)}.")
  if layout is not None and not isinstance(layout, str):
    raise InputError(f"layout={layout!r} is a {type(layout).__name__}; give unified or published.")
  if not drafted and verify not in (None, "none"):
    raise InputError(f"verify={verify!r} needs a draft; name a smaller network as draft.")
  if layout is not None and not (drafted and verify == "simsd"):
    raise InputError(f"layout={layout!r} is of verify='simsd' with a draft.")
  if not drafted or verify == "none":
    return None
  more = {} if layout is None else {"layout": layout}
  return sample.SpeculativeOptions(target=block, verify=verify, **more)


_WHOLE, _SWITCHES = ("top_k", "steps"), ("fold", "count_mask")
_CHOICES = ("strategy", "confidence", "budget")
_LARGEST = float(np.finfo(np.float32).max)


def _check_option(name, given):
  """Refuse what is no number, switch or name; ranges are checked where they are known."""
  parts = unwrapped(given)
  several = name in OF_ROWS and isinstance(parts, (list, tuple))
  for one in parts if several else [parts]:
    if name in _SWITCHES:
      good, what = isinstance(one, bool), "True or False"
    elif name in _CHOICES:
      good, what = isinstance(one, str), "a name"
    elif name in _WHOLE:
      good = (is_whole(one) and abs(one) < 2**31) or (name == "steps" and one is None)
      what = "a whole number"
    else:
      real = isinstance(one, numbers.Real) and not isinstance(one, bool)
      good, what = real and abs(one) <= _LARGEST, "a finite number"
    if not good:
      more = ", or one for each prompt" if name in OF_ROWS else ""
      raise InputError(f"{name}={given!r} cannot be used; give {what}{more}.")


def counts(max_new_tokens: Any, min_new_tokens: Any, count: int) -> tuple[list[int], list[int]]:
  """Return the most and the fewest new tokens of each of so many texts.

  Args:
    max_new_tokens: a whole number, or one for each text.
    min_new_tokens: likewise.
    count: texts.

  Raises:
    InputError: one is no whole number or out of range, or there is another number of them.
  """
  found = []
  for name, given, least in (
    ("max_new_tokens", max_new_tokens, 1),
    ("min_new_tokens", min_new_tokens, 0),
  ):
    asked = whole_numbers(name, given, count)
    if min(asked, default=least) < least:
      raise InputError(f"{name}={given} must be at least {least}.")
    found.append(asked)
  if any(fewest > most for most, fewest in zip(*found, strict=True)):
    raise InputError(
      f"min_new_tokens={min_new_tokens} must be at most max_new_tokens={max_new_tokens}."
    )
  return found[0], found[1]


def whole_numbers(name: str, given: Any, count: int) -> list[int]:
  """Return a whole number for each of so many texts.

  Raises:
    InputError: one is none, or there is another number of them.
  """
  given = unwrapped(given)
  found = list(given) if isinstance(given, (list, tuple)) else [given] * count
  if not all(map(is_whole, found)):
    raise InputError(
      f"{name}={given!r} cannot be used; give a whole number, or one for each prompt."
    )
  if len(found) != count:
    raise InputError(
      f"{name} has {len(found)} numbers; give one, or one for each of {count} prompts."
    )
  return list(map(int, found))


def seeds(seed: Any, rows: int) -> list[int]:
  """Return a seed for each of so many texts.

  Args:
    seed: a whole number of 64 bits, negative or not, or one for each text.
    rows: texts.

  Raises:
    InputError: one is none, or there is another number of them.
  """
  found = whole_numbers("seed", seed, rows)
  return [fields.SEED.check("seed", one) for one in found]


def keys(seed: Any, rows: int) -> Key[Array, "B"]:
  """Return a key per row: children of one seed's, or the first child of each row's own.

  Args:
    seed: as for `seeds`.
    rows: how many.

  Raises:
    InputError: see `seeds`.
  """
  given = seeds(seed, rows)
  several = isinstance(seed, (list, tuple)) or getattr(seed, "ndim", 0)
  children = [0] * rows if several else range(rows)
  each = zip(given, children, strict=True)
  made = [jax.random.fold_in(draw.key(one), child) for one, child in each]
  return jnp.stack(made)


def lay_out(
  source: pathlib.Path, rows: list[list[int]], new: list[int], config: Any
) -> dict[str, Any]:
  """Return encoded prompts, their lengths and limits, and the window that they share.

  Args:
    source: of the network, for messages.
    rows: ids.
    new: the most new tokens of each.
    config: of the network.

  Raises:
    InputError: a prompt and what follows it do not fit the network's positions.
  """
  most = config.length
  for number, (row, more) in enumerate(zip(rows, new, strict=True), start=1):
    if len(row) + more > most:
      room = most - len(row)
      advice = f"use at most {room} new tokens." if room > 0 else "shorten the prompt."
      raise InputError(
        f"prompt {number} has {len(row)} tokens, and with max_new_tokens={more} they do "
        f"not fit the cache of {most} positions, the most of {source}; {advice}"
      )
  longest = max(map(len, rows), default=0)
  width = max(_SHORTEST, 1 << max(longest - 1, 0).bit_length())
  window = min(width + max(new, default=1), most)
  prompt_BP, lengths_B = sample.pad_prompts(rows, min(width, window))
  limit_B = lengths_B + np.asarray(new, np.int32)
  return {"prompt_BP": prompt_BP, "lengths_B": lengths_B, "limit_B": limit_B, "window": window}


def check_room(what: str, config: Any, rows: int, window: int) -> None:
  """Refuse texts whose cache and logits the memory of this machine cannot hold.

  Args:
    what: they are, for the message.
    config: of the network.
    rows: texts.
    window: positions of each in the cache.

  Raises:
    InputError: they do not fit.
  """
  of_token = 2 * config.layers * config.kv_heads * config.head_dim  # keys and values
  cached = window * of_token * jnp.dtype(config.dtype).itemsize
  mesh.check_room(what, rows * (cached + 4 * config.vocab_size))


def check_pair(target: Any, draft: Any) -> None:
  """Refuse a draft that means other things by the same ids.

  Raises:
    InputError: vocabularies, tokenizers, masks or block lengths differ.
  """
  sizes = [decoder.model.config.vocab_size for decoder in (target, draft)]
  where = f"the draft {draft.source}"
  if sizes[0] != sizes[1]:
    raise InputError(f"{where} has a vocabulary of {sizes[1]}; the target's has {sizes[0]}.")
  if target.tokenizer.fingerprint != draft.tokenizer.fingerprint:
    raise InputError(f"{where} has another tokenizer than the target {target.source}.")
  masks = target.process.mask_id, draft.process.mask_id
  if masks[0] != masks[1]:
    raise InputError(f"{where} has the mask {masks[1]}; the target's is {masks[0]}.")
  lengths = target.block_length, draft.block_length
  if None not in lengths and lengths[0] != lengths[1]:
    raise InputError(
      f"{where} was trained with blocks of {lengths[1]} tokens, the target with {lengths[0]}."
    )
