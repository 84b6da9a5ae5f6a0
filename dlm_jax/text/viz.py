# SPDX-License-Identifier: Apache-2.0
"""Denoising made visible: one text per step, newly revealed tokens highlighted."""

import html
import itertools

import numpy as np
from jaxtyping import Bool, Int

_NEW, _DIM, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
_HIDDEN, _OLD, _FRESH = range(3)
_TAGS = {_HIDDEN: "<i>{}</i>", _OLD: "{}", _FRESH: "<b>{}</b>"}
_END = "⏹"  # shown for the document separator
_STYLE = """<style>
.dlm-denoising { max-width: 46em; padding: 0.8em 1em; border: 1px solid #d0d0d0; border-radius: 6px;
  background: #fff; color: #222; font: 14px/1.6 Georgia, serif; }
.dlm-denoising pre { margin: 0 0 0.8em; padding: 0; border: 0; background: none; color: inherit;
  font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }
.dlm-denoising pre[hidden], .dlm-denoising div[hidden] { display: none; }
.dlm-denoising i { background: #ececec; color: transparent; font-style: normal;
  border-radius: 3px; user-select: none; }
.dlm-denoising b { background: #d3f2de; color: #004d25; font-weight: inherit; border-radius: 3px; }
.dlm-denoising div { display: flex; gap: 0.8em; align-items: center;
  font: 12px/1.4 system-ui, sans-serif; }
.dlm-denoising input { flex: 1; }
.dlm-denoising button { width: 5em; }
.dlm-denoising output { min-width: 17em; font-variant-numeric: tabular-nums; color: #222; }
</style>"""
_SCRIPT = """<script>
for (const box of document.querySelectorAll(".dlm-denoising:not([data-ready])")) {
  box.dataset.ready = "yes";
  const frames = [...box.querySelectorAll("pre")];
  const [button, slider, note] = ["button", "input", "output"].map((x) => box.querySelector(x));
  const last = frames.length - 1, pause = 1000 * Number(box.dataset.seconds) / Math.max(last, 1);
  let shown = 0, timer = null;
  const show = (k) => {
    shown = k;
    frames.forEach((frame, i) => { frame.hidden = i !== k; });
    slider.value = k;
    note.textContent = frames[k].title;
  };
  const stop = () => { clearTimeout(timer); timer = null; button.textContent = "play"; };
  const next = () => {
    show(shown < last ? shown + 1 : 0);
    timer = setTimeout(next, shown < last ? pause : 3000);
  };
  const play = () => { button.textContent = "pause"; timer = setTimeout(next, pause); };
  button.onclick = () => (timer === null ? play() : stop());
  slider.oninput = () => { stop(); show(Number(slider.value)); };
  box.querySelector("div").hidden = false;
  show(0);
  play();
}
</script>"""


def terminal(
  trace_KL: Int[np.ndarray, "K L"],
  tokenizer,
  *,
  colour: bool = True,
  mask: str = "·",
  given: int | Bool[np.ndarray, "L"] = 0,
  steps: int | None = None,
) -> str:
  """Return the states of one sequence, one paragraph per step, as text for a terminal.

  What the last step left to the removal of noise is a paragraph of its own; if it left nothing,
  there is none.

  Args:
    trace_KL: ids after every step of one sequence; tokens only, never logits.
    tokenizer: turns ids into text; its `mask_id` marks what is still hidden.
    colour: highlight what a step revealed, with ANSI codes.
    mask: shown for a hidden token.
    given: where nothing was drawn, or how many tokens at the beginning: those of a prompt.
    steps: that were asked for; None: as many as there are states.
  """
  trace_KL, given_L = _shown(np.asarray(trace_KL), steps), _given(given, trace_KL.shape[1])
  paragraphs, before_L = [], np.where(given_L, trace_KL[-1], tokenizer.mask_id)
  for step, row_L in enumerate(trace_KL, start=1):
    head = f"{_name(step, steps)}: {_count(row_L, given_L, tokenizer.mask_id)}"
    if colour:
      head = f"{_DIM}{head}{_RESET}"
    paragraphs.append(f"{head}\n{_paint(row_L, before_L, tokenizer, colour, mask)}")
    before_L = row_L
  return "\n\n".join(paragraphs)


def _shown(trace_KL, steps):
  """Return the states without a last one in which no noise was left to remove."""
  more = len(trace_KL) > (1 if steps is None else steps)
  idle = more and len(trace_KL) > 1 and (trace_KL[-1] == trace_KL[-2]).all()
  return trace_KL[:-1] if idle else trace_KL


def _given(given, length):
  """Return where nothing is drawn; a number is of tokens at the beginning."""
  return np.arange(length) < given if np.ndim(given) == 0 else np.asarray(given, bool)


def _name(step, steps):
  return f"step {step}" if steps is None or step <= steps else "noise removed"


def _count(row_L, given_L, mask_id):
  """Say how much of what is to be drawn is there."""
  known = int(np.sum((row_L != mask_id) & ~given_L))
  return f"{known} of {int(np.sum(~given_L))} tokens"


