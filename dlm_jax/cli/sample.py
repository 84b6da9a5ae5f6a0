# SPDX-License-Identifier: Apache-2.0
"""`dlm-jax sample`: texts from a trained model."""

import argparse
import contextlib
import json
import sys
import time
from typing import Any

import jax
import numpy as np

from dlm_jax import assets, convert, disk, json_file, remote
from dlm_jax.cli import flags
from dlm_jax.convert import places
from dlm_jax.errors import InputError, hint
from dlm_jax.text import denoiser, load, prompts, requests, stops, viz

# Flags of one way of writing alone; what is not given is left to the network.
_GRID = ("num", "length", "sampler", "option", "noise_removal", "precision", "show_steps")
_BLOCKS = (
  "chat",
  "system",
  "messages",
  "thinking",
  "no_thinking",
  "max_new_tokens",
  "stop",
  "block_length",
  "strategy",
  "confidence",
  "threshold",
  "top_k",
  "draft",
  "verify",
  "layout",
  "stream",
)
# No options of a sampler.
_OURS = (*_GRID, *_BLOCKS, "html", "prompt", "steps", "seed", "return_trace")


def main(argv: list[str]) -> None:
  """Parse flags, sample, print."""
  given = vars(_parser().parse(argv))
  given.pop("overrides")
  given = {name: value for name, value in given.items() if not (value is None or value is False)}
  path = _source(given.pop("checkpoint", ""), given.pop("model", ""))
  tokenizer = given.pop("tokenizer", None)
  given["prompt"] = [_text(prompt, "prompt") for prompt in given.get("prompt", [])]
  if "system" in given:
    given["system"] = _text(given["system"], "system")
  source = places.find_network(path)
  network = convert.open_network(source)
  decodes = load.decodes(network)
  for name in _GRID if decodes else _BLOCKS:
    if name in given and (name, network.writes) != ("top_k", "next"):
      other = "decodes blocks" if decodes else "is no decoder of blocks"
      raise InputError(f"--{name} does not apply: {path} {other}.")
  if network.writes == "next" and not decodes:
    if "html" in given:
      raise InputError(f"--html does not apply: {path} writes from left to right.")
    _continue(source, tokenizer, given)
    return
  with _page(given.pop("html", "")) as write_page:
    (_decode if decodes else _denoise)(source, tokenizer, given, write_page)


@contextlib.contextmanager
def _page(path: str):
  """Yield what writes the page of --html, once it is known that it can be written; None: no page.

  Its arguments are those of `viz.animation`, and a title.
  """
  if not path:
    yield None
    return
  if remote.is_remote(path):
    raise InputError(f"--html={path}: the page is a file of this machine; name one.")
  with disk.fresh_file(path) as file:

    def write(title, *arguments, **options):
      page = viz.page(viz.animation(*arguments, **options), title)
      with disk.writing(path):
        file.write_text(page, encoding="utf-8")

    yield write
  print(f"page: {path}", file=sys.stderr)


def _continue(path, tokenizer, options):
  """Print texts of a judge."""
  as_json, options = options.pop("json", False), _one_prompt(options)
  pipe = load.open_continuation(path, tokenizer)
  _print(pipe(**options), as_json, pipe.tokenizer)


def _one_prompt(options):
  """Return the options of a call from those of networks that take one prompt."""
  texts = options.pop("prompt")
  if len(texts) > 1:
    raise InputError("several --prompt are for decoders of blocks; give one.")
  given = dict(options.pop("option", []))
  for name in given:
    if name in _OURS:
      raise InputError(f"--option {name}=…: write --{name}, or leave it out.")
  return options | {"prompt": "".join(texts), **given}


def _print(texts, as_json, tokenizer):
  for number, text in enumerate(texts, start=1):
    plain = viz.plain(text, tokenizer)
    print(json.dumps(text) if as_json else f"──── {number} ────\n{plain}\n")


def _denoise(path, tokenizer, options, write_page):
  """Print texts of a denoiser, or the steps of the first one."""
  show, as_json = options.pop("show_steps", False), options.pop("json", False)
  options = _one_prompt(options)
  if options.get("precision") == "legacy":
    for name in ("temperature", "nucleus"):
      if options.pop(name, 1.0) != 1.0:
        raise InputError(f"--{name} does not combine with --precision=legacy.")
  pipe = denoiser.load_denoiser(path, tokenizer)
  if not show and write_page is None:
    _print(pipe(**options), as_json, pipe.tokenizer)
    return
  given_L = pipe.given(options["prompt"], options.get("length"))
  rows, trace_KBL = jax.device_get(pipe.tokens(**options, return_trace=True))
  # "first_hitting" has a state per token, whatever --steps.
  steps = options.get("steps", 16) if options.get("sampler") != "first_hitting" else None
  states = {"given": given_L, "steps": steps}
  if write_page is not None:
    write_page(_titled(pipe.source), trace_KBL[:, 0], pipe.tokenizer, **states)
  if show:
    colour = sys.stdout.isatty()
    print(viz.terminal(trace_KBL[:, 0], pipe.tokenizer, colour=colour, **states))
  else:
    _print(map(pipe.tokenizer.decode, rows), as_json, pipe.tokenizer)


