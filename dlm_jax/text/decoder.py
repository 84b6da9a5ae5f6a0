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
import jax.numpy as jnp
import numpy as np

from dlm_jax import convert, process, sample
from dlm_jax.arrays import Params
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError
from dlm_jax.models.protocols import Cached
from dlm_jax.text import requests
from dlm_jax.text.requests import Plan

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
    return sum(self.lengths)

  @property
  def lengths(self) -> list[int]:
    """Tokens of each prompt's text."""
    return [len(row) for row in self.tokens]

  @property
  def evaluations(self) -> int:
    """Passes of both networks."""
    return self.target_passes + self.draft_passes


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TextDecoder:
  """A block-diffusion network with its tokenizer; weights are read when they are first needed.

  Attributes:
    model: the network; its parameters are `params`.
    process: names the mask.
    tokenizer: text ↔ ids.
    source: directory of the weights.
    weights: own the network as it is stored for decoding, and its parameters.
    block_length: that the checkpoint names, tokens; None: it names none.
    draft: a smaller one of the same tokenizer that drafts for this one.
  """

  model: Cached
  process: process.Absorbing
  tokenizer: tokenizers.Tokenizer
  source: pathlib.Path
  weights: convert.Weights
  block_length: int | None = None
  draft: "TextDecoder | None" = None

  def __post_init__(self):
    if self.draft is not None:
      requests.check_pair(self, self.draft)

  def __repr__(self) -> str:
    drafted = "" if self.draft is None else f", draft {str(self.draft.source)!r}"
    return f"TextDecoder({str(self.source)!r}: blocks of {self.block_length}{drafted})"

  def __call__(
    self,
    *,
    steps: int | None = None,
    num: int = 1,
    seed: int = 0,
    prompt: str | Sequence[str] = "",
    **request: Any,
  ) -> list[str]:
    """Return `num` texts behind a prompt, or behind each of several.

    Args:
      steps: network passes per block; None: the block's length.
      num: texts per prompt; at temperature 0, the default, all are the same.
      seed: text i of a seed is the same whatever `num`.
      prompt: what the texts go on behind.
      **request: see `plan`.

    Raises:
      InputError: an option is none of decoding blocks, or the request cannot be met.

    Example:
      >>> pipe = load("models/SDAR-8B-Chat-b8")  # doctest: +SKIP
      >>> print(pipe(prompt="2 + 2?", chat=True)[0])  # doctest: +SKIP
    """
    return self.generate(prompt, steps=steps, num=num, seed=seed, **request).texts

  @property
  def loaded(self) -> tuple[Cached, Params]:
    """The network and its parameters in the storage asked for.

    Raises:
      InputError: a tensor is missing, unknown, misshapen or unreadable.
    """
    return self.weights.read()

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
    prompts: str | Sequence[str | Sequence[int]] = "",
    *,
    num: int = 1,
    seed: int | Sequence[int] = 0,
    on_text: Callable[[int, str, bool], None] | None = None,
    **request: Any,
  ) -> Generation:
    """Continue prompts.

    Args:
      prompts: texts, or token ids as they are; one text is one prompt.
      num: texts per prompt, those of one prompt together; what is given one for each, seeds too, is
        then given for each text.
      seed: text i of a seed is the same whatever else is in the batch. One seed for each gives what
        each would get as the only one.
      on_text: called as (number of the prompt, piece, whether that was all) whenever more of its
        text is certain; pieces of a prompt add up to its text. The loop then runs on the host, one
        round per step.
      **request: see `plan`.

    Raises:
      InputError: see `plan`.

    Example:
      >>> import dlm_jax  # doctest: +SKIP
      >>> pipe = dlm_jax.load("models/SDAR-8B-Chat-b8")  # doctest: +SKIP
      >>> pipe.generate("2 + 2?", chat=True, max_new_tokens=64).texts[0]  # doctest: +SKIP
    """
    prompts = _repeated(prompts, num)
    return self.run(self.plan(prompts, **_known(request)), seed=seed, on_text=on_text)

  def plan(
    self,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    chat: bool = False,
    max_new_tokens: int | Sequence[int] = 128,
    min_new_tokens: int | Sequence[int] = 0,
    stop: Sequence[Any] | None = None,
    verify: str | None = None,
    layout: str | None = None,
    **options: Any,
  ) -> Plan:
    """Check a request; nothing is loaded or compiled.

    Args:
      prompts: as for `generate`. A text follows the separator of documents, unless the tokenizer
        is that of a chat model.
      chat: each prompt is what a user says; its turn is closed and the answer's opened.
      max_new_tokens: the most tokens per prompt; one number, or one for each.
      min_new_tokens: so many tokens are no stop tokens; likewise.
      stop: ids, or texts of one token, that end a text; None: the tokenizer's; (): nothing does. Or
        a list of such for each prompt.
      verify: with a draft: "stacked", "simsd", or "none" to leave it aside; None: "stacked" up to
        eight tokens per block. See `sample.SpeculativeOptions`.
      layout: of "simsd": "unified" (default) or "published".
      **options: of `sample.BlockRule`: strategy, steps and others; block_length is the checkpoint's
        by default. Of rows, one value or one for each prompt: temperature, by default 0, the most
        probable tokens; top_k, top_p and threshold. Other values of these, of stop and of numbers
        of tokens compile nothing new, except that there is a program for temperature 0 only, one
        for any temperature, and one for top_k, top_p and min_new_tokens.

    Raises:
      InputError: the request cannot be met.
    """
    here, mask_id = (self.source, self.tokenizer), self.process.mask_id
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    asked = options.pop("block_length", None)
    length = requests.block_length(self.source, self.block_length, asked)
    stop_ids = requests.stop_ids(*here, mask_id, stop, len(prompts))
    most, fewest = requests.counts(max_new_tokens, min_new_tokens, len(prompts))
    rule, rows = requests.rule(length, mask_id, stop_ids, fewest, options)
    speculative = requests.speculative(self.draft is not None, rule, verify, layout)
    ids = requests.encode(*here, prompts, chat, mask_id, self.model.config.vocab_size)
    laid = requests.lay_out(self.source, ids, most, self.model.config)
    rows = rows.replace(limit_B=laid.pop("limit_B"))
    return Plan(rule=rule, speculative=speculative, options=rows, stop_ids=stop_ids, **laid)

  def run(
    self,
    plan: Plan,
    *,
    seed: int | Sequence[int] = 0,
    on_text: Callable[[int, str, bool], None] | None = None,
  ) -> Generation:
    """Decode what `plan` returned; arguments as for `generate`."""
    draft = self.draft if plan.speculative is not None else None
    model, params = self.loaded
    if draft is not None:
      params = {"target": params, "draft": draft.params}
    draft_model = None if draft is None else draft.loaded[0]
    program = _program(model, draft_model, plan.speculative or plan.rule, plan.window)
    rng_B = _keys(seed, len(plan.stop_ids))
    arguments = (params, plan.prompt_BP, rng_B, plan.lengths_B, plan.options)
    if on_text is None:
      follow = None
      tokens_BL, info = program.whole(*arguments)
    else:
      follow = _Follow(self, plan, on_text)
      tokens_BL, info = sample.decode(
        program.rounds,
        *arguments[:3],
        lengths=plan.lengths_B,
        options=plan.options,
        on_round=follow,
      )
    self._check_logits(info)
    rows = _rows(tokens_BL, info.prompt_B, info.lengths_B)
    texts = list(map(self._text, rows, plan.stop_ids))
    if follow is not None:
      follow.finish(texts)
    drafted_B = info.counts.get("draft_passes", np.zeros(1, np.int32))
    return Generation(
      texts=texts,
      tokens=rows,
      info=info,
      target_passes=int(np.sum(info.passes_B)),
      draft_passes=int(np.sum(drafted_B)),
      mode=plan.mode,
    )

  def _check_logits(self, info: sample.Info) -> None:
    """Refuse a text whose log-probabilities are no numbers: nor were the logits it came from."""
    wrong_BL = np.isnan(np.asarray(info.log_prob_BL))
    if wrong_BL.any():
      row, place = (int(axis[0]) for axis in np.nonzero(wrong_BL))
      exact = self.model.config.dtype == "float32"
      raise InputError(
        f"{self.source}: the logits of token {place + 1} of text {row + 1} are NaN or infinite, "
        "though its weights are finite; "
        + ("fetch or train it again." if exact else "try dtype='float32'.")
      )

  def _text(self, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Return the text of decided ids; rows that no token has show as nothing."""
    if ids and ids[-1] in stop_ids:
      ids = ids[:-1]
    return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])


def _repeated(prompts, num):
  """Return every prompt `num` times."""
  if num < 1:
    raise InputError(f"num={num}: there must be at least 1 text.")
  prompts = [prompts] if isinstance(prompts, str) else prompts
  return [prompt for prompt in prompts for _ in range(num)]


_ELSEWHERE = ("grid", "length", "noise_removal", "nucleus", "precision", "sampler")


def _known(request):
  """Return a request without what is not given; refuse what only denoisers on a grid have."""
  for name in request:
    if name in _ELSEWHERE:
      raise InputError(
        f"{name} is an option of denoisers on a grid, and this network decodes blocks; it takes "
        "steps, num, seed, prompt, chat, max_new_tokens, stop, block_length, strategy, threshold, "
        "temperature, top_k, top_p, verify and layout."
      )
  return {name: value for name, value in request.items() if name != "steps" or value is not None}


class _Program:
  """Rounds with compiled parts, and as a whole."""

  def __init__(self, rounds: sample.Rounds):
    self.rounds = rounds._replace(admit=jax.jit(rounds.admit), round=jax.jit(rounds.round))

    def whole(params, prompt_BP, rng_B, lengths_B, options):
      return sample.decode(rounds, params, prompt_BP, rng_B, lengths=lengths_B, options=options)

    self.whole = jax.jit(whole)


@functools.lru_cache(maxsize=16)
def _program(model, draft_model, rule, window: int) -> _Program:
  """Return compiled rounds; what rows ask for is no part of the key, so it compiles nothing."""
  if draft_model is None:
    return _Program(sample.block_decoder(model, rule, window))
  return _Program(sample.speculative_decoder(model, draft_model, rule, window))


def _keys(seed, rows):
  """Return a key per row: children of one seed's, or the first child of each row's own."""
  if not isinstance(seed, Sequence):
    seeds = [(seed, row) for row in range(rows)]
  elif len(seed) == rows:
    seeds = [(one, 0) for one in seed]
  else:
    raise InputError(f"seed has {len(seed)} numbers; give one, or one for each of {rows} prompts.")
  return jnp.stack([jax.random.fold_in(jax.random.key(one), child) for one, child in seeds])


def _rows(tokens_BL, prompt_B, lengths_B) -> list[list[int]]:
  return [
    tokens_L[start:stop].tolist()
    for tokens_L, start, stop in zip(
      *map(np.asarray, (tokens_BL, prompt_B, lengths_B)), strict=True
    )
  ]


class _Follow:
  """Reports decided text piece by piece; an unfinished character waits for its other bytes."""

  def __init__(self, decoder: TextDecoder, plan: Plan, on_text: Callable[[int, str, bool], None]):
    self._decoder, self._plan, self._on_text = decoder, plan, on_text
    self._told, self._ended = [""] * len(plan.lengths_B), [False] * len(plan.lengths_B)

  def __call__(self, tokens_BL, lengths_B) -> None:
    limits_B = np.asarray(self._plan.limits_B)
    rows = _rows(tokens_BL, self._plan.lengths_B, lengths_B)
    for number, (row, stop_ids) in enumerate(zip(rows, self._plan.stop_ids, strict=True)):
      ended = lengths_B[number] >= limits_B[number] or bool(row and row[-1] in stop_ids)
      self._tell(number, self._decoder._text(row, stop_ids), bool(ended))

  def finish(self, texts: Sequence[str]) -> None:
    """Report what is left."""
    for number, text in enumerate(texts):
      self._tell(number, text, True)

  def _tell(self, number, text, ended):
    if self._ended[number]:
      return
    if not ended:
      text = text.rstrip(_UNFINISHED)
    told = self._told[number]
    piece = text[len(told) :] if text.startswith(told) else ""
    if piece or ended:
      self._told[number], self._ended[number] = told + piece, ended
      self._on_text(number, piece, ended)
