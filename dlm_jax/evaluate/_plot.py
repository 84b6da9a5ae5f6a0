# SPDX-License-Identifier: Apache-2.0
"""The picture of a frontier. Imports matplotlib, so it is itself imported only when it draws."""

import itertools
import math
import pathlib

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.figure import Figure

from dlm_jax.evaluate import _labels

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9", "#555555")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_INK, _FAINT = "#222222", "#7A7A7A"
STYLE = {
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
_REAL = {"color": _FAINT, "linewidth": 1.2, "linestyle": (0, (5, 3)), "zorder": 2}
_SPAN = {"genppl": math.log(2), "entropy": 0.4}  # the least of an axis


def save(rows, path: pathlib.Path, reference=None, **options) -> None:
  """Save as a PNG what `draw` draws."""
  with rc_context(STYLE):
    draw(rows, reference, **options).savefig(path)


def draw(
  rows, reference=None, *, x: str = "nfe", title: str = "NFE", trade: bool = False
) -> Figure:
  """Draw GenPPL and entropy against NFE or another measure, one colour and marker per model.

  Args:
    rows: of `frontier.sweep`.
    reference: what real text scores; None: it is not drawn.
    x: column of the rows, or "seconds".
    title: of the axis.
    trade: below, also GenPPL against entropy, with the evaluations along the curves.
  """
  rows = [{**row, "x": _place(row, x)} for row in rows]
  figure = Figure(figsize=(11, 9.2 if trade else 4.4), dpi=200, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.05, hspace=0.04)
  above, below = figure.subfigures(2, 1, height_ratios=(4.2, 4.6)) if trade else (figure, None)
  panels = list(above.subplots(1, 2))
  real = {key: _reference_value(reference, key) for key in _SPAN}
  near = ", the nearer to real text the better" if real["entropy"] is not None else ""
  _panel(panels[0], rows, "genppl", real)
  head(panels[0], "GenPPL", "judge's perplexity, lower is better")
  _panel(panels[1], rows, "entropy", real)
  head(panels[1], "Entropy", f"nats{near}")
  for axes in panels:
    axes.set_xlabel(title, labelpad=6)
    _ticks(axes, x, sorted({row["x"] for row in rows}))
  if trade:
    panels.append(below.subplots())
    _trade(panels[2], rows, real)
  figure.supxlabel(_footnote(rows), fontsize=8, color=_FAINT)
  figure.draw_without_rendering()  # fixes the scales, by which labels are kept apart
  for axes, key in zip(panels, ("genppl", "entropy", "genppl"), strict=False):
    _labels.beside(axes, _ends(rows, key, reference))
  if trade:
    figure.draw_without_rendering()  # makes room for the labels
    figure.set_layout_engine("none")
    _labels.along(panels[2], _numbers(rows))
  return figure


def _place(row, x):
  return 1000 * row["seconds"] / row["samples"] if x == "seconds" else row[x]


def _models(rows) -> dict:
  """Return rows by model, in order of appearance, sorted along x."""
  names = dict.fromkeys(row["name"] for row in rows)
  ordered = sorted(rows, key=lambda row: row["x"])
  return {name: [row for row in ordered if row["name"] == name] for name in names}


def styles():
  """Yield a colour and a marker: of seven and of six, so that 42 models stay distinct."""
  return zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)


def _drawn(rows):
  """Yield (rows, colour, marker, whether an earlier model has a point of it too) by model."""
  seen = []
  for points, (colour, marker) in zip(_models(rows).values(), styles(), strict=False):
    places = [(row["x"], row["genppl"], row["entropy"]) for row in points]
    hidden = any(np.allclose(place, other) for place in places for other in seen)
    seen += places
    yield points, colour, marker, hidden


