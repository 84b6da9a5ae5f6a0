# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in the layout of PEFT, added to the weights of their base when these are read.

A directory with adapter_config.json holds an adapter. Its base lies in the same directory, or is
the one that adapter_config.json names: a directory, one beside the adapter's, or one in the same
cache of Hugging Face.
"""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.convert import files
from dlm_jax.convert.stored import Views
from dlm_jax.errors import InputError

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTORS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
_ENDS = ([], ["weight"], ["default"], ["default", "weight"])  # of a factor's name
# Variants that are no sum of the base and a product; absent means no.
_REFUSED = ("use_dora", "use_qalora", "lora_bias", "layer_replication", "alora_invocation_tokens")
# Starts that change the base as well; what is stored belongs to the changed one.
_STARTS = ("pissa", "olora", "corda", "loftq")


class Place(NamedTuple):
  """Where a network lies.

  Attributes:
    source: directory of config.json and the tokenizer, or the file of the weights.
    weights: directory or file of the weights.
    adapter: directory of what is added to them; None: nothing is.
  """

  source: pathlib.Path
  weights: pathlib.Path
  adapter: pathlib.Path | None = None


def locate(path: pathlib.Path | str) -> Place:
  """Return where the network of a path lies: there, or of an adapter at its base.

  Raises:
    InputError: it is an adapter of a base that is not here.
  """
  path = pathlib.Path(path)
  if not (path / CONFIG).is_file():
    return Place(path, path)
  own = (path / "config.json").is_file()
  if own and _has_weights(path):
    return Place(path, path, path)
  base = _base(path)
  return Place(path if own else base, base, path)


def weights_of(adapter: pathlib.Path) -> pathlib.Path:
  """Return the file of an adapter's tensors.

  Raises:
    InputError: there is none.
  """
  for name in _WEIGHTS:
    if (adapter / name).is_file():
      return adapter / name
  raise InputError(f"{adapter} holds {CONFIG} and no {' or '.join(_WEIGHTS)}; fetch it again.")


def _has_weights(directory):
  try:
    return all(file.is_file() for file in files.find(directory))
  except InputError:
    return False


def _base(adapter):
  name = files.read_json(adapter / CONFIG).get("base_model_name_or_path")
  if not isinstance(name, str) or not name:
    raise InputError(
      f"{adapter / CONFIG} names no base_model_name_or_path; put config.json and the weights of "
      "the base beside it."
    )
  tried = list(dict.fromkeys(_candidates(adapter, name)))
  for directory in tried:
    if (directory / "config.json").is_file():
      return directory
  raise InputError(
    f"{adapter} is an adapter of {name!r}, which is not here (tried "
    f"{', '.join(map(str, tried))}); fetch that, and write its directory into {CONFIG} as "
    "base_model_name_or_path."
  )


def _candidates(adapter, name) -> Iterator[pathlib.Path]:
  yield adapter / name
  yield pathlib.Path(name)
  for place in (adapter.absolute(), adapter.resolve()):
    yield place.parent / pathlib.PurePath(name).name
  for place in (adapter.absolute(), adapter.resolve()):
    for folder in place.parents:
      if folder.name.startswith("models--"):
        yield from _revisions(folder.parent / f"models--{name.replace('/', '--')}")


def _revisions(folder):
  """Yield the snapshots of a network in a cache of Hugging Face, the current one first."""
  current = folder / "refs" / "main"
  if current.is_file():
    yield folder / "snapshots" / current.read_text(encoding="utf-8").strip()
  yield from sorted((folder / "snapshots").glob("*"))


class _Sum:
  """A matrix and what an adapter adds to it; `numpy.asarray` adds it up, float32."""

  dtype = np.dtype(np.float32)

  def __init__(self, base, factors, scale, transposed):
    self._base, self._factors, self._scale = base, factors, scale
    self._transposed, self.shape = transposed, base.shape

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    a, b = (np.asarray(factor).astype(np.float32) for factor in self._factors)
    more = np.float32(self._scale) * (b @ a)
    value = np.asarray(self._base).astype(np.float32) + (more.T if self._transposed else more)
    return value if dtype is None else value.astype(dtype)


def merged(tensors: Mapping[str, Any], adapter: pathlib.Path) -> Mapping[str, Any]:
  """Return tensors of a base with an adapter's products added: W + α/r · B A.

  With use_rslora it is α/√r. Tensors that the adapter keeps whole replace those of the base.

  Args:
    tensors: of the base, by name.
    adapter: directory.

  Raises:
    InputError: the adapter is of another kind, one of its tensors is damaged, has no partner or
      does not fit the base.
  """
  file, config = weights_of(adapter), files.read_json(adapter / CONFIG)
  _check(adapter / CONFIG, config)
  stored, _ = files.read(file)
  made: dict[str, Any] = {name: name for name in tensors}
  pairs: dict[tuple[str, bool], dict[int, str]] = {}
  for name in stored:
    module, factor, embedding = _parse(file, name)
    if factor is not None:
      pairs.setdefault((module, embedding), {})[factor] = name
      continue
    whole = _of_base(tensors, module, file, name)
    _fits(file, name, stored[name].shape, whole, tensors[whole].shape)
    made[whole] = lambda name=name: stored[name]
  for (module, embedding), pair in pairs.items():
    if len(pair) < 2:
      raise InputError(f"{file}: tensor {next(iter(pair.values()))} has no partner, A to B.")
    target = _of_base(tensors, f"{module}.weight", file, pair[0])
    a, b = stored[pair[0]], stored[pair[1]]
    scale = _scale(adapter / CONFIG, config, module, pair[0], a.shape)
    _fits(file, pair[1], b.shape[1:], pair[0], a.shape[:1])
    turned = embedding or bool(config.get("fan_in_fan_out"))
    shape = (*b.shape[:1], *a.shape[1:])
    product = shape[::-1] if turned else shape
    _fits(file, f"{pair[1]} · A", product, target, tensors[target].shape)
    made[target] = lambda target=target, a=a, b=b, scale=scale, turned=turned: _Sum(
      tensors[target], (a, b), scale, turned
    )
  return Views(tensors, made)


def _parse(file, name):
  """Return (module, factor, whether of an embedding), or (name in the base, None, False)."""
  parts = name.removeprefix(_PREFIX).split(".")
  found = next((i for i, part in enumerate(parts) if part in _FACTORS), None)
  if found is None:
    return ".".join(parts), None, False
  if parts[found + 1 :] not in _ENDS:
    raise InputError(f"{file}: tensor {name} is no part of a product B A; only these are added.")
  return ".".join(parts[:found]), _FACTORS[parts[found]], "embedding" in parts[found]


def _fits(file, name, shape, other, expected):
  if tuple(shape) != tuple(expected):
    raise InputError(f"{file}: tensor {name} is {shape}, which does not fit {other}, {expected}.")


def _check(where, config):
  """Refuse adapters that are more than a sum."""
  if config.get("peft_type") != "LORA":
    raise InputError(f"{where}: peft_type={config.get('peft_type')!r}; only 'LORA' is merged.")
  for key in _REFUSED:
    if config.get(key):
      raise InputError(f"{where}: {key}={config[key]!r} is no sum of the base and a product.")
  start = config.get("init_lora_weights")
  if isinstance(start, str) and start.lower().startswith(_STARTS):
    raise InputError(
      f"{where}: init_lora_weights={start!r} changed the base too; save the adapter converted to "
      "plain LoRA, which PEFT does on request."
    )


def _of_base(tensors, name, file, stored):
  """Return the base's name of a tensor; either side may have a prefix more."""
  if name in tensors:
    return name
  near = [x for x in tensors if x.endswith(f".{name}") or name.endswith(f".{x}")]
  if len(near) != 1:
    raise InputError(f"{file}: tensor {stored} is for {name}, which the base does not have.")
  return near[0]


def _scale(where, config, module, name, shape):
  """Return what the product of a module is multiplied by."""
  rank = _of_module(where, config, "rank_pattern", module, config.get("r"))
  alpha = _of_module(where, config, "alpha_pattern", module, config.get("lora_alpha"))
  for key, value in (("r", rank), ("lora_alpha", alpha)):
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
      raise InputError(f"{where}: {key}={value!r} of {module} is no number above 0.")
  if len(shape) != 2 or shape[0] != rank:
    raise InputError(f"{where}: r={rank!r} of {module}, but tensor {name} is {shape}.")
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(where, config, key, module, value):
  """Return a number of a module: of the pattern that its name ends with, else the general one."""
  patterns = config.get(key) or {}
  for pattern in patterns if isinstance(patterns, dict) else (None,):
    if not isinstance(pattern, str) or not re.fullmatch(r"\^?[\w.]+", pattern):
      raise InputError(f"{where}: {key}={patterns!r} is more than names of modules and numbers.")
    bare = pattern.removeprefix("^")
    whole = pattern != bare
    if module == bare or (not whole and module.endswith(f".{bare}")):
      return patterns[pattern]
  return value
