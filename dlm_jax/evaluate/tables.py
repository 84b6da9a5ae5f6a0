# SPDX-License-Identifier: Apache-2.0
"""Markdown tables that read well as plain text too."""

from collections.abc import Mapping, Sequence


def markdown(
  header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> str:
  """Return a table of cells, padded to common widths.

  Args:
    header: titles.
    rows: as many cells each.
    left: columns aligned to the left; the others are numbers.
  """
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

  def line(cells):
    padded = (
      cell.ljust(width) if i in left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join(padded)} |"

  rules = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
  return "\n".join(map(line, [header, rules, *rows]))


def titled(rows: Sequence[Mapping[str, str]], left: Sequence[int] = (0,)) -> str:
  """Return the table of one row or more, whose cells stand under their titles."""
  return markdown(tuple(rows[0]), [tuple(row.values()) for row in rows], left)
