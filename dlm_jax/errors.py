# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "the user can fix this", and the nearest match for its message."""

import difflib
from collections.abc import Iterable, Sequence

MOST = 2**31 - 1  # of counts, lengths and ids: arrays are indexed by int32

_LONGEST = 2000  # characters of a line


class InputError(ValueError):
  """Input that cannot be used. Its message is one line: what was asked, got, allowed, what to do.

  Every wrong value that a caller, a flag or a file may give raises it. A plain ValueError is raised
  by readers alone, for whoever opened the file to catch and to name it. The command line prints the
  message and exits with code 2.
  """


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
  """Raise InputError unless the option called `name` is one of those allowed."""
  if given not in allowed:
    near = hint(given, allowed) if isinstance(given, str) else ""
    raise InputError(f"{name}={given!r} is unknown; use one of {', '.join(allowed)}{near}.")


def check_counts(**counts: int) -> None:
  """Raise an InputError that names the first count below 1, or more than arrays have places."""
  for name, count in counts.items():
    if not 1 <= count <= MOST:
      raise InputError(f"{name}={count} must be at {'least 1' if count < 1 else f'most {MOST}'}.")


def one_line(message: str) -> str:
  """Return a message as one line that a terminal shows as it is, cut in its middle if it is long.

  Names and values of files and flags stand in messages: their line ends and control characters are
  written as escapes.

  Args:
    message: any text.
  """
  text = " ".join(message.splitlines())
  if len(text) > _LONGEST:
    text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def hint(name: str, known: Iterable[str]) -> str:
  """Return " (did you mean 'idlm'?)" for the known name nearest to a wrong one, or "" without one.

  Args:
    name: what was asked for.
    known: what there is.
  """
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""