def _curve(axes, x, y, error, colour, marker, hidden) -> None:
  """Draw a model's points; where an earlier model's are the same, both can be seen."""
  look = {"markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.8, "linestyle": "-"}
  if hidden:
    look = {"markersize": 10, "markeredgecolor": colour, "markeredgewidth": 1.4}
    look |= {"markerfacecolor": "none", "linestyle": (0, (2.5, 2.5))}
  axes.errorbar(
    x,
    y,
    yerr=error,
    color=colour,
    marker=marker,
    linewidth=1.8,
    elinewidth=1.3,
    zorder=3,
    **look,
  )


def _panel(axes, rows, key, real):
  """Draw one measure against x."""
  for points, *look in _drawn(rows):
    error = np.nan_to_num(np.array([row[f"{key}_se"] for row in points], float))
    y = np.array([row[key] for row in points], float)
    _curve(axes, [row["x"] for row in points], y, error, *look)
  axes.set_xscale("log", base=2)
  axes.margins(x=0.04, y=0.1)
  if real[key] is not None:
    axes.axhline(real[key], **_REAL)
  _scale(axes, key)


def _scale(axes, key):
  if key == "genppl":
    axes.set_yscale("log")
  _widen(axes, _SPAN[key])
  if key == "genppl":
    _log_ticks(axes)


def _trade(axes, rows, real):
  """Draw GenPPL against entropy, a model's points in the order of their evaluations."""
  for points, *look in _drawn(rows):
    x, y = (np.array([row[key] for row in points], float) for key in ("entropy", "genppl"))
    _curve(axes, x, y, np.nan_to_num(np.array([row["genppl_se"] for row in points])), *look)
  axes.margins(x=0.06, y=0.1)
  if real["genppl"] is not None:
    axes.axhline(real["genppl"], **_REAL)
  if real["entropy"] is not None:
    axes.axvline(real["entropy"], **_REAL)
  _scale(axes, "genppl")
  low, high = axes.get_xlim()
  missing = max(_SPAN["entropy"] / 2 - (high - low), 0)
  axes.set_xlim(low - missing / 2, high + missing / 2)
  cross = ", real text where the dashed lines meet" if None not in real.values() else ""
  head(axes, "GenPPL against entropy", f"down is better, left is narrower{cross}")
  axes.set_xlabel("entropy, nats; numbers are evaluations made per sample", labelpad=6)


def _numbers(rows):
  """Return the evaluations of every point; those of few and of many first."""
  found = []
  for points, colour, _, _ in _drawn(rows):
    finite = [row for row in points if math.isfinite(row["genppl"])]
    ranks = [min(i, len(finite) - 1 - i) for i in range(len(finite))]
    found += [(rank, colour, row) for rank, row in zip(ranks, finite, strict=True)]
  found.sort(key=lambda one: one[0])
  return [
    (f"{row['evaluations']:g}", colour, row["entropy"], row["genppl"]) for _, colour, row in found
  ]


def head(axes, title, subtitle):
  """Write a title and a line below it."""
  axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24)
  axes.annotate(
    subtitle, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", color=_FAINT
  )
  axes.tick_params(length=3)


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


def _ends(rows, key, reference):
  """Return what stands beside a panel: each model at its last value, and real text at its line."""
  names, ends = list(_models(rows)), []
  for name, (points, colour, marker, _) in zip(names, _drawn(rows), strict=True):
    finite = [row for row in points if math.isfinite(row[key])]
    if finite:
      ends.append((name, colour, marker, finite[-1][key], True))
  value = _reference_value(reference, key)
  if value is not None:
    text = f"{reference.label} {value:.{1 if key == 'genppl' else 2}f}"
    ends.append((text, _FAINT, "", value, False))
  return ends


def _footnote(rows) -> str:
  counts = sorted({row["samples"] for row in rows})
  number = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
  measures = {"genppl_se": "GenPPL", "entropy_se": "entropy"}
  known = [text for key, text in measures.items() if any(math.isfinite(row[key]) for row in rows)]
  of = f" of {known[0]}" if len(known) == 1 else ""
  bars = f"; bars{of} are ± one standard error, unseen where the mark is larger" if known else ""
  return f"{number} samples per point{bars}."
