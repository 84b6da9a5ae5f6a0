# SPDX-License-Identifier: Apache-2.0
"""Text from a network that decodes blocks, alone or with a small network that drafts for it.

What is asked is checked before any weights are read.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dlm_jax import convert, models, process, sample
from dlm_jax.arrays import Params
from dlm_jax.data import chat as chats
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError, hint

VERIFY = ("stacked", "simsd", "none")
_SHORTEST = 32  # prompts are padded to this or a power of two above: they share a program
_UNFINISHED = "\ufffd"  # a character of which not all bytes are there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What prompts were continued with.

  Attributes:
    texts: of each prompt, without the prompt and without the stop token.
    tokens: of each prompt, ids after the prompt, the stop token included.
    info: what `sample.decode` knows about them, reveal steps and log-probabilities included.
    target_passes: of the network, summed over prompts; those over the prompts are not counted.
    draft_passes: of the draft, likewise.
    mode: one line: how it was decoded, and whether that is exact.
  """

  texts: list[str]
  tokens: list[list[int]]
  info: sample.Info
  target_passes: int
  draft_passes: int
  mode: str

  @property
  def count(self) -> int:
    """Tokens in all."""
    return sum(map(len, self.tokens))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextDecoder:
  """A block-diffusion network with its tokenizer; weights are read when they are first needed.

  Attributes:
    model: the network; its parameters are `params`.
    process: names the mask.
    tokenizer: text ↔ ids.
    source: directory of the weights.
    block_length: that the checkpoint names, tokens; None: it names none.
    draft: a smaller one of the same tokenizer that drafts for this one.
    storage: how parameters are kept, see `models.regroup`.
  """

  model: models.Decoder
  process: process.Absorbing
  tokenizer: tokenizers.Tokenizer
  source: pathlib.Path
  block_length: int | None = None
  draft: "TextDecoder | None" = None
  storage: str = "stacked"

  def __post_init__(self):
    if self.draft is not None:
      _check_pair(self, self.draft)

  @functools.cached_property
  def loaded(self) -> tuple[models.Decoder, Params]:
    """The network and its parameters in the storage asked for.

    Raises:
      InputError: a tensor is missing, unknown, misshapen or unreadable.
    """
    dtype = self.model.config.dtype
    model, params, _ = convert.load(self.source, params_dtype=dtype, dtype=dtype)
    return models.regroup(model, params, self.storage, consume=True)

  def load_weights(self) -> None:
    """Read the weights, and those of the draft, now."""
    for decoder in (self, self.draft):
      if decoder is not None:
        _ = decoder.loaded

  @property
  def params(self) -> Params:
    """Parameters, of the dtype of the network's products."""
    return self.loaded[1]

  def generate(
    self,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    seed: int = 0,
    on_text: Callable[[int, str], None] | None = None,
    **request: Any,
  ) -> Generation:
    """Continue prompts.

    Args:
      prompts: texts, or token ids as they are; one text is one prompt.
      seed: prompt i of a seed gets the same text whatever else is in the batch.
      on_text: called as (number of the prompt, piece) whenever more of its text is certain; pieces
        of a prompt add up to its text. The loop then runs on the host, one round per step.
      **request: see `plan`.

    Raises:
      InputError: see `plan`.

    Example:
      >>> import dlm_jax  # doctest: +SKIP
      >>> pipe = dlm_jax.load("models/SDAR-8B-Chat-b8")  # doctest: +SKIP
      >>> pipe.generate("2 + 2?", chat=True, max_new_tokens=64).texts[0]  # doctest: +SKIP
    """
    return self.run(self.plan(prompts, **request), seed=seed, on_text=on_text)

  def plan(
    self,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    stop: Sequence[int | str] | None = None,
    verify: str | None = None,
    layout: str | None = None,
    **options: Any,
  ) -> Plan:
    """Check a request; nothing is loaded or compiled.

    Args:
      prompts: as for `generate`. A text follows the separator of documents, unless the tokenizer
        is that of a chat model.
      chat: each prompt is what a user says; its turn is closed and the answer's opened.
      max_new_tokens: the most tokens per prompt.
      stop: ids, or texts of one token, that end a text; None: the tokenizer's; (): nothing does.
      verify: with a draft: "stacked", "simsd", or "none" to leave it aside; None: "stacked" up to
        eight tokens per block. See `sample.SpeculativeOptions`.
      layout: of "simsd": "unified" (default) or "published".
      **options: of `sample.BlockOptions`, e.g. strategy, threshold, steps, top_k. block_length is
        the checkpoint's by default; temperature is 0, the most probable tokens.

    Raises:
      InputError: the request cannot be met.
    """
    rule = self._rule(stop, options)
    if max_new_tokens < 1:
      raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    speculative = self._speculative(rule, verify, layout)
    rows = self._encode([prompts] if isinstance(prompts, str) else prompts, chat, rule)
    window = self._window(rows, max_new_tokens)
    longest = max(map(len, rows))
    width = 0 if not longest else max(_SHORTEST, 1 << (longest - 1).bit_length())
    prompt_BP, lengths_B = sample.pad_prompts(rows, min(width, window))
    limits_B = np.minimum(np.asarray(lengths_B) + max_new_tokens, window)
    return Plan(
      prompt_BP=prompt_BP, lengths_B=lengths_B, limits_B=limits_B, window=window, rule=rule,
      speculative=speculative,
    )  # fmt: skip

  def run(
    self, plan: Plan, *, seed: int = 0, on_text: Callable[[int, str], None] | None = None
  ) -> Generation:
    """Decode what `plan` returned; arguments as for `generate`."""
    draft = self.draft if plan.speculative is not None else None
    model, params = self.loaded
    if draft is not None:
      params = {"target": params, "draft": draft.params}
    draft_model = None if draft is None else draft.loaded[0]
    program = _program(model, draft_model, plan.speculative or plan.rule, plan.window)
    arguments = (params, plan.prompt_BP, jax.random.key(seed), plan.lengths_B, plan.limits_B)
    if on_text is None:
      tokens_BL, info = program.whole(*arguments)
      follow = None
    else:
      follow = _Follow(self, plan, on_text)
      tokens_BL, info = sample.decode(
        program.decoder, *arguments[:3], lengths=plan.lengths_B, max_length=plan.limits_B,
        on_round=follow,
      )  # fmt: skip
    info = jax.device_get(info)
    rows = _rows(np.asarray(tokens_BL), info.prompt_B, info.lengths_B)
    texts = [self._text(row, plan.rule.stop_ids) for row in rows]
    if follow is not None:
      follow.finish(texts)
    counts = getattr(info, "counts", None) or {}
    return Generation(
      texts=texts, tokens=rows, info=info, target_passes=int(info.passes_B.sum()),
      draft_passes=int(np.sum(counts.get("draft_passes", 0))), mode=plan.mode,
    )  # fmt: skip

  def _rule(self, stop, options) -> sample.BlockOptions:
    known = {field.name for field in dataclasses.fields(sample.BlockOptions)} - {"mask_id"}
    for name in options:
      if name not in known:
        raise InputError(f"{name} is no option of decoding{hint(name, known)}.")
    asked = options.pop("block_length", None)
    length = _block_length(self, asked)
    stop_ids = stop_ids_of(self.tokenizer) if stop is None else tuple(map(self._stop_id, stop))
    return sample.BlockOptions(
      block_length=length, mask_id=self.process.mask_id, stop_ids=stop_ids,
      **{"temperature": 0.0, **options},
    )  # fmt: skip

  def _stop_id(self, stop: int | str) -> int:
    words = self.tokenizer
    if isinstance(stop, str):
      ids = words.encode(stop, specials=True)
      if len(ids) != 1:
        raise InputError(
          f"stop={stop!r} is {len(ids)} tokens of {self.source}'s tokenizer; give the text of one "
          "token, or its id."
        )
      (stop,) = ids
    if not 0 <= stop < words.vocab_size or stop == self.process.mask_id:
      raise InputError(
        f"stop={stop} is no token of {self.source}'s tokenizer; ids are 0 … {words.vocab_size - 1}."
      )
    return int(stop)

  def _speculative(self, rule, verify, layout):
    if verify is not None and verify not in VERIFY:
      raise InputError(
        f"verify={verify!r} is unknown{hint(verify, VERIFY)}; use {', '.join(VERIFY)}."
      )
    wanted = self.draft is not None and verify != "none"
    if self.draft is None and verify not in (None, "none"):
      raise InputError(f"verify={verify!r} needs a draft; name a smaller network: draft=DIR.")
    if layout is not None and not (wanted and verify == "simsd"):
      raise InputError(f"layout={layout!r} is of verify='simsd' with a draft.")
    if not wanted:
      return None
    more = {} if layout is None else {"layout": layout}
    if verify == "simsd" and rule.temperature > 0:
      more["acceptance"] = "rejection"
    return sample.SpeculativeOptions(target=rule, verify=verify, **more)

  def _encode(self, prompts, chat, rule) -> list[list[int]]:
    """Return the ids of every prompt."""
    words = self.tokenizer
    if chat and not isinstance(words, chats.ChatBPE):
      raise InputError(f"{self.source} has no tokenizer of a chat model; leave chat out.")
    rows = []
    for number, prompt in enumerate(prompts, start=1):
      if isinstance(prompt, str):
        if chats.MASK in prompt:
          raise InputError(_masked(number, chats.MASK))
        if chat:
          row = words.encode_chat([{"role": "user", "content": prompt}])
        else:
          start = [] if isinstance(words, chats.ChatBPE) else [words.eos_id]
          row = [*start, *words.encode(prompt)]
      else:
        row = [int(i) for i in prompt]
      if rule.mask_id in row:
        raise InputError(_masked(number, f"id {rule.mask_id}"))
      strange = [i for i in row if not 0 <= i < self.model.config.vocab_size]
      if strange:
        raise InputError(f"prompt {number} has the id {strange[0]}, which the network has not.")
      rows.append(row)
    return rows

  def _window(self, rows, max_new_tokens: int) -> int:
    """Return the most tokens of a row; a prompt and what follows it must fit the network."""
    most = self.model.config.length
    for number, row in enumerate(rows, start=1):
      if len(row) + max_new_tokens > most:
        room = max(most - len(row), 0)
        raise InputError(
          f"prompt {number} has {len(row)} tokens, and with max_new_tokens={max_new_tokens} the "
          f"cache of {most} positions, {self.source}'s most, is too short; "
          + (f"use at most {room} new tokens." if room else "shorten the prompt.")
        )
    longest = max(map(len, rows), default=0)
    return min(most, max(_SHORTEST, 1 << max(longest - 1, 0).bit_length()) + max_new_tokens)

  def _text(self, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Return the text of decided ids; rows that no token has show as nothing."""
    if ids and ids[-1] in stop_ids:
      ids = ids[:-1]
    return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])


def open_decoder(
  source: pathlib.Path, tokenizer: tokenizers.Tokenizer, **options: Any
) -> TextDecoder:
  """Open a block-diffusion checkpoint; its weights are read later.

  Args:
    source: a model directory.
    tokenizer: text ↔ ids.
    **options: of `TextDecoder`: draft and storage; and dtype, of matrix products.

  Raises:
    InputError: the network has no mask, or fewer rows than the tokenizer has tokens.
  """
  dtype = options.pop("dtype", "float32")
  model, proc = convert.open_decoder(source, dtype=dtype)
  if proc is None:
    kind = convert.read_config(source)["model_type"]
    raise InputError(
      f"{source} is a {kind} network without a mask token, which predicts next tokens; decoding of "
      "blocks needs one trained with a mask: mask_token_id in config.json names it."
    )
  rows = model.config.vocab_size
  if tokenizer.vocab_size > rows:
    raise InputError(
      f"{source}: the tokenizer has {tokenizer.vocab_size} tokens and the network {rows} rows."
    )
  return TextDecoder(
    model=model, process=proc, tokenizer=tokenizer, source=pathlib.Path(source),
    block_length=convert.block_length(source), **options,
  )  # fmt: skip


def stop_ids_of(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
  """Return what ends a text: of a chat model also the end of a turn, else the separator."""
  return getattr(tokenizer, "stop_ids", (tokenizer.eos_id,))


def _masked(number, what):
  return (
    f"prompt {number} contains the mask ({what}), which stands for what is to be generated; take "
    "it out: text goes on behind the prompt."
  )


def _block_length(decoder: TextDecoder, asked: int | None) -> int:
  """Return the block length: what is asked must be what the checkpoint was trained with."""
  trained = decoder.block_length
  if asked is None and trained is None:
    raise InputError(
      f"{decoder.source} does not say its block length; give what it was trained with: "
      "block_length=4 for public SDAR checkpoints without a suffix -bN."
    )
  if asked is not None and trained is not None and asked != trained:
    raise InputError(
      f"block_length={asked}, but {decoder.source} was trained with {trained}; leave it out, or "
      "take the checkpoint of that length."
    )
  return trained if asked is None else asked


def _check_pair(target: TextDecoder, draft: TextDecoder) -> None:
  """Refuse a draft that means other things by the same ids."""
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
      f"{where} was trained with blocks of {lengths[1]}, the target of {lengths[0]}."
    )


class _Program:
  """A decoder with compiled parts, and as a whole."""

  def __init__(self, decoder: sample.Decoder):
    self.decoder = decoder._replace(init=jax.jit(decoder.init), round=jax.jit(decoder.round))

    def whole(params, prompt_BP, rng, lengths_B, limits_B):
      return sample.decode(
        decoder, params, prompt_BP, rng, lengths=lengths_B, max_length=limits_B
      )  # fmt: skip

    self.whole = jax.jit(whole)


@functools.lru_cache(maxsize=16)
def _program(model, draft_model, options, window: int) -> _Program:
  """Return a compiled decoder; the cache makes a second call of the same shape fast."""
  if draft_model is None:
    return _Program(sample.block_decoder(model, options, window))
  return _Program(sample.speculative_decoder(model, draft_model, options, window))


def _rows(tokens_BL, prompt_B, lengths_B) -> list[list[int]]:
  return [
    tokens_L[start:stop].tolist()
    for tokens_L, start, stop in zip(tokens_BL, prompt_B, lengths_B, strict=True)
  ]


class _Follow:
  """Reports decided text piece by piece; an unfinished character waits for its other bytes."""

  def __init__(self, decoder: TextDecoder, plan: Plan, on_text: Callable[[int, str], None]):
    self._decoder, self._plan, self._on_text = decoder, plan, on_text
    self._told = [""] * len(plan.lengths_B)

  def __call__(self, tokens_BL, lengths_B) -> None:
    rows = _rows(tokens_BL, np.asarray(self._plan.lengths_B), lengths_B)
    for number, row in enumerate(rows):
      text = self._decoder._text(row, self._plan.rule.stop_ids)
      self._tell(number, text.rstrip(_UNFINISHED))

  def finish(self, texts: Sequence[str]) -> None:
    """Report what is left."""
    for number, text in enumerate(texts):
      self._tell(number, text)

  def _tell(self, number, text):
    told = self._told[number]
    if len(text) > len(told) and text.startswith(told):
      self._told[number] = text
      self._on_text(number, text[len(told) :])
