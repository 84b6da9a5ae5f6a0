# SPDX-License-Identifier: Apache-2.0
"""Where words stand in a picture: beside the axes, or along curves where no line strikes them."""

import numpy as np
from matplotlib import path, transforms
from matplotlib.lines import Line2D

_GAP = 13.0  # points from label to label
_SIZE = 9.5
# Where a number may stand beside its point: points right and up, the best first.
_PLACES = [
  (radius * x, radius * y)
  for radius in (10.0, 15.0, 21.0)
  for x, y in ((0, 1), (0, -1), (1, 0.5), (-1, -0.5), (-1, 0.5), (1, -0.5), (1, 0), (-1, 0))
]


def beside(axes, ends) -> None:
  """Write labels right of the axes, where no curve is, each at about the height of its end.

  Args:
    axes: drawn once, so that its scales are fixed.
    ends: (text, colour, marker or "", height in data, bold) of each.
  """
  points = 72 / axes.figure.dpi  # pixels to points
  box = axes.get_window_extent()
  heights = [axes.transData.transform((1, y))[1] * points for *_, y, _ in ends]
  room = (box.y0 * points, box.y1 * points)
  for end, height, moved in zip(ends, heights, fitted(heights, room), strict=True):
    text, colour, marker, y, bold = end
    across = axes.get_yaxis_transform()  # x in axes, y in data
    shift = (moved - height) / 72
    place = across + transforms.ScaledTranslation(11 / 72, shift, axes.figure.dpi_scale_trans)
    if marker:
      mark = Line2D([1], [y], marker=marker, color=colour, markersize=5.5, transform=place)
      mark.set_clip_on(False)
      axes.add_artist(mark)
    axes.annotate(
      text,
      (1, y),
      (19, moved - height),
      xycoords=across,
      textcoords="offset points",
      color=colour,
      va="center",
      fontweight="bold" if bold else "normal",
      fontsize=_SIZE,
      annotation_clip=False,
    )


def fitted(heights, room):
  """Return heights spread within a room, closer where it is too small for all."""
  low, high = room
  gap = min(_GAP, (high - low) / max(len(heights), 1))
  moved = np.array(spread(heights, gap), float)
  order = np.argsort(moved, kind="stable")
  for rank, i in enumerate(order):  # from below, then from above
    moved[i] = max(moved[i], low + gap * (rank + 0.5))
  for rank, i in enumerate(order[::-1]):
    moved[i] = min(moved[i], high - gap * (rank + 0.5))
  return moved.tolist()


def spread(heights, gap):
  """Return the heights moved as little as possible so that neighbours are `gap` apart.

  Heights that collide merge into a block around their mean.
  """
  order = np.argsort(heights, kind="stable")
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


def along(axes, numbers) -> None:
  """Write numbers beside points of curves; one that anything would strike is left out.

  Args:
    axes: placed for good, all lines in it.
    numbers: (text, colour, x, y) of each, the most telling first.
  """
  inside, taken = axes.get_window_extent(), _marks(axes)
  for text, colour, x, y in numbers:
    note = axes.annotate(
      text,
      (x, y),
      (0, 0),
      textcoords="offset points",
      color=colour,
      ha="center",
      va="center",
      fontsize=8,
    )
    for place in _PLACES:
      note.xyann = place
      box = note.get_window_extent().padded(1.5)
      fits = inside.x0 < box.x0 < box.x1 < inside.x1 and inside.y0 < box.y0 < box.y1 < inside.y1
      if fits and not any(box.overlaps(other) for other in taken) and not struck(axes, box):
        taken.append(box)
        break
    else:
      note.remove()


def _marks(axes):
  """Return the boxes of all markers."""
  boxes = []
  for line in axes.lines:
    half = (line.get_markersize() / 2 + 2) * axes.figure.dpi / 72
    for x, y in line.get_transform().transform(line.get_xydata()):
      boxes.append(transforms.Bbox([[x - half, y - half], [x + half, y + half]]))
  return boxes


def struck(axes, box) -> bool:
  """Return whether a line of the axes, or an error bar, runs through a box of pixels."""
  drawn = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
  for bars in axes.collections:
    drawn += [path.Path(axes.transData.transform(bar)) for bar in bars.get_segments() if len(bar)]
  return any(one.intersects_bbox(box, filled=False) for one in drawn)
