# SPDX-License-Identifier: Apache-2.0
"""The picture of `oracle`. Imports matplotlib, so it is itself imported only when it draws."""

import pathlib

from matplotlib import rc_context
from matplotlib.figure import Figure

from dlm_jax.evaluate import _labels, _plot

_LEAST = 1e-5  # nats a token: below is noise of this many sequences


def save(rows, path: pathlib.Path, length: int) -> None:
  """Draw nats lost per token against evaluations, a panel per chain, a colour per way.

  Args:
    rows: `oracle.Row`s; those without groups are drawn by their pairs.
    path: of the PNG.
    length: tokens of a sequence.
  """
  names = dict.fromkeys(row.chain for row in rows)
  with rc_context(_plot.STYLE):
    figure = Figure(figsize=(5.5 * len(names), 4.6), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.05)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    ends = []
    for axes, chain in zip(panels, names, strict=True):
      ends.append(_panel(axes, [row for row in rows if row.chain == chain], length))
      _plot.head(axes, f"{chain} chain", "nats lost per token; dashed: KL of neighbours")
    figure.draw_without_rendering()
    for axes, end in zip(panels, ends, strict=True):
      _labels.beside(axes, end)
    figure.savefig(path, format="png")


def _panel(axes, rows, length):
  axes.set(xscale="log", yscale="log", xlabel="evaluations")
  ends = []
  ways = dict.fromkeys(row.name for row in rows)
  for name, (colour, marker) in zip(ways, _plot.styles(), strict=False):
    points = sorted((row for row in rows if row.name == name), key=lambda row: row.evaluations)
    x = [row.evaluations for row in points]
    grouped = points[0].nats is not None
    y = [max(row.nats / length if grouped else row.pairs, _LEAST) for row in points]
    axes.plot(x, y, color=colour, marker=marker, markersize=5, linestyle="-" if grouped else "--")
    ends.append((name, colour, marker, y[-1], True))
  ticks = sorted({row.evaluations for row in rows})
  axes.set_xticks(ticks, [str(tick) for tick in ticks])
  axes.set_ylim(bottom=_LEAST * 0.8)
  return ends
