# SPDX-License-Identifier: Apache-2.0
"""Who owns what is read from disk."""

from collections.abc import Callable
from typing import Any


class Weights:
  """Own what is read from disk: once, when first asked for, until `free`.

  Example:
    >>> weights = Weights(lambda: 3)
    >>> weights.read(), weights.held
    (3, True)
  """

  def __init__(self, reader: Callable[[], Any]):
    self._reader, self._content = reader, []

  @property
  def held(self) -> bool:
    """Whether they are in memory."""
    return bool(self._content)

  def read(self) -> Any:
    """Return them.

    Raises:
      InputError: a tensor is missing, unknown, misshapen or unreadable.
    """
    if not self._content:
      self._content.append(self._reader())
    return self._content[0]

  def free(self) -> None:
    """Let them go; asked again they are read again."""
    self._content.clear()

  def __repr__(self) -> str:
    return f"Weights({'in memory' if self._content else 'not read'})"
