# SPDX-License-Identifier: Apache-2.0
"""Denoising made visible: one text per step, newly revealed tokens highlighted."""

import html
import itertools

import numpy as np
from jaxtyping import Int

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
  trace_KL: Int[np.ndarray, "K L"], tokenizer, *, colour: bool = True, mask: str = "·"
) -> str:
  """Return the states of one sequence, one paragraph per step, as text for a terminal.

  Args:
    trace_KL: ids after every step of one sequence; tokens only, never logits.
    tokenizer: turns ids into text; its `mask_id` marks what is still hidden.
    colour: highlight what a step revealed, with ANSI codes.
    mask: shown for a hidden token.
  """
  paragraphs, before_L = [], np.full(trace_KL.shape[1], tokenizer.mask_id)
  for step, row_L in enumerate(np.asarray(trace_KL), start=1):
    hidden = int(np.sum(row_L == tokenizer.mask_id))
    head = f"step {step}: {len(row_L) - hidden} of {len(row_L)} tokens"
    if colour:
      head = f"{_DIM}{head}{_RESET}"
    paragraphs.append(f"{head}\n{_paint(row_L, before_L, tokenizer, colour, mask)}")
    before_L = row_L
  return "\n\n".join(paragraphs)


def _paint(row_L, before_L, tokenizer, colour, mask):
  """Decode runs of equal state; a run, not a token: characters may span several tokens."""
  hidden_L, new_L = row_L == tokenizer.mask_id, row_L != before_L
  kind_L = np.where(hidden_L, 0, np.where(new_L, 2, 1))
  pieces, start = [], 0
  for end in range(1, len(row_L) + 1):
    if end < len(row_L) and kind_L[end] == kind_L[start]:
      continue
    text = mask * (end - start) if hidden_L[start] else tokenizer.decode(row_L[start:end])
    pieces.append(f"{_NEW}{text}{_RESET}" if colour and kind_L[start] == 2 else text)
    start = end
  return "".join(pieces)


def animation(
  trace_KL: Int[np.ndarray, "K L"], tokenizer, *, seconds: float = 8.0, given: int = 0
) -> str:
  """Return the states of one sequence as HTML that plays them, with a slider; for notebooks.

  Every frame is laid out like the last one: a bar stands where a word will be, so nothing moves
  but the words that appear. Script and style are inside; without scripts the last frame is shown.

  Args:
    trace_KL: as for `terminal`.
    tokenizer: as for `terminal`.
    seconds: of one pass.
    given: so many tokens at the beginning were not generated; they are there from the start.

  Example:
    >>> from IPython.display import HTML  # doctest: +SKIP
    >>> tokens, trace = pipe.tokens(steps=16, return_trace=True)  # doctest: +SKIP
    >>> HTML(viz.animation(np.asarray(trace)[:, 0], pipe.tokenizer))  # doctest: +SKIP
  """
  trace_KL = np.asarray(trace_KL)
  if len(trace_KL) > 1 and (trace_KL[-1] == trace_KL[-2]).all():
    trace_KL = trace_KL[:-1]  # no noise was left for the last evaluation to remove
  last_L, mask = trace_KL[-1], tokenizer.mask_id
  start_L = np.where(np.arange(len(last_L)) < given, last_L, mask)
  units, frames, before_L = _units(last_L, tokenizer), [], start_L
  for step, row_L in enumerate([start_L, *trace_KL]):
    known = int(np.sum(row_L != mask))
    note = f"step {step} of {len(trace_KL)}: {known} of {len(row_L)} tokens"
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
    text = tokenizer.decode(row[run[0].start : run[-1].stop])
    runs.append(_TAGS[kind].format(html.escape(text.replace(tokenizer.eos_text, _END))))
  return "".join(runs)
