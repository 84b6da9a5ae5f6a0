# SPDX-License-Identifier: Apache-2.0
"""What is asked of a decoder, checked: block length, stop tokens, draft, prompts, room."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlm_jax import sample
from dlm_jax.data import tokenizers
from dlm_jax.data.tokenizers import chat as chats
from dlm_jax.errors import InputError, hint

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


def block_length(source: pathlib.Path, trained: int | None, asked: int | None) -> int:
  """Return the block length: what is asked must be what the checkpoint was trained with.

  Raises:
    InputError: it is another one, or neither is known.
  """
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


def stop_ids(
  source: pathlib.Path,
  words: tokenizers.Tokenizer,
  mask_id: int,
  stop: Sequence[Any] | None,
  count: int,
) -> tuple[tuple[int, ...], ...]:
  """Return what ends each text: as asked, else a chat model's end of turn and the separator.

  Args:
    source: of the network, for messages.
    words: its tokenizer.
    mask_id: its mask.
    stop: ids or texts of one token; or such a list, or None, for each text.
    count: texts.

  Raises:
    InputError: something is no token, or there is another number of lists.
  """
  several = stop is not None and any(one is None or isinstance(one, (list, tuple)) for one in stop)
  lists = list(stop) if several else [stop] * count
  if len(lists) != count:
    raise InputError(f"stop has {len(lists)} lists; give one, or one for each of {count} prompts.")
  default = tuple(getattr(words, "stop_ids", (words.eos_id,)))
  one = functools.partial(_stop_id, source, words, mask_id)
  return tuple(default if asked is None else tuple(map(one, asked)) for asked in lists)


def _stop_id(source, words, mask_id, stop):
  if isinstance(stop, str):
    ids = words.encode(stop, specials=True)
    if len(ids) != 1:
      raise InputError(
        f"stop={stop!r} is {len(ids)} tokens of {source}'s tokenizer; give the text of one token, "
        "or its id."
      )
    (stop,) = ids
  if not 0 <= stop < words.vocab_size or stop == mask_id:
    raise InputError(
      f"stop={stop} is no token of {source}'s tokenizer; ids are 0 … {words.vocab_size - 1}."
    )
  return int(stop)


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
  drafted: bool, block: sample.BlockRule, verify: str | None, layout: str | None
) -> sample.SpeculativeOptions | None:
  """Return how a draft is verified; None: there is none, or it is left aside.

  Raises:
    InputError: an option is unknown or needs another one.
  """
  if verify is not None and verify not in VERIFY:
    raise InputError(
      f"verify={verify!r} is unknown{hint(verify, VERIFY)}; use {', '.join(VERIFY)}."
    )
  if not drafted and verify not in (None, "none"):
    raise InputError(f"verify={verify!r} needs a draft; name a smaller network as draft.")
  if layout is not None and not (drafted and verify == "simsd"):
    raise InputError(f"layout={layout!r} is of verify='simsd' with a draft.")
  if not drafted or verify == "none":
    return None
  more = {} if layout is None else {"layout": layout}
  return sample.SpeculativeOptions(target=block, verify=verify, **more)


def read_text(path: str, flag: str) -> str:
  """Return the text of a file of prompts.

  Args:
    path: of the file.
    flag: how it was named, for the message.

  Raises:
    InputError: it cannot be read, or is not UTF-8.
  """
  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except OSError as error:
    raise InputError(f"{flag} cannot be read: {error.strerror}.") from None
  except UnicodeDecodeError:
    raise InputError(f"{flag} is not UTF-8 text.") from None


def encode(
  source: pathlib.Path,
  words: tokenizers.Tokenizer,
  prompts: Sequence[str | Sequence[int]],
  chat: bool,
  mask_id: int,
  rows_of_network: int,
) -> list[list[int]]:
  """Return the ids of every prompt.

  Raises:
    InputError: one holds the mask or an id that the network lacks, or turns cannot be framed.
  """
  if chat and not isinstance(words, chats.ChatBPE):
    raise InputError(f"{source} has no tokenizer of a chat model; leave chat out.")
  return [
    _encode(words, number, prompt, chat, mask_id, rows_of_network)
    for number, prompt in enumerate(prompts, start=1)
  ]


def _encode(words, number, prompt, chat, mask_id, rows_of_network):
  given = isinstance(prompt, str)
  if given and chat:
    row = words.encode_chat([{"role": "user", "content": prompt}])
  elif given:
    start = [] if isinstance(words, chats.ChatBPE) else [words.eos_id]
    row = [*start, *words.encode(prompt)]
  else:
    row = [int(i) for i in prompt]
  if mask_id in row or (given and chats.MASK in prompt):
    what = chats.MASK if given else f"id {mask_id}"
    raise InputError(
      f"prompt {number} contains the mask ({what}), which stands for what is to be generated; take "
      "it out: text goes on behind the prompt."
    )
  for i in row:
    if not 0 <= i < rows_of_network:
      raise InputError(
        f"prompt {number} has the id {i}; the network has 0 … {rows_of_network - 1}."
      )
  return row


def counts(
  max_new_tokens: int | Sequence[int], min_new_tokens: int | Sequence[int], count: int
) -> tuple[list[int], list[int]]:
  """Return the most and the fewest new tokens of each of so many texts.

  Raises:
    InputError: one is out of range, or there is another number of them.
  """
  found = []
  for name, given, least in (
    ("max_new_tokens", max_new_tokens, 1),
    ("min_new_tokens", min_new_tokens, 0),
  ):
    several = isinstance(given, Sequence)
    numbers = [int(one) for one in given] if several else [int(given)] * count
    if len(numbers) != count:
      raise InputError(
        f"{name} has {len(numbers)} numbers; give one, or one for each of {count} prompts."
      )
    if min(numbers, default=least) < least:
      raise InputError(f"{name}={given} must be at least {least}.")
    found.append(numbers)
  if any(fewest > most for most, fewest in zip(*found, strict=True)):
    raise InputError(
      f"min_new_tokens={min_new_tokens} must be at most max_new_tokens={max_new_tokens}."
    )
  return found[0], found[1]


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
