# SPDX-License-Identifier: Apache-2.0
"""The picture of a frontier. Imports matplotlib, so it is itself imported only when it draws."""

import itertools
import math
import pathlib

import numpy as np
from matplotlib import patheffects, rc_context, ticker
from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9", "#555555")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_INK, _FAINT = "#222222", "#7A7A7A"
_STYLE = {
  "font.size": 10,
  "text.color": _INK,
  "axes.edgecolor": "#B0B0B0",
  "axes.labelcolor": _INK,
  "axes.linewidth": 0.8,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#EBEBEB",
  "grid.linewidth": 0.8,
  "xtick.color": "#B0B0B0",
  "ytick.color": "#B0B0B0",
  "xtick.labelcolor": _INK,
  "ytick.labelcolor": _INK,
  "xtick.minor.bottom": False,
  "ytick.minor.left": False,
}
_HALO = (patheffects.withStroke(linewidth=3, foreground="white"),)


def save(rows, path: pathlib.Path, reference=None, *, x: str = "nfe", title: str = "NFE"):
  """Draw GenPPL and entropy against NFE or another measure, one colour per model; save a PNG."""
  rows = [{**row, "x": _place(row, x)} for row in rows]
  with rc_context(_STYLE):
    figure = Figure(figsize=(11, 4.4), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.05)
    left, right = figure.subplots(1, 2)
    _panel(left, rows, "genppl", "GenPPL", "judge's perplexity, lower is better", reference)
    _panel(right, rows, "entropy", "Entropy", "nats, the nearer to real text the better", reference)
    _widen(left, math.log(2))
    _widen(right, 0.4)
    _log_ticks(left)
    for axes in (left, right):
      axes.set_xlabel(title, labelpad=6)
      _ticks(axes, x, sorted({row["x"] for row in rows}))
    figure.supxlabel(_footnote(rows), fontsize=8, color=_FAINT)
    figure.draw_without_rendering()  # fixes the scales, by which labels are kept apart
    for axes, key in ((left, "genppl"), (right, "entropy")):
      _label_lines(axes, rows, key, reference)
    figure.savefig(path)


def _place(row, x):
  return 1000 * row["seconds"] / row["samples"] if x == "seconds" else row[x]


def _models(rows) -> dict:
  """Return rows by model, in order of appearance, sorted along x."""
  names = dict.fromkeys(row["name"] for row in rows)
  ordered = sorted(rows, key=lambda row: row["x"])
  return {name: [row for row in ordered if row["name"] == name] for name in names}


def _styles():
  # A new marker for every round through the colours: any number of models stays distinct.
  return ((colour, marker) for marker in itertools.cycle(_MARKERS) for colour in _COLOURS)


def _panel(axes, rows, key, title, subtitle, reference):
  for (_, points), (colour, marker) in zip(_models(rows).items(), _styles(), strict=False):
    x, y = [row["x"] for row in points], np.array([row[key] for row in points], float)
    error = np.nan_to_num(np.array([row[f"{key}_se"] for row in points], float))
    axes.errorbar(
      x,
      y,
      yerr=error,
      color=colour,
      marker=marker,
      markersize=5.5,
      linewidth=1.8,
      elinewidth=1.3,
      markeredgecolor="white",
      markeredgewidth=0.8,
      zorder=3,
    )
  axes.set_xscale("log", base=2)
  if key == "genppl":
    axes.set_yscale("log")
  axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24)
  axes.annotate(
    subtitle, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=_FAINT
  )
  axes.tick_params(length=3)
  axes.margins(x=0.04, y=0.1)
  value = _reference_value(reference, key)
  if value is not None:
    axes.axhline(value, color=_FAINT, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)


def _reference_value(reference, key) -> float | None:
  value = reference and getattr(reference, key)
  return value if value is not None and math.isfinite(value) else None


def _ticks(axes, x, values):
  """Label the NFEs that were measured; powers of two of evaluations; round milliseconds."""
  shown = values[:: math.ceil(len(values) / 11)]
  if x == "evaluations":
    powers = [2**k for k in range(math.floor(math.log2(values[-1])) + 1) if 2**k >= values[0]]
    shown = powers if len(powers) > 1 else shown
  axes.xaxis.set_major_locator(ticker.FixedLocator(shown))
  if x == "seconds":
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
  if len(values) == 1:
    axes.set_xlim(values[0] / 2, values[0] * 2)


