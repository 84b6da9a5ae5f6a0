# SPDX-License-Identifier: Apache-2.0
"""The records of a split, one after the other, and what is counted on the way."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from dlm_jax.data import conversations
from dlm_jax.data.dataset import Info, SplitInfo
from dlm_jax.data.packing import learnt, pack, pack_blocks, padded_row
from dlm_jax.data.sources import Source
from dlm_jax.data.tokenizers import Tokenizer
from dlm_jax.errors import InputError

_DOCUMENTS = 64  # tokenised together: enough for all cores, small enough for a smooth progress bar


@runtime_checkable
class Sifted(Protocol):
  """A corpus that leaves documents out and says why."""

  def sifted(self, split: str) -> Iterator[tuple[str, str]]:
    """Yield every document with the reason to leave it out, empty if there is none."""
    ...


@dataclasses.dataclass
class Count:
  """What was read and written of one split so far."""

  documents: int = 0
  text_bytes: int = 0
  tokens: int = 0  # in records, without padding
  stream: int = 0  # tokens with separators, before cutting; of conversations the learnt ones
  lengths: list[int] = dataclasses.field(default_factory=list)  # of the records
  dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  def info(self, wanted: Info) -> SplitInfo:
    """Return the same as it is written to dataset.json."""
    density, buckets = self.text_bytes / self.stream, ()
    if wanted.packing == "documents":
      density = self.text_bytes / (self.stream - self.documents)
      which_N = np.searchsorted(wanted.buckets, self.lengths)
      buckets = tuple(np.bincount(which_N, minlength=len(wanted.buckets)).tolist())
    elif wanted.wrap:
      # A record is charged with L − 2 tokens of the stream: the dropped tail takes its bytes along.
      density = density * (wanted.length - 2) / wanted.length
    return SplitInfo(
      records=len(self.lengths),
      tokens=self.tokens,
      documents=self.documents,
      text_bytes=self.text_bytes,
      bytes_per_token=density,
      bucket_records=buckets,
      dropped=dict(self.dropped),
    )


def _token_lists(source: Source, split: str, tokenizer: Tokenizer, count: Count, bar):
  """Yield the token ids of every document of a split, keeping count; none at all is an error."""
  stream = _documents(source, split, count)
  while documents := list(itertools.islice(stream, _DOCUMENTS)):
    for document, tokens in zip(documents, tokenizer.encode_batch(documents), strict=True):
      size = len(document.encode())
      count.documents += 1
      count.text_bytes += size
      count.stream += len(tokens) + 1
      bar.update(size)
      yield tokens
  if not count.documents:
    raise InputError(
      f"the {split} split is empty: {source.describe()['spec']} holds no text for it; give more "
      "documents, cut them with document_separator, or name validation text with validation."
    )


def _documents(source: Source, split: str, count: Count) -> Iterator[str]:
  """Yield the documents of a split that the source does not leave out, counting the others."""
  if not isinstance(source, Sifted):
    yield from source.documents(split)
    return
  for document, reason in source.sifted(split):
    if reason:
      count.dropped[reason] += 1
    else:
      yield document


def _framed(token_lists, split: str, wanted: Info, tokenizer: Tokenizer, count: Count):
  """Yield a record for every document that fits into the last bucket; none at all is an error."""
  for tokens in token_lists:
    if len(tokens) > wanted.length - 2:
      count.dropped[f"longer than {wanted.length - 2}"] += 1
      continue
    count.lengths.append(len(tokens) + 2)
    count.tokens += len(tokens) + 2
    tokens_L = np.array([tokenizer.cls_id, *tokens, tokenizer.eos_id], np.int32)
    yield {"tokens": tokens_L, "valid": learnt(tokens_L, tokenizer)}
  if not count.lengths:
    raise InputError(
      f"none of the {count.documents} documents of the {split} split fits into data.length="
      f"{wanted.length} with its start and end; use a longer last bucket."
    )


def _conversations(source, split: str, tokenizer: Tokenizer, wanted: Info, count: Count, bar):
  """Yield ids of every conversation that fits and which are learnt; none at all is an error."""
  fitting = 0
  for messages in source.conversations(split):
    ids, valid = conversations.encode(messages, tokenizer)
    size = conversations.answer_bytes(messages)
    count.documents += 1
    bar.update(size)
    if len(ids) > wanted.length:
      count.dropped[f"longer than {wanted.length}"] += 1
      continue
    fitting += 1
    count.text_bytes += size
    pads = -len(ids) % (wanted.block_length or 1)  # scored too, see `pack_blocks`
    count.stream += sum(valid) + pads
    count.tokens += len(ids) + pads
    yield ids, valid
  if not fitting:
    raise InputError(
      f"none of the {count.documents} conversations of the {split} split of "
      f"{source.describe()['spec']} fits into data.length={wanted.length}; use a longer one, or "
      "name validation files with validation."
    )


def _conversation_rows(source, split: str, tokenizer: Tokenizer, wanted: Info, count: Count, bar):
  """Yield rows of conversations; only those of the training split are shared."""
  found = _conversations(source, split, tokenizer, wanted, count, bar)
  size = wanted.block_length or 1
  if wanted.block_length and split == "train":
    rows = pack_blocks(found, wanted.length, size, tokenizer.eos_id)
  elif wanted.block_length:
    # One a row, so that what is scored and sampled is alone; padded and numbered as in training.
    rows = (
      row
      for document in found
      for row in pack_blocks([document], wanted.length, size, tokenizer.eos_id)
    )
  else:
    rows = (padded_row(*document, wanted.length, tokenizer.eos_id) for document in found)
  for row in rows:
    count.lengths.append(wanted.length)
    yield row


def rows_of(source: Source, split: str, tokenizer: Tokenizer, wanted: Info, count: Count, bar):
  """Yield the packed rows of a split, keeping count; an empty split or no full row is an error."""
  bar.set_description(f"packing {split}")
  if wanted.packing == "conversations":
    yield from _conversation_rows(source, split, tokenizer, wanted, count, bar)
    return
  token_lists = _token_lists(source, split, tokenizer, count, bar)
  if wanted.packing == "documents":
    yield from _framed(token_lists, split, wanted, tokenizer, count)
    return
  for row in pack(token_lists, wanted.length, tokenizer.eos_id, wanted.wrap):
    count.lengths.append(wanted.length)
    count.tokens += wanted.length
    yield {"tokens": row}
  if not count.lengths:
    frame = 2 if wanted.wrap else 0
    raise InputError(
      f"length={wanted.length} is longer than the {split} split, which has only "
      f"{count.stream} tokens; use length <= {count.stream + frame} or give more text."
    )
