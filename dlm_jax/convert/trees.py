# SPDX-License-Identifier: Apache-2.0
"""Places in a tree of parameters, written a/b/c."""

from typing import Any


def read(tree: Any, path: str) -> Any:
  """Return what lies at a path."""
  for key in path.split("/"):
    tree = tree[key]
  return tree


def write(tree: dict, path: str, value: Any) -> None:
  """Put a value at a path; folders on the way are made."""
  *folders, leaf = path.split("/")
  for key in folders:
    tree = tree.setdefault(key, {})
  tree[leaf] = value