def _paint(row_L, before_L, tokenizer, colour, mask):
  """Decode runs of equal state; a run, not a token: characters may span several tokens."""
  hidden_L, new_L = row_L == tokenizer.mask_id, row_L != before_L
  kind_L = np.where(hidden_L, 0, np.where(new_L, 2, 1))
  pieces, start = [], 0
  for end in range(1, len(row_L) + 1):
    if end < len(row_L) and kind_L[end] == kind_L[start]:
      continue
    text = mask * (end - start) if hidden_L[start] else _text(row_L[start:end], tokenizer)
    pieces.append(f"{_NEW}{text}{_RESET}" if colour and kind_L[start] == 2 else text)
    start = end
  return "".join(pieces)


def _text(ids, tokenizer):
  return tokenizer.decode(ids).replace(tokenizer.eos_text, _END)


def animation(
  trace_KL: Int[np.ndarray, "K L"],
  tokenizer,
  *,
  seconds: float = 8.0,
  given: int | Bool[np.ndarray, "L"] = 0,
  steps: int | None = None,
) -> str:
  """Return the states of one sequence as HTML that plays them, with a slider; for notebooks.

  Every frame is laid out like the last one: a bar stands where a word will be, so nothing moves
  but the words that appear. Script and style are inside; without scripts the last frame is shown.

  Args:
    trace_KL: as for `terminal`.
    tokenizer: as for `terminal`.
    seconds: of one pass.
    given: as for `terminal`; it is there from the start.
    steps: as for `terminal`.

  Example:
    >>> from IPython.display import HTML  # doctest: +SKIP
    >>> tokens, trace = pipe.tokens(steps=16, return_trace=True)  # doctest: +SKIP
    >>> HTML(viz.animation(np.asarray(trace)[:, 0], pipe.tokenizer))  # doctest: +SKIP
  """
  trace_KL, given_L = _shown(np.asarray(trace_KL), steps), _given(given, trace_KL.shape[1])
  last_L, total = trace_KL[-1], min(len(trace_KL), steps or len(trace_KL))
  start_L = np.where(given_L, last_L, tokenizer.mask_id)
  units, frames, before_L = _units(last_L, tokenizer), [], start_L
  for step, row_L in enumerate([start_L, *trace_KL]):
    name = f"step {step} of {total}" if step <= total else _name(step, steps)
    note = f"{name}: {_count(row_L, given_L, tokenizer.mask_id)}"
    text = _frame(row_L, before_L, last_L, units, tokenizer)
    hidden = "" if step == len(trace_KL) else " hidden"
    frames.append(f'<pre title="{note}"{hidden}>{text}</pre>')
    before_L = row_L
  controls = (
    '<div hidden><button type="button">pause</button>'
    f'<input type="range" min="0" max="{len(trace_KL)}" value="0" aria-label="step">'
    "<output></output></div>"
  )
  box = f'<div class="dlm-denoising" data-seconds="{seconds:g}">'
  return "\n".join([_STYLE, box, *frames, controls, "</div>", _SCRIPT])


def plain(text: str, tokenizer) -> str:
  """Return a text as one reads it: the separators at its ends go, those inside become a mark."""
  end = tokenizer.eos_text
  return text.removeprefix(end).removesuffix(end).replace(end, _END)


def page(box: str, title: str) -> str:
  """Return an HTML page of its own around what `animation` returned; it fetches nothing."""
  head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>'
  heading = f'<p style="font: 14px/1.6 system-ui, sans-serif">{html.escape(title)}</p>'
  return f'<!doctype html>\n<html lang="en">\n{head}\n{heading}\n{box}\n</html>\n'


def block_trace(
  tokens_L: Int[np.ndarray, "L"], step_L: Int[np.ndarray, "L"], block_length: int, mask_id: int
) -> Int[np.ndarray, "K L"]:
  """Return the states of a text that was decoded block by block, from when each token was set.

  Args:
    tokens_L: prompt and text.
    step_L: of `sample.Info`: the step inside its block that set a token, −1 in the prompt.
    block_length: tokens per block.
    mask_id: stands where a token is not set yet.
  """
  tokens_L, step_L = np.asarray(tokens_L), np.asarray(step_L)
  block_L = np.arange(len(tokens_L)) // block_length
  order_L = np.where(step_L < 0, -1, block_L * (step_L.max(initial=0) + 1) + step_L)
  moments_K = np.unique(order_L[order_L >= 0])
  if not len(moments_K):
    return tokens_L[None]  # nothing was set
  return np.where(order_L <= moments_K[:, None], tokens_L, mask_id)


def _units(row_L, tokenizer) -> list[slice]:
  """Cut a row into the fewest tokens that make whole characters: one each, mostly."""
  units, start = [], 0
  for end in range(1, len(row_L) + 1):
    whole = "\ufffd" not in tokenizer.decode(row_L[start:end])
    if whole or end - start == 4 or end == len(row_L):
      units.append(slice(start, end))
      start = end
  return units


def _frame(row_L, before_L, last_L, units, tokenizer) -> str:
  """Return one state as HTML; what is hidden takes the room of what the last state has there."""
  pieces = []
  for unit in units:
    hidden = (row_L[unit] == tokenizer.mask_id).any()
    new = (row_L[unit] != before_L[unit]).any()
    kind = _HIDDEN if hidden else _FRESH if new else _OLD
    pieces.append((kind, unit))
  runs = []
  for kind, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
    run = [unit for _, unit in group]
    row = last_L if kind == _HIDDEN else row_L
    text = _text(row[run[0].start : run[-1].stop], tokenizer)
    runs.append(_TAGS[kind].format(html.escape(text)))
  return "".join(runs)
