# SPDX-License-Identifier: Apache-2.0
"""Ways of decoding blocks side by side: speed, passes, acceptance, and whether texts are the same.

Every arm is one compiled loop on the device with the same folding, batch 1. Speed comes from runs
of a fixed number of emitted tokens in which nothing stops. Texts come from other runs of the same
program, cut after the first stop token: what comes before one does not depend on stopping. Repeats
go through all arms in turn, so that a clock that drifts hits all alike.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import models, sample
from dlm_jax.arrays import Params
from dlm_jax.errors import InputError
from dlm_jax.evaluate import generative, likelihood, tables


class Network(NamedTuple):
  """A decoder and its parameters."""

  model: models.Decoder
  params: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One way of decoding; what it measured.

  Attributes:
    name: of the way.
    exact: its text is the static decode of the target by construction.
    rate: emitted tokens per second, the prompt's pass and compilation excluded; median of repeats.
    spread: (highest − lowest) / median of the rates.
    end_to_end: the same with the prompt's pass.
    target_passes: per emitted token.
    draft_passes: per emitted token.
    acceptance: accepted over drafted tokens; None without a draft.
    conditional: accepted over tested tokens: a token is tested if nothing before it failed.
    same: share of prompts with the text of the first arm, the target's static decode.
    length: mean tokens of the texts, stop token included.
    genppl: a judge's perplexity of the texts given their prompts; None without a judge.
    genppl_se: its standard error over texts.
    entropy: mean over texts of the entropy of a text's own token histogram, nats; None likewise.
    compile_seconds: of the loop, its first run included.
  """

  name: str
  exact: bool
  rate: float
  spread: float
  end_to_end: float
  target_passes: float
  draft_passes: float
  acceptance: float | None
  conditional: float | None
  same: float
  length: float
  genppl: float | None
  genppl_se: float | None
  entropy: float | None
  compile_seconds: float


class _Way(NamedTuple):
  """A way of decoding, not run yet."""

  name: str
  exact: bool
  rule: Any  # BlockRule, or SpeculativeOptions


def ways(rule: sample.BlockRule, *, drafted: bool, threshold: float = 0.9) -> list[_Way]:
  """Return what is compared: static, dynamic, and with a draft SimSD in both layouts and stacked.

  Args:
    rule: gives all but the strategy, which is set.
    drafted: whether there is a draft.
    threshold: of the dynamic strategy, for its name.
  """
  static = dataclasses.replace(rule, strategy="low_confidence_static")
  dynamic = dataclasses.replace(static, strategy="low_confidence_dynamic")
  found = [_Way("static", True, static), _Way(f"dynamic {threshold:g}", False, dynamic)]
  if not drafted:
    return found
  options = sample.SpeculativeOptions
  for layout in ("published", "unified"):
    approximate = options(target=static, verify="simsd", layout=layout)
    found.append(_Way(f"SimSD {layout}", False, approximate))
  return [*found, _Way("stacked", True, options(target=static, verify="stacked"))]


def bench_decode(
  target: Network,
  draft: Network | None,
  prompts: Sequence[Sequence[int]],
  rule: sample.BlockRule,
  options: sample.RowOptions,
  *,
  new_tokens: int,
  max_new_tokens: int,
  repeats: int,
  threshold: float = 0.9,
  judge: Callable[..., Any] | None = None,
) -> list[Arm]:
  """Compare ways of decoding.

  Args:
    target: the network.
    draft: a smaller one with the same vocabulary, or None.
    prompts: ids, one row each, decoded one at a time.
    rule: see `ways`.
    options: of one row; its stop ids end the texts that are compared. Above temperature 0 SimSD
      accepts by rejection.
    new_tokens: emitted tokens per prompt of the timed runs.
    max_new_tokens: the most tokens per text.
    repeats: timed runs per prompt.
    threshold: of the dynamic strategy.
    judge: of the texts, see `score`.

  Raises:
    InputError: a prompt is too long for the network, or a number is not positive.
  """
  if min(new_tokens, max_new_tokens, repeats, len(prompts)) < 1:
    raise InputError(
      f"new_tokens={new_tokens}, max_new_tokens={max_new_tokens}, repeats={repeats} and the number "
      f"of prompts, {len(prompts)}, must be at least 1."
    )
  longest = max(map(len, prompts))
  window = longest + max(new_tokens, max_new_tokens)
  if window > target.model.config.length:
    raise InputError(
      f"prompts of up to {longest} tokens and {window - longest} new ones do not fit the network's "
      f"{target.model.config.length} positions."
    )
  rows, lengths = sample.pad_prompts(prompts)
  keys = jax.random.split(jax.random.key(0), len(prompts))
  inputs = [(rows[i][None], lengths[i][None], keys[i]) for i in range(len(prompts))]
  stop_ids = np.asarray(options.stop_BS)[0].tolist()
  endless = options.replace(
    stop_BS=jnp.full_like(options.stop_BS, -1),
    threshold_B=jnp.full_like(options.threshold_B, threshold),
  )
  found = ways(rule, drafted=draft is not None, threshold=threshold)
  started: dict[bool, Any] = {}
  networks = (target, draft)
  runners = [_Runner(networks, way, endless, window, started) for way in found]
  timed = _time(runners, inputs, new_tokens, repeats)
  texts = [
    [cut(runner.text(*one, max_new_tokens), stop_ids) for one in inputs] for runner in runners
  ]
  scores = [score(judge, prompts, text) if judge else (None, None, None) for text in texts]
  return [
    _arm(way, runner, times, text, texts[0], new_tokens, *scored)
    for way, runner, times, text, scored in zip(found, runners, timed, texts, scores, strict=True)
  ]