def _titled(source) -> str:
  """Name a network by its folder; a run's by the run."""
  parent = source.name in ("best", "final")
  return f"{source.parent.name if parent else source.name}, step by step"


def _decode(path, tokenizer, options, write_page):
  """Print what a network that decodes blocks writes behind its prompts."""
  if "verify" in options and options["verify"] != "none" and "draft" not in options:
    raise InputError(f"--verify={options['verify']} needs --draft=DIR, a smaller network.")
  as_json, stream = options.pop("json", False), options.pop("stream", False)
  asked, seed = _asked(options), options.pop("seed", 0)
  if "nucleus" in options:
    options["top_p"] = options.pop("nucleus")
  if "stop" in options:
    options["stop"] = [_stop(one) for one in options["stop"] if one != "none"]
  pipe = load.open_decoder(path, tokenizer, draft=options.pop("draft", None))
  plan = pipe.plan(asked, **options)
  requests.seeds(seed, len(asked))
  pipe.load_weights()
  print(plan.mode, file=sys.stderr)
  live = None if as_json or not (stream or sys.stdout.isatty()) else _Live(len(asked))
  start = time.perf_counter()
  result = pipe.run(plan, seed=seed, on_text=live)
  seconds = time.perf_counter() - start
  if live is None:
    for number, text in enumerate(result.texts, start=1):
      print(json.dumps(text) if as_json else _header(number, len(asked)) + text)
  if write_page is not None:
    write_page(_titled(pipe.source), **_block_states(plan, result, pipe.tokenizer))
  print(_summary(result, seconds), file=sys.stderr)


def _block_states(plan, result, words) -> dict[str, Any]:
  """Return what `viz.animation` shows of the first text; ends are left out as in the text."""
  info, count = result.info, int(plan.lengths_B[0])
  ids_L = np.concatenate([np.asarray(plan.prompt_BP)[0, :count], result.tokens[0]]).astype(np.int32)
  seen_L = (ids_L < words.vocab_size) & ~np.isin(ids_L, stops.silent_ids(words))
  step_L = np.where(seen_L, np.asarray(info.step_BL)[0, : len(ids_L)], -1)
  trace_KL = viz.block_trace(ids_L, step_L, plan.rule.block_length, words.mask_id)
  given_L = np.arange(len(ids_L)) < count
  return {"trace_KL": trace_KL[:, seen_L], "tokenizer": words, "given": given_L[seen_L]}


def _asked(options):
  """Return prompts or conversations; leave in the options what says how they are written."""
  texts, file = options.pop("prompt"), options.pop("messages", "")
  if "thinking" in options and "no_thinking" in options:
    raise InputError("both --thinking and --no_thinking given; give one.")
  if options.pop("no_thinking", False):
    options["thinking"] = False
  if not file:
    return texts or [""]
  if texts or "chat" in options:
    raise InputError(f"--messages={file} holds whole conversations; leave --prompt and --chat out.")
  found, tools = prompts.read_messages(file, f"--messages={file}")
  if tools is not None:
    options["tools"] = tools
  return found


class _Live:
  """Prints pieces as they come; those of a later prompt wait until the earlier ones have ended."""

  def __init__(self, count: int):
    self._pieces, self._ended, self._count = [""] * count, [False] * count, count
    self._number = -1  # of the prompt whose text is being printed
    self._next()

  def __call__(self, number: int, piece: str, ended: bool) -> None:
    self._pieces[number] += piece
    self._ended[number] = ended
    while self._number < self._count:
      print(self._pieces[self._number], end="", flush=True)
      self._pieces[self._number] = ""
      if not self._ended[self._number]:
        return
      print()
      self._next()

  def _next(self):
    self._number += 1
    if self._number < self._count:
      print(_header(self._number + 1, self._count), end="", flush=True)


def _header(number, count):
  return f"──── {number} ────\n" if count > 1 else ""


def _summary(result, seconds):
  """Return one line: how much, how long with compilation, how many passes."""
  passes = [f"{n / max(result.count, 1):.2f}" for n in (result.target_passes, result.draft_passes)]
  drafts = f" and {passes[1]} draft" if result.draft_passes else ""
  return (
    f"{result.count} tokens in {seconds:.1f} s, compilation included; {passes[0]} target{drafts} "
    "passes per token"
  )


def _text(given: str, flag: str) -> str:
  """Return what is given, or what the file behind an @ holds."""
  return prompts.read_text(given[1:], f"--{flag}={given}") if given.startswith("@") else given


