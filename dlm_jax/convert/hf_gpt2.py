# SPDX-License-Identifier: Apache-2.0
"""Load GPT-2 from a directory in the Hugging Face layout, without torch."""

import contextlib
import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dlm_jax.arrays import Params
from dlm_jax.convert import files
from dlm_jax.errors import InputError
from dlm_jax.models.gpt2 import GPT2, GPT2Config

# Variants of the architecture that would change the numbers. `reorder_and_upcast_attn` would not:
# it reorders a float16 computation, and here everything is float32.
_REQUIRED = {
  "model_type": "gpt2",
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
  "tie_word_embeddings": True,
}
# Causal-mask buffers that old versions of the public code wrote beside the weights.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_TIED = "lm_head.weight"


def load(directory: str | pathlib.Path) -> tuple[GPT2, Params]:
  """Read `config.json` and `model.safetensors` (or its shards) as a network and its parameters.

  Every tensor must be used or explained: causal-mask buffers and a head equal to the embedding
  are explained. Names may or may not start with `transformer.`. Parameters become float32.

  ```python
  model, params = hf_gpt2.load("checkpoints/gpt2-large")
  logits_BLV = model.apply({"params": params}, tokens_BL)
  ```

  Raises:
    InputError: a file is missing or damaged, the architecture differs, or a tensor is missing,
      unexpected or of another shape.
  """
  directory = pathlib.Path(directory)
  model = GPT2(_config(directory / "config.json"))
  expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  with contextlib.ExitStack() as stack:
    tensors = _Tensors(directory, stack)
    params = jax.tree_util.tree_map_with_path(functools.partial(_take, tensors), expected)
    if _TIED in tensors and not np.array_equal(tensors.read(_TIED), params["wte"]["embedding"]):
      raise InputError(f"{directory}: {_TIED} differs from the embedding; only tied heads load.")
    strangers = sorted(name for name in tensors.unread() if not _BUFFER.fullmatch(name))
  if strangers:
    raise InputError(
      f"{directory} holds {len(strangers)} tensors that a GPT-2 has not, e.g. {strangers[0]!r}; "
      "is it a different architecture, or are there more layers than config.json says?"
    )
  return model, params


def _config(path: pathlib.Path) -> GPT2Config:
  given = files.read_json(path)
  for key, value in _REQUIRED.items():
    if given.get(key, value) != value:
      raise InputError(f"{path}: {key}={given[key]!r} is not supported; it must be {value!r}.")
  names = {field.name for field in dataclasses.fields(GPT2Config)}
  try:
    return GPT2Config(**{key: value for key, value in given.items() if key in names})
  except TypeError as error:
    raise InputError(f"{path} is not a GPT-2 configuration: {error}.") from error


def _take(tensors: "_Tensors", path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Return the parameter at `path` of the tree; layers are stacked."""
  *module, name = (entry.key for entry in path)
  name = "bias" if name == "bias" else "weight"  # kernel, scale and embedding are all "weight"
  if module[0] != "h":
    return jnp.asarray(tensors.read(".".join([*module, name]), leaf.shape))
  rest = ".".join([*module[1:], name])
  layers, *shape = leaf.shape
  return jnp.asarray(np.stack([tensors.read(f"h.{i}.{rest}", shape) for i in range(layers)]))


class _Tensors:
  """The tensors of a directory, by name without prefix, read from disk one at a time."""

  def __init__(self, directory: pathlib.Path, stack: contextlib.ExitStack):
    self._directory = directory
    self._where = {}  # name -> (open file, name in it)
    self._read = set()
    for path in files.shards(directory):
      try:
        file = stack.enter_context(safe_open(path, framework="flax"))
      except FileNotFoundError as error:
        raise InputError(f"{path} is missing; fetch the checkpoint again.") from error
      except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}).") from error
      for key in file.keys():  # noqa: SIM118
        name = key.removeprefix("transformer.")
        if name in self._where:
          raise InputError(f"{directory}: tensor {name!r} appears twice.")
        self._where[name] = file, key

  def __contains__(self, name: str) -> bool:
    return name in self._where

  def unread(self) -> set[str]:
    return self._where.keys() - self._read

  def read(self, name: str, shape=None) -> np.ndarray:
    """Return a tensor as float32, checking its shape if one is given."""
    if name not in self._where:
      raise InputError(
        f"{self._directory}: tensor {name!r} is missing; is this a complete GPT-2 checkpoint?"
      )
    file, key = self._where[name]
    tensor = np.asarray(file.get_tensor(key)).astype(np.float32)
    if shape is not None and tensor.shape != tuple(shape):
      raise InputError(
        f"{self._directory}: {name} has shape {tensor.shape}; config.json asks for {tuple(shape)}."
      )
    self._read.add(name)
    return tensor