def cut(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
  """Return the tokens up to the first stop id, that one included."""
  ends = [i + 1 for i, token in enumerate(ids) if token in stop_ids]
  return list(ids[: min(ends, default=len(ids))])


def score(
  judge: Callable[..., Any], prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> tuple[float, float, float]:
  """Return a judge's perplexity of texts given their prompts, its error, and the texts' entropy.

  Unlike `evaluate.genppl`, every token of a text counts, an end of text too. The error is over
  texts; the entropy is the mean of `evaluate.entropies`, nats.

  Args:
    judge: an `evaluate.Judge` of the same vocabulary, or any judge(tokens_BL) -> logits_BLV.
    prompts: ids, at least one each.
    texts: ids that follow them.
  """
  rows_NL, lengths_N = sample.pad_prompts([[*a, *b] for a, b in zip(prompts, texts, strict=True)])
  place_L = np.arange(1, rows_NL.shape[1])
  starts_N = np.array([len(prompt) for prompt in prompts])
  judged_NM = (place_L >= starts_N[:, None]) & (place_L < np.asarray(lengths_N)[:, None])
  nats_NM = likelihood.token_nll(judge, np.asarray(rows_NL), batch_size=min(16, len(prompts)))
  found = generative.perplexity(nats_NM, judged_NM)
  spread = np.concatenate([generative.entropies(np.asarray([text])) for text in texts])
  return found["genppl"], found["genppl_se"], float(spread.mean())


class _Runner:
  """Rounds in two compiled parts: the prompt's pass, and the loop.

  The first part does not depend on how blocks are decided: arms share it.
  """

  def __init__(self, networks, way, options, window, started):
    target, draft = networks
    drafted = isinstance(way.rule, sample.SpeculativeOptions)
    if drafted:
      rounds = sample.speculative_decoder(target.model, draft.model, way.rule, window)
      self.params = {"target": target.params, "draft": draft.params}
    else:
      rounds = sample.block_decoder(target.model, way.rule, window)
      self.params = target.params

    self._options = options
    self._start = started.setdefault(drafted, jax.jit(functools.partial(sample.start, rounds)))
    self._loop = jax.jit(functools.partial(sample.finish, rounds), donate_argnums=1)
    self.compile_seconds = 0.0

  def start(self, prompt_1P, lengths_1, rng, new_tokens):
    """Return the state after the prompt's pass."""
    state = self._start(
      self.params,
      prompt_1P,
      rng,
      lengths=lengths_1,
      max_length=lengths_1 + new_tokens,
      options=self._options,
    )
    return jax.block_until_ready(state)

  def compile(self, prompt_1P, lengths_1, rng, new_tokens):
    """Compile both parts and run them once; return the final state."""
    state = self.start(prompt_1P, lengths_1, rng, new_tokens)
    begin = time.perf_counter()
    state = self.finish(state)
    self.compile_seconds = time.perf_counter() - begin
    return state

  def finish(self, state):
    """Run the loop; the state is used up."""
    return jax.block_until_ready(self._loop(self.params, state))

  def text(self, prompt_1P, lengths_1, rng, new_tokens) -> list[int]:
    """Return the ids that follow a prompt."""
    progress = self.finish(self.start(prompt_1P, lengths_1, rng, new_tokens)).progress
    start, stop = int(progress.prompt_B[0]), int(progress.length_B[0])
    return np.asarray(progress.tokens_BW)[0, start:stop].tolist()


@dataclasses.dataclass
class _Times:
  """What the fixed runs of one arm took and counted."""

  loops: list[float]  # seconds of all prompts, one entry per repeat
  wholes: list[float]  # the same with the prompts' passes
  counts: dict[str, int]


def _time(runners, inputs, new_tokens, repeats) -> list[_Times]:
  counts = [_count([runner.compile(*inputs[0], new_tokens)]) for runner in runners]
  for runner, total in zip(runners, counts, strict=True):
    rest = _count([runner.finish(runner.start(*one, new_tokens)) for one in inputs[1:]])
    total.update({name: total[name] + rest[name] for name in total})
  found = [_Times([], [], total) for total in counts]
  for _ in range(repeats):
    for runner, times in zip(runners, found, strict=True):
      loop = whole = 0.0
      for one in inputs:
        begin = time.perf_counter()
        state = runner.start(*one, new_tokens)
        middle = time.perf_counter()
        runner.finish(state)
        end = time.perf_counter()
        loop, whole = loop + end - middle, whole + end - begin
      times.loops.append(loop)
      times.wholes.append(whole)
  return found


def _count(states) -> dict[str, int]:
  """Sum passes and tokens of final states; `decided` has those beyond a row's limit too."""
  total = dict.fromkeys(("target", "draft", "drafted", "accepted", "decided"), 0)
  for state in states:
    counts = getattr(state, "counts", {})
    total["target"] += int(state.progress.passes_B.sum())
    total["draft"] += int(np.sum(counts.get("draft_passes", 0)))
    total["drafted"] += int(np.sum(counts.get("drafted", 0)))
    total["accepted"] += int(np.sum(counts.get("accepted", 0)))
    total["decided"] += int((np.asarray(state.progress.step_BW) >= 0).sum())
  return total


def _arm(way, runner, times, texts, reference, new_tokens, genppl, genppl_se, entropy) -> Arm:
  emitted = new_tokens * len(texts)
  rates = [emitted / seconds for seconds in times.loops]
  rate, counts = statistics.median(rates), times.counts
  return Arm(
    name=way.name,
    exact=way.exact,
    rate=rate,
    spread=(max(rates) - min(rates)) / rate,
    end_to_end=emitted / statistics.median(times.wholes),
    target_passes=counts["target"] / emitted,
    draft_passes=counts["draft"] / emitted,
    acceptance=counts["accepted"] / counts["drafted"] if counts["drafted"] else None,
    conditional=counts["accepted"] / counts["decided"] if counts["drafted"] else None,
    same=statistics.fmean(a == b for a, b in zip(texts, reference, strict=True)),
    length=statistics.fmean(map(len, texts)),
    genppl=genppl,
    genppl_se=genppl_se,
    entropy=entropy,
    compile_seconds=runner.compile_seconds,
  )


def _error(arm):
  return "" if arm.genppl is None else generative.plus_minus(arm.genppl, arm.genppl_se)


def table(arms: Sequence[Arm]) -> str:
  """Return the arms as a table."""
  known = lambda x, digits=3: "" if x is None else f"{x:.{digits}f}"  # noqa: E731
  rows = [
    {
      "arm": arm.name,
      "exact": "yes" if arm.exact else "no",
      "tok/s": f"{arm.rate:.1f}",
      "±": f"{100 * arm.spread:.0f} %",
      "× static": f"{arm.rate / arms[0].rate:.2f}",
      "with prompt": f"{arm.end_to_end:.1f}",
      "target passes": f"{arm.target_passes:.3f}",
      "draft passes": f"{arm.draft_passes:.3f}",
      "acceptance": known(arm.acceptance),
      "conditional": known(arm.conditional),
      "same text": f"{100 * arm.same:.0f} %",
      "mean length": f"{arm.length:.1f}",
      "GenPPL": _error(arm),
      "entropy": known(arm.entropy, 2),
    }
    for arm in arms
  ]
  return tables.titled(rows, left=(0, 1))
