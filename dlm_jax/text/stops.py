# SPDX-License-Identifier: Apache-2.0
"""What ends a text: tokens, which the loop over rounds knows, and texts, which only a host sees."""

import bisect
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from dlm_jax.data import tokenizers
from dlm_jax.data.tokenizers.base import check_text
from dlm_jax.errors import InputError
from dlm_jax.text.prompts import is_whole, unwrapped

Ids, Texts = tuple[tuple[int, ...], ...], tuple[tuple[str, ...], ...]


def silent_ids(words: tokenizers.Tokenizer) -> tuple[int, ...]:
  """Return the ids that end texts by themselves, of turns and documents: they are not shown."""
  return tuple(getattr(words, "stop_ids", (words.eos_id,)))


def read(
  source: pathlib.Path, words: tokenizers.Tokenizer, mask_id: int, stop: Any, count: int
) -> tuple[Ids, Texts, bool]:
  """Return the ids and the texts that end each text, and whether a text is of several tokens.

  A text of one token is both: the id ends a row early, and the text is also found inside others.

  Args:
    source: of the network, for messages.
    words: its tokenizer.
    mask_id: its mask.
    stop: a text or an id, or a list of such; or such a list, or None, for each text. None: a chat
      model's end of turn, and the separator.
    count: texts.

  Raises:
    InputError: something is neither a text nor an id, or there is another number of lists.
  """
  stop = unwrapped(stop)
  if isinstance(stop, str) or is_whole(stop):
    stop = [stop]
  if stop is not None and not isinstance(stop, (list, tuple)):
    raise InputError(f"stop={stop!r} is a {type(stop).__name__}; give texts or ids.")
  several = stop is not None and any(one is None or isinstance(one, (list, tuple)) for one in stop)
  lists = list(stop) if several else [stop] * count
  if len(lists) != count:
    raise InputError(f"stop has {len(lists)} lists; give one, or one for each of {count} prompts.")
  lists = [[one] if isinstance(one, str) or is_whole(one) else one for one in lists]
  one = functools.partial(_one, source, words, mask_id)
  found = [None if asked is None else list(map(one, asked)) for asked in lists]
  unique = lambda parts: tuple(dict.fromkeys(part for part in parts if part is not None))  # noqa: E731
  ids = tuple(silent_ids(words) if two is None else unique(i for i, _ in two) for two in found)
  texts = tuple(unique(text for _, text in two or ()) for two in found)
  return ids, texts, any(i is None for two in found for i, _ in two or ())


def _one(source, words, mask_id, stop):
  """Return the id and the text of what ends a text; None where it has none."""
  if not isinstance(stop, str):
    if not is_whole(stop):
      raise InputError(
        f"stop={stop!r} is a {type(stop).__name__}; give texts, or ids as whole numbers."
      )
    return _checked(source, words, mask_id, int(stop)), None
  check_text(stop, f"stop={stop!a}")
  if not stop:
    raise InputError("stop='' ends every text; give a text that is not empty, or () for none.")
  ids, silent = words.encode(stop, specials=True), silent_ids(words)
  if len(ids) == 1:
    return _checked(source, words, mask_id, ids[0]), None if ids[0] in silent else stop
  if joined := [i for i in ids if i in (*silent, mask_id)]:
    raise InputError(
      f"stop={stop!r} joins a token that is not shown, id {joined[0]}, to text; give the two as "
      "two stops."
    )
  return None, stop


def _checked(source, words, mask_id, stop):
  if not 0 <= stop < words.vocab_size or stop == mask_id:
    raise InputError(
      f"stop={stop} is no token of {source}'s tokenizer; ids are 0 … {words.vocab_size - 1}."
    )
  return stop


def cut(
  decode: Callable[[Sequence[int]], str], ids: Sequence[int], texts: Sequence[str], fewest: int
) -> tuple[int, str] | None:
  """Return how many ids there are up to the first stop text, and the text before it; None: none.

  The first is the one that is whole first. So it is the same however many tokens come at a time.

  Args:
    decode: ids to text, of which a beginning gives a beginning.
    ids: decided so far.
    texts: that end it.
    fewest: tokens that no stop text ends within.
  """
  if not texts:
    return None
  whole, given = decode(ids), len(decode(ids[:fewest])) if fewest else 0
  places = [(whole.find(text, max(0, given - len(text) + 1)), text) for text in texts]
  ends = [(place + len(text), place) for place, text in places if place >= 0]
  if not ends:
    return None
  end, place = min(ends)
  reaches = lambda count: decode(ids[:count]).startswith(whole[:end])  # noqa: E731
  return bisect.bisect_left(range(len(ids)), True, key=reaches), whole[:place]


def certain(text: str, texts: Sequence[str]) -> str:
  """Return a text without the last letters that may be the first of a stop text."""
  for size in range(max(map(len, texts), default=0) - 1, 0, -1):
    if any(one.startswith(text[-size:]) for one in texts if size <= len(text)):
      return text[:-size]
  return text