def _log_ticks(axes):
  """Label a log axis with plain round numbers, more of them on a short range."""
  decades = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
  choices = (
    (0.4, (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)),
    (0.8, (1, 1.5, 2, 3, 4, 5, 7)),
    (1.5, (1, 2, 3, 5)),
    (3.0, (1, 2, 5)),
    (math.inf, (1,)),
  )
  subs = next(subs for limit, subs in choices if decades <= limit)
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
  number = lambda y, _: f"{y:,.0f}" if y >= 1000 else f"{y:.4g}"  # noqa: E731  (not 1e+04)
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(number))
  axes.yaxis.set_minor_locator(ticker.NullLocator())


def _widen(axes, least):
  """Stretch a linear or log axis to a least span: a narrower one makes noise look like a trend."""
  log = axes.get_yscale() == "log"
  low, high = np.log(axes.get_ylim()) if log else axes.get_ylim()
  missing = max(least - (high - low), 0)
  limits = np.array([low - missing / 2, high + missing / 2])
  axes.set_ylim(np.exp(limits) if log else limits)


def _label_lines(axes, rows, key, reference):
  """Write each model's name beside its last point, and the reference's beside its line."""
  ends = []  # (text, colour, weight, x, y)
  for (name, points), (colour, _) in zip(_models(rows).items(), _styles(), strict=False):
    finite = [row for row in points if math.isfinite(row[key])]
    if finite:
      ends.append((name, colour, "bold", finite[-1]["x"], finite[-1][key]))
  value, right = _reference_value(reference, key), max(row["x"] for row in rows)
  if value is not None:
    text = f"{reference.label} {value:.{1 if key == 'genppl' else 2}f}"
    ends.append((text, _FAINT, "normal", right, value))
  for column in _columns(axes, ends):  # names keep apart from those at about the same x
    _label_column(axes, column, halo=column[-1][3] < right)


def _columns(axes, ends, width=75.0):
  """Return ends in groups, of which each begins less than `width` points right of the last."""
  place = lambda end: axes.transData.transform(end[3:])[0] * 72 / axes.figure.dpi  # noqa: E731
  columns = []
  for end in sorted(ends, key=place):
    if columns and place(end) - place(columns[-1][-1]) < width:
      columns[-1].append(end)
    else:
      columns.append([end])
  return columns


def _label_column(axes, ends, halo, gap=13.0):
  points = 72 / axes.figure.dpi  # pixels to points
  heights = [axes.transData.transform((x, y))[1] * points for *_, x, y in ends]
  for end, height, moved in zip(ends, heights, _spread(heights, gap), strict=True):
    text, colour, weight, x, y = end
    axes.annotate(
      text,
      (x, y),
      (15, moved - height),
      textcoords="offset points",
      color=colour,
      va="center",
      fontweight=weight,
      fontsize=9.5,
      annotation_clip=False,
      path_effects=_HALO if halo else None,
    )


def _spread(heights, gap):
  """Return the heights moved as little as possible so that neighbours are `gap` apart.

  Heights that collide merge into a block around their mean.
  """
  order = np.argsort(heights)
  blocks = []  # [mean of the centre, indices from below]
  for i in order:
    blocks.append([heights[i], [i]])
    while len(blocks) > 1:
      (low, below), (high, above) = blocks[-2:]
      if high - low >= gap * (len(below) + len(above)) / 2:
        break
      merged = below + above
      blocks[-2:] = [[float(np.mean([heights[j] for j in merged])), merged]]
  moved = [0.0] * len(heights)
  for centre, members in blocks:
    for rank, i in enumerate(members):
      moved[i] = centre + gap * (rank - (len(members) - 1) / 2)
  return moved


def _footnote(rows) -> str:
  counts = sorted({row["samples"] for row in rows})
  number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
  return f"{number} samples per point; bars are ± one standard error."
