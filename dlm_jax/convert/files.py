# SPDX-License-Identifier: Apache-2.0
"""Find the weights of a model directory and read them by name."""

import pathlib
from collections.abc import Mapping
from typing import Any

from safetensors.flax import save_file

from dlm_jax import json_file
from dlm_jax.convert import stored, torch_file
from dlm_jax.convert.tensors import Tensors
from dlm_jax.errors import InputError

_TORCH = (".bin", ".ckpt", ".pt", ".pth")


def find(path: pathlib.Path | str) -> list[pathlib.Path]:
  """Return the files that hold the weights.

  Args:
    path: the file itself, or a directory. There, the first of these counts: model.safetensors, its
      shards, pytorch_model.bin, its shards, the only *.ckpt.

  Raises:
    InputError: there is none, or there are several *.ckpt.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return [path]
  for name in ("model.safetensors", "pytorch_model.bin"):
    files = shards(path, name)
    if files[0].name != name or files[0].is_file():
      return files
  checkpoints = sorted(path.glob("*.ckpt"))
  if len(checkpoints) > 1:
    names = ", ".join(file.name for file in checkpoints)
    raise InputError(f"{path} holds several checkpoints ({names}); give the path of one.")
  if not checkpoints:
    raise InputError(
      f"{path / 'model.safetensors'} cannot be read: there is none, and no shards, "
      "pytorch_model.bin, shards of that or *.ckpt instead."
    )
  return checkpoints


def read(
  path: pathlib.Path | str, config: Mapping[str, Any] | None = None
) -> tuple[Mapping[str, Any], list[Any] | None]:
  """Return the tensors by name and, if a Lightning checkpoint keeps one, their moving average.

  They are read when `numpy.asarray` asks for them: safetensors are mapped from disk. Everything
  else in a checkpoint (optimiser, callbacks, loops, hyper-parameters, averages of other networks)
  is the state of its training and is not read. What wrappers of a module put into names is taken
  out, and eight-bit floats are multiplied by the scales beside them; see `stored`.

  Args:
    path: as for `find`.
    config: config.json, which may say how eight-bit floats are scaled.

  Raises:
    InputError: a file is missing, damaged, unsafe or of another kind, two tensors have one name, or
      one of eight bits has no scale.
  """
  files, average = find(path), None
  if files[0].suffix in _TORCH:
    tensors, average = _read_torch(files)
  elif files[0].suffix == ".safetensors":
    tensors = Tensors(files)
  else:
    raise InputError(f"{files[0]}: weights are *.safetensors or {', '.join(_TORCH)}.")
  source = files[0] if len(files) == 1 else path
  return stored.dequantised(stored.unwrapped(tensors, source), source, config), average


def write(file: pathlib.Path, tensors: Mapping[str, Any]) -> None:
  """Write tensors to a file that is there as a whole or not at all."""
  temporary = file.with_name(file.name + ".tmp")
  try:
    save_file(dict(tensors), str(temporary), metadata={"format": "pt"})
    temporary.chmod(0o644)  # the library writes it readable by its owner only
    temporary.replace(file)
  finally:
    temporary.unlink(missing_ok=True)


def _read_torch(files):
  tensors, average, where = {}, None, {}
  for file in files:
    found, average = _read_one(file)
    for name in found:
      if name in tensors:
        raise InputError(f"{file}: tensor {name} is in {where[name].name} as well.")
      tensors[name], where[name] = found[name], file
  return tensors, average if len(files) == 1 else None


def _read_one(file):
  content = torch_file.read(file)
  if not isinstance(content, Mapping):
    raise InputError(f"{file} holds a {type(content).__name__}, not tensors by name.")
  tensors = content.get("state_dict", content)
  if not isinstance(tensors, Mapping) or not tensors:
    raise InputError(f"{file} holds no tensors by name.")
  for name, value in tensors.items():
    if not isinstance(name, str) or not isinstance(value, torch_file.Tensor):
      raise InputError(f"{file}: {name!r} is no tensor; expected tensors by name or a state_dict.")
  average = content.get("ema") if tensors is not content else None
  if average is None:
    return tensors, None
  average = average.get("shadow_params") if isinstance(average, Mapping) else None
  if not isinstance(average, list) or not all(isinstance(x, torch_file.Tensor) for x in average):
    raise InputError(f"{file}: its ema has no list of tensors shadow_params.")
  return tensors, average


def shards(directory: pathlib.Path, name: str = "model.safetensors") -> list[pathlib.Path]:
  """Return a file of weights, or the files that its index names; the former may be missing."""
  single, index = directory / name, directory / f"{name}.index.json"
  if single.exists() or not index.exists():
    return [single]
  names = read_json(index).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise InputError(f"{index} has no weight_map; fetch the checkpoint again.")
  for name in names.values():
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise InputError(f"{index} names {name!r}; shards must lie beside it.")
    if pathlib.PurePath(name).suffix != single.suffix:
      raise InputError(f"{index} names {name!r}; its shards are *{single.suffix}.")
  return [directory / name for name in sorted(set(names.values()))]


def read_json(path: pathlib.Path) -> dict:
  """Return a JSON object of a model directory.

  Raises:
    InputError: it is missing, unreadable or something else.
  """
  try:
    return json_file.read_object(path)
  except OSError as error:
    raise InputError(
      f"{path} cannot be read ({error.strerror}); give a directory that holds config.json and "
      "model.safetensors."
    ) from error
  except ValueError as error:
    raise InputError(f"{path} is not valid JSON ({error}); fetch it again.") from error