def _stop(text: str) -> int | str:
  """Return an id, or a text; in quotes it is a text whatever it spells, with escapes as in JSON."""
  if text.isdecimal() and text.isascii() and len(text) < 12:
    return int(text)
  if len(text) > 1 and text[0] == text[-1] == '"':
    try:
      return json_file.parse(text)
    except ValueError as error:
      raise InputError(f"--stop={text} is no text in quotes: {error}.") from None
  return text


def _source(checkpoint: str, model: str) -> str:
  """Return what to load: exactly one of the two is given."""
  if checkpoint and not model:
    return checkpoint
  known = assets.denoisers()
  if checkpoint or not model:
    raise InputError(
      f"{'both --model and' if model else 'neither --model nor'} --checkpoint given; give one: "
      f"--checkpoint=PATH of a trained network, or --model=NAME, one of {', '.join(known)}."
    )
  if model not in known:
    near = hint(model, known)
    raise InputError(
      f"--model={model} is no shipped model{near}; choose one of {', '.join(known)}."
    )
  return f"shipped:{model}"


def _parser() -> flags.Parser:
  parser = flags.Parser(
    "sample",
    "Print texts of a denoiser or a judge, or what a decoder of blocks (SDAR) writes on prompts.",
    """
dlm-jax sample --model=novels-student --steps=8 --prompt='It was ' --show_steps
dlm-jax sample --checkpoint=runs/quickstart/student --steps=8 --sampler=psi --option kappa=0.9
dlm-jax sample --checkpoint=SDAR-8B-Chat-b8 --draft=SDAR-1.7B-Chat-b8 --chat --prompt='2+2?'
""",
    usage="dlm-jax sample (--model=NAME | --checkpoint=PATH) [--flag=value ...]",
  )
  add = parser.add_argument
  add("--model", help="a shipped network, e.g. novels-student; `dlm-jax models` lists all")
  add("--checkpoint", metavar="PATH", help="workdir, model directory or *.ckpt")
  add("--workdir", dest="checkpoint", help=argparse.SUPPRESS)
  add("--tokenizer", metavar="PATH", help="default: the one beside the network")
  add("--prompt", action="append", metavar="TEXT", help="or @FILE; of a decoder also several")
  add("--steps", type=int, help="evaluations per text (16); of a decoder per block (its length)")
  add(
    "--temperature",
    type=flags.number,
    metavar="T",
    help="0: the most probable tokens; default 1, of a decoder 0",
  )
  add("--nucleus", "--top_p", type=flags.number, metavar="P", help="draw from the top of this mass")
  add("--seed", type=flags.seed)
  add("--json", action="store_true", help="one JSON string per line")
  add("--html", metavar="FILE", help="also write a page that plays how text 1 was written")
  add = parser.add_argument_group("of denoisers; --num and --length of judges too").add_argument
  add("--num", type=int, help="number of texts")
  add("--length", type=int, help="tokens, or residues; default: the model's")
  add("--sampler", help="ancestral, first_hitting, psi, analytic or rgas")
  add(
    "--option",
    action="append",
    type=flags.option,
    metavar="NAME=VALUE",
    help="order=random; kappa=cap, eta=0.02 (psi); h=30,40, candidates=4 (rgas)",
  )
  add("--noise_removal", metavar="HOW", help="ancestral, greedy or none")
  add("--precision", help="exact, or legacy: the public fp32 race")
  add("--show_steps", action="store_true", help="print every step of text 1 instead")
  _add_blocks(parser)
  return parser


def _add_blocks(parser: flags.Parser) -> None:
  """Add what only decoders of blocks have."""
  add = parser.add_argument_group("of decoders of blocks").add_argument
  add("--chat", action="store_true", help="a prompt is what a user says to a chat model")
  add("--system", metavar="TEXT", help="or @FILE; what the system says before a conversation")
  add("--messages", metavar="FILE", help="JSON of a conversation, or of a list of them")
  add(
    "--thinking", action="store_true", help="thoughts on, or --no_thinking; default: the template's"
  )
  add("--no_thinking", action="store_true", help=argparse.SUPPRESS)
  add("--max_new_tokens", type=int, metavar="N", help="per prompt (128)")
  add(
    "--stop",
    action="append",
    metavar="TEXT",
    help="end before a text (5 is an id, '\"5\"' a text), or none",
  )
  add("--block_length", type=int, metavar="N", help="default: what the checkpoint names")
  add("--strategy", help="low_confidence_dynamic (default), low_confidence_static, sequential, …")
  add(
    "--threshold",
    type=flags.number,
    metavar="P",
    help="of low_confidence_dynamic (0.9); at T = 1 with --confidence=untempered",
  )
  add("--confidence", help=argparse.SUPPRESS)
  add("--top_k", type=int, help="draw from the k most probable tokens")
  add("--draft", metavar="PATH", help="a smaller network that drafts")
  add("--verify", help="stacked (exact), simsd (not exact; --layout=unified or published) or none")
  add("--layout", help=argparse.SUPPRESS)
  add("--stream", action="store_true", help="print as it is decided; on a terminal always")
