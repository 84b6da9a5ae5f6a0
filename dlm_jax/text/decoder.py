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

from dlm_jax import convert, process, sample
from dlm_jax.arrays import Params
from dlm_jax.data import tokenizers
from dlm_jax.errors import InputError
from dlm_jax.models.protocols import Cached
from dlm_jax.text import prompts as read
from dlm_jax.text import requests, stops
from dlm_jax.text.denoiser import check_logits
from dlm_jax.text.follow import Follow, rows_of
from dlm_jax.text.requests import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What prompts were continued with.

  Attributes:
    texts: of each prompt, without the prompt, up to what ends it; ends of turns and of documents
      are not shown anywhere.
    tokens: of each prompt, ids after the prompt, the stop token, or those of a stop text, included.
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
    steps: Any = None,
    num: Any = 1,
    seed: Any = 0,
    prompt: Any = "",
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
      >>> asked = [{"role": "user", "content": "2 + 2?"}]  # doctest: +SKIP
      >>> print(pipe(prompt=asked, thinking=False)[0])  # doctest: +SKIP
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
    prompts: Any = "",
    *,
    num: Any = 1,
    seed: Any = 0,
    on_text: Callable[[int, str, bool], None] | None = None,
    **request: Any,
  ) -> Generation:
    """Continue prompts.

    Args:
      prompts: a text, token ids as they are, a conversation, or a list of these. A conversation is
        a list of messages {"role": "system", "user", "assistant" or "tool", "content": text}; the
        checkpoint's own chat template writes it and opens the answer.
      num: texts per prompt, those of one prompt together; what is given one for each, seeds too, is
        then given for each text.
      seed: a whole number of 64 bits. Text i of a seed is the same whatever else is in the batch.
        One seed for each gives what each would get as the only one.
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
    prompts = _repeated(prompts, num, self.model.config)
    return self.run(self.plan(prompts, **_known(request)), seed=seed, on_text=on_text)

  def plan(
    self,
    prompts: Any,
    *,
    chat: Any = False,
    system: Any = None,
    thinking: Any = None,
    max_new_tokens: Any = 128,
    min_new_tokens: Any = 0,
    stop: Any = None,
    verify: Any = None,
    layout: Any = None,
    **options: Any,
  ) -> Plan:
    """Check a request; nothing is loaded or compiled.

    Args:
      prompts: as for `generate`. A text follows the separator of documents, unless the tokenizer
        is that of a chat model.
      chat: each text is what a user says; its turn is closed and the answer's opened.
      system: what the system says before conversations.
      thinking: True or False where the chat template can switch thoughts on and off; None: as it
        does by itself.
      max_new_tokens: the most tokens per prompt; one number, or one for each.
      min_new_tokens: so many tokens do not end a text; likewise.
      stop: a text or an id that ends a text, or a list of such; None: the tokenizer's ids; ():
        nothing does. Or a list of such for each prompt. A text may be of several tokens, and what
        is written is cut before it; the loop then runs on the host, as for `on_text`.
      verify: with a draft: "stacked", "simsd", or "none" to leave it aside; None: "stacked" up to
        eight tokens per block. See `sample.SpeculativeOptions`.
      layout: of "simsd": "unified" (default) or "published".
      **options: tools, JSON schemas for the chat template. Of `sample.BlockRule`: strategy, steps
        and others; block_length is the checkpoint's by default. Of rows, one value or one for each
        prompt: temperature, by default 0, the most probable tokens; top_k, top_p and threshold.
        Other values of these, of stop and of numbers of tokens compile nothing new, except that
        there is a program for temperature 0 only, one for any temperature, and one for top_k, top_p
        and min_new_tokens.

    Raises:
      InputError: the request cannot be met.
    """
    here, mask_id = (self.source, self.tokenizer), self.process.mask_id
    prompts, asked = read.each(prompts), options.pop("block_length", None)
    tools = options.pop("tools", None)
    talk = read.Talk.make(chat=chat, system=system, thinking=thinking, tools=tools)
    length = requests.block_length(self.source, self.block_length, asked)
    stop_ids, stop_texts, watched = stops.read(*here, mask_id, stop, len(prompts))
    most, fewest = requests.counts(max_new_tokens, min_new_tokens, len(prompts))
    rule, rows = requests.rule(length, mask_id, stop_ids, fewest, options)
    speculative = requests.speculative(self.draft is not None, rule, verify, layout)
    ids = read.encode(*here, prompts, talk, mask_id, self.model.config.vocab_size)
    laid = requests.lay_out(self.source, ids, most, self.model.config)
    rows = rows.replace(limit_B=laid.pop("limit_B"))
    what = f"{len(ids)} texts in a cache of {laid['window']} positions"
    requests.check_room(what, self.model.config, len(ids), laid["window"])
    ends = {"stop_ids": stop_ids, "stop_texts": stop_texts, "watched": watched}
    return Plan(rule=rule, speculative=speculative, options=rows, **ends, **laid)

  def run(
    self,
    plan: Plan,
    *,
    seed: Any = 0,
    on_text: Callable[[int, str, bool], None] | None = None,
  ) -> Generation:
    """Decode what `plan` returned; arguments as for `generate`."""
    rng_B = requests.keys(seed, len(plan.stop_ids))
    draft = self.draft if plan.speculative is not None else None
    model, params = self.loaded
    if draft is not None:
      params = {"target": params, "draft": draft.params}
    draft_model = None if draft is None else draft.loaded[0]
    program = _program(model, draft_model, plan.speculative or plan.rule, plan.window)
    arguments = (params, plan.prompt_BP, rng_B, plan.lengths_B, plan.options)
    follow = Follow(self._text, plan, on_text)
    if on_text is None and not plan.watched:
      tokens_BL, info = program.whole(*arguments)
    else:
      tokens_BL, info = sample.decode(
        program.rounds._replace(done=follow.done(program.rounds.done)),
        *arguments[:3],
        lengths=plan.lengths_B,
        options=plan.options,
        on_round=follow,
      )
    check_logits(self.source, np.isnan(np.asarray(info.log_prob_BL)), self.model.config.dtype)
    rows, texts, info = follow.finish(rows_of(tokens_BL, info.prompt_B, info.lengths_B), info)
    drafted_B = info.counts.get("draft_passes", np.zeros(1, np.int32))
    return Generation(
      texts=texts,
      tokens=rows,
      info=info,
      target_passes=int(np.sum(info.passes_B)),
      draft_passes=int(np.sum(drafted_B)),
      mode=plan.mode,
    )

  def _text(self, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Return the text of decided ids; rows that no token has, and ends, show as nothing."""
    if ids and ids[-1] in stop_ids:
      ids = ids[:-1]
    silent, size = stops.silent_ids(self.tokenizer), self.tokenizer.vocab_size
    return self.tokenizer.decode([i for i in ids if i < size and i not in silent])


def _repeated(prompts, num, config):
  """Return every prompt `num` times."""
  if not read.is_whole(num) or num < 1:
    raise InputError(f"num={num!r}: there must be at least 1 text, a whole number of them.")
  prompts = read.each(prompts)
  requests.check_room(f"num={num} texts of {len(prompts)} prompts", config, num * len(prompts), 1)
  return [prompt for prompt in prompts for _ in range(num)]


_ELSEWHERE = ("grid", "length", "noise_removal", "nucleus", "precision", "sampler")


def _known(request):
  """Return a request without what is not given; refuse what only denoisers on a grid have."""
  for name in request:
    if name in _ELSEWHERE:
      raise InputError(
        f"{name} is an option of denoisers on a grid, and this network decodes blocks; it takes "
        "steps, num, seed, prompt, chat, max_new_tokens, min_new_tokens, stop, system, thinking, "
        "tools, block_length, strategy, threshold, temperature, top_k, top_p, verify and layout."
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
