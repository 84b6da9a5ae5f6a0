# SPDX-License-Identifier: Apache-2.0
"""A network as a folder in the Hugging Face layout: whole or not at all, and as `load` reads it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from etils import epath

from dlm_jax import disk, json_file, remote
from dlm_jax.arrays import Params
from dlm_jax.convert import families, layout
from dlm_jax.convert.network import Network, Weights
from dlm_jax.errors import InputError, check_choice, hint
from dlm_jax.process import Process

_DTYPES = ("float32", "bfloat16")
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt")


@runtime_checkable
class Tokenizer(Protocol):
  """What goes with a network."""

  def save(self, directory: Any) -> None: ...


def save(
  path: epath.PathLike,
  model: Any,
  params: Params,
  proc: Process | None = None,
  *,
  dtype: str | None = None,
  extra: Mapping[str, Any] | None = None,
  block_length: int | None = None,
  beside: Mapping[str, Any] | None = None,
  tokenizer: Tokenizer | None = None,
  shard_bytes: int = layout.SHARD_BYTES,
) -> None:
  """Write a network as `load` reads it: config.json and model.safetensors, or shards.

  The folder appears when it is whole, see `remote.publish`. A network that is there is replaced
  with all that lies beside it; without `tokenizer`, the one that is there stays. What `load` would
  refuse is refused before anything is written.

  Args:
    path: directory, created if needed; gs:// and the like too.
    model: the network.
    params: its parameters.
    proc: forward process; None for an autoregressive network.
    dtype: "float32" or "bfloat16"; None: float32, of a decoder what its parameters are kept in.
    extra: JSON-able facts stored in config.json under "dlm_jax" (tokenizer fingerprint, …);
      "writes" says how the network writes where its family leaves that open.
    block_length: tokens of the blocks that it was trained on, stored as block_size.
    beside: networks with parameters that lie beside it, by name: {"discriminator": critic}.
    tokenizer: saved with it.
    shard_bytes: the most that one file holds; one shard at a time is in memory.

  Raises:
    InputError: there are no checkpoints of such networks; the process or its schedule has no name
      to store, or is missing; parameters are not those of the network, or not finite; a fact is not
      JSON; the place cannot be written or holds something else.
  """
  check_place(path)
  family = families.of(model)
  entries = list(family.entries(model))
  _check_params(model, params)
  if proc is None and family.processes and "none" not in family.processes:
    raise InputError(
      f"a {type(model).__name__} is saved with its process, one of {', '.join(family.processes)}."
    )
  if proc is not None and not family.processes:
    raise InputError(f"a {type(model).__name__} has no process; leave out {proc}.")
  config, extra, beside = family.describe(model, proc), dict(extra or {}), dict(beside or {})
  if dtype is None:
    kept = str(jax.tree.leaves(params)[0].dtype)
    dtype = kept if kept in family.dtypes else "float32"
  check_choice("dtype", dtype, _DTYPES)
  if "process" in extra:
    raise InputError("extra: 'process' is what is stored of `proc`; take another name.")
  extra["writes"] = family.way(proc, extra.get("writes"), "extra")
  for name, network in beside.items():
    extra[name] = _of_beside(name).facts(network)
  config |= {"torch_dtype": dtype, "dlm_jax": {**config.get("dlm_jax", {}), **extra}}
  if block_length is not None:
    config["block_size"] = block_length
  text = _checked(path, family, config, proc)
  with remote.publish(path) as fresh:
    layout.write(fresh, entries, params, dtype=dtype, shard_bytes=shard_bytes)
    for name, network in beside.items():
      _of_beside(name).save(fresh, network)
    if tokenizer is not None:
      tokenizer.save(fresh)
    else:
      _keep_tokenizer(epath.Path(path), fresh)
    (fresh / "config.json").write_text(text, encoding="utf-8")


def save_beside(path: pathlib.Path | str, name: str, network: Any) -> None:
  """Write a network that lies beside another into the directory of that one.

  Args:
    path: directory, with the other network.
    name: what it is: a file of `convert/families/` that exports `BESIDE`.
    network: with its parameters, e.g. a `models.Critic`.

  Raises:
    InputError: there is no such kind, or the directory cannot be written.
  """
  with disk.writing(path):
    _of_beside(name).save(pathlib.Path(path), network)


def check_place(path: epath.PathLike) -> None:
  """Refuse a place for a network where something else is: a file, a link, a folder of other files.

  Raises:
    InputError: there is.
  """
  folder = epath.Path(path)
  if not remote.is_remote(path):
    disk.check_folder(pathlib.Path(path))
  with disk.writing(path):
    there = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
  if there and "config.json" not in there:
    raise InputError(
      f"{path} holds {sorted(there)[0]} and no network that could be replaced; choose another "
      "directory."
    )


def _keep_tokenizer(there: epath.Path, fresh: pathlib.Path) -> None:
  """Copy what is neither weights nor config from the folder that is replaced."""
  for file in there.iterdir() if there.is_dir() else ():
    network = file.name == "config.json" or any(part in file.name for part in _WEIGHTS)
    if not network and not file.is_dir():
      file.copy(fresh / file.name)


def _of_beside(name):
  known = families.beside()
  if name not in known:
    raise InputError(f"beside: {name!r} is unknown{hint(name, known)}; known: {', '.join(known)}.")
  return known[name]


def _check_params(model, params) -> None:
  """Refuse parameters that are not those of a network, in name or in shape."""
  wanted, found = _shapes(layout.param_shapes(model)), _shapes(params)
  for name, shape in wanted.items():
    if name not in found:
      raise InputError(f"parameter {name} of the {type(model).__name__} is missing.")
    if found[name] != shape:
      raise InputError(f"parameter {name} is {found[name]}; the network has {shape}.")
  if strangers := sorted(set(found) - set(wanted)):
    raise InputError(f"parameter {strangers[0]} is unknown; the network has none of that name.")


def _shapes(tree) -> dict[str, tuple[int, ...] | None]:
  """Return shapes by path, a/b/c; None of what is no array."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  return {n: getattr(leaf, "shape", None) for n, (_, leaf) in zip(names, leaves, strict=True)}


def _checked(path, family, config, proc) -> str:
  """Return the text of config.json, once it reads back as what was given."""
  try:
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    config = json_file.parse(text)
  except (TypeError, ValueError, RecursionError) as error:
    raise InputError(
      f"config.json cannot hold what is given in `extra` or `block_length` ({error}); use texts, "
      "finite numbers, and lists and dicts of them."
    ) from error
  given, source = config.get("block_size", 1), pathlib.Path(path)
  if isinstance(given, bool) or not isinstance(given, int) or given < 1:
    raise InputError(f"block_length={given!r} is not a number of tokens; use 1 or more.")
  model, again = family.read(source, config, {})
  network = Network(
    model=model,
    process=again,
    family=family,
    writes=config["dlm_jax"]["writes"],
    source=source,
    config=config,
    weights=Weights(dict),
  )
  _ = network.block_length  # complains
  # A decoder keeps nothing of its process but the mask.
  kept = [p and (getattr(p, "mask_id", None), p.vocab_size) for p in (proc, again)]
  if kept[0] != kept[1]:
    raise InputError(f"the process {proc} would be read back as {again}; it cannot be saved.")
  return text
