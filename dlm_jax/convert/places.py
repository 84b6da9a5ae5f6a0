# SPDX-License-Identifier: Apache-2.0
"""What a path to a network means: shipped, a workdir's best or final one, a directory, a file."""

import os
import pathlib
import re
from collections.abc import Iterator

from etils import epath

from dlm_jax import remote
from dlm_jax.convert import adapters
from dlm_jax.errors import InputError, hint
from dlm_jax.fields import shown

_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")  # ORGANISATION/NAME


def shipped(path: str) -> str:
  """Resolve "shipped:NAME" to the directory of a network that comes with the package."""
  if not path.startswith("shipped:"):
    return path
  from dlm_jax import assets

  return str(assets.path(path.removeprefix("shipped:")))


def as_path(path: str | os.PathLike) -> pathlib.Path:
  """Return a path; raise InputError for what is none."""
  if not isinstance(path, str | os.PathLike):
    raise InputError(f"path={shown(path)} is not a path; give the directory of a network.")
  return pathlib.Path(path)


def network_directory(path: str) -> pathlib.Path:
  """Return the model directory that a path means: itself, or the best or final one of a workdir.

  Of a remote one it is a copy.

  Raises:
    InputError: there is none.
  """
  folder = epath.Path(shipped(path))
  for candidate in (folder, folder / "best", folder / "final"):
    if any(remote.exists(candidate / name) for name in ("config.json", adapters.CONFIG)):
      return remote.fetch(candidate)
  if not remote.is_remote(path) and not folder.exists():
    raise InputError(f"{path} holds no network: {_absent(path)}")
  raise InputError(
    f"{path} holds no network: expected config.json and model.safetensors in it, in best/ or in "
    "final/."
  )


def _absent(path: str) -> str:
  """Say what else may be meant by the path of nothing: a shipped network, a neighbour, a hub's."""
  from dlm_jax import assets

  shipped_names, absent = assets.names(), "there is no such folder"
  if path in shipped_names:
    return f"{absent}; the shipped network of that name is shipped:{path}."
  here = pathlib.Path(path)
  try:
    beside = [entry.name for entry in here.parent.iterdir() if entry.is_dir()]
  except OSError:
    beside = []
  if near := hint(here.name, beside):
    return f"{absent}{near}; it was looked for in {here.parent.absolute()}."
  if _HUB.fullmatch(path) and (not here.parent.is_dir() or len(here.parts) == 1):
    return (
      f"{absent}, and names of a hub are not read; fetch it, `hf download {path} --local-dir "
      f"{here.name}` (extra hub), and give that folder{hint(path, shipped_names)}."
    )
  return f"{absent}; check the path (looked from {os.getcwd()})."


def find_network(path: str | pathlib.Path) -> pathlib.Path:
  """Return the model directory or file of weights that a path means.

  Raises:
    InputError: there is none.
  """
  as_path(path)
  if remote.is_remote(path) or not pathlib.Path(path).is_file():
    return network_directory(str(path))
  return pathlib.Path(path)


def names(path: pathlib.Path | str) -> Iterator[str]:
  """Yield what a directory may be called: as given, as each link says, as it is, by the cache.

  A cache of Hugging Face keeps a network in models--ORGANISATION--NAME/snapshots/REVISION, to which
  directories are linked: the name is in one of these, and seldom in the last one.
  """
  place = pathlib.Path(path).absolute()
  links = [place]
  while links[-1].is_symlink() and len(links) < 40:
    links.append(links[-1].parent / links[-1].readlink())
  for link in (*links, place.resolve()):
    yield link.name
  for link in (*links, place.resolve()):
    for folder in link.parents:
      if folder.name.startswith("models--"):
        yield folder.name.rpartition("--")[2]
