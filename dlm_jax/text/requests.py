# SPDX-License-Identifier: Apache-2.0
"""What is asked of a decoder, checked: block length, stop tokens, draft, prompts, room."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from dlm_jax import sample
from dlm_jax.data import tokenizers
from dlm_jax.data.tokenizers import chat as chats
from dlm_jax.errors import InputError, hint

VERIFY = ("stacked", "simsd", "none")
_SHORTEST = 32  # prompts are padded to this or a power of two above: they share a program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A checked request: what to decode and how.

  Attributes:
    prompt_BP: ids, padded on the right.
    lengths_B: tokens of each prompt.
    limits_B: the most tokens of each row, prompt included.
    window: tokens of the longest possible row.
    rule: how the network decides a block.
    speculative: how the draft is verified; None: there is none.
  """

  prompt_BP: Any
  lengths_B: Any
  limits_B: Any
  window: int
  rule: sample.BlockOptions
  speculative: Any = None

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
  stop: Sequence[int | str] | None,
) -> tuple[int, ...]:
  """Return what ends a text: as asked, else a chat model's end of turn and the separator.

  Raises:
    InputError: something is no token.
  """
  if stop is None:
    return tuple(getattr(words, "stop_ids", (words.eos_id,)))
  return tuple(_stop_id(source, words, mask_id, one) for one in stop)


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
  length: int, mask_id: int, stops: tuple[int, ...], options: dict[str, Any]
) -> sample.BlockOptions:
  """Return the options of a block; the temperature is 0 unless given.

  Raises:
    InputError: an option is unknown or out of range.
  """
  known = {field.name for field in dataclasses.fields(sample.BlockOptions)}
  known -= {"block_length", "mask_id", "stop_ids"}
  for name in options:
    if name not in known:
      raise InputError(f"{name} is no option of decoding{hint(name, known)}.")
  return sample.BlockOptions(
    block_length=length, mask_id=mask_id, stop_ids=stops, **{"temperature": 0.0, **options}
  )


def speculative(
  drafted: bool, block: sample.BlockOptions, verify: str | None, layout: str | None
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
  acceptance = sample.fitting_acceptance(block, verify)
  return sample.SpeculativeOptions(target=block, verify=verify, acceptance=acceptance, **more)


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


def lay_out(
  source: pathlib.Path,
  rows: list[list[int]],
  max_new_tokens: int,
  config: Any,
  block: sample.BlockOptions,
  draft: sample.SpeculativeOptions | None,
) -> Plan:
  """Return the plan of encoded prompts.

  Raises:
    InputError: a prompt and what follows it do not fit the network's positions.
  """
  if max_new_tokens < 1:
    raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1.")
  most = config.length
  for number, row in enumerate(rows, start=1):
    if len(row) + max_new_tokens > most:
      room = most - len(row)
      advice = f"use at most {room} new tokens." if room > 0 else "shorten the prompt."
      raise InputError(
        f"prompt {number} has {len(row)} tokens, and with max_new_tokens={max_new_tokens} they do "
        f"not fit the cache of {most} positions, the most of {source}; {advice}"
      )
  longest = max(map(len, rows), default=0)
  width = max(_SHORTEST, 1 << max(longest - 1, 0).bit_length())
  window = min(width + max_new_tokens, most)
  prompt_BP, lengths_B = sample.pad_prompts(rows, min(width, window))
  return Plan(
    prompt_BP=prompt_BP,
    lengths_B=lengths_B,
    limits_B=lengths_B + max_new_tokens,
    window=window,
    rule=block,
    speculative=draft,
  )


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
