# SPDX-License-Identifier: Apache-2.0
"""`GPT2`: the public judge."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dlm_jax import fields
from dlm_jax.convert import layout
from dlm_jax.convert.family import Family
from dlm_jax.convert.layout import Entry
from dlm_jax.errors import InputError
from dlm_jax.models import GPT2, GPT2Config

# Variants of the architecture that would change the numbers. `reorder_and_upcast_attn` would not:
# it reorders a float16 computation, and here everything is float32.
_REQUIRED = {
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
  "tie_word_embeddings": True,
}
_PREFIX = "transformer."  # or absent
# Causal-mask buffers that old versions of the public code wrote beside the weights.
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_TIED = "lm_head.weight"


def read(
  source: pathlib.Path, config: dict[str, Any], overrides: dict[str, Any]
) -> tuple[GPT2, None]:
  """Build the network that a config describes; it has no process, and no choice of dtype.

  Raises:
    InputError: the architecture differs, or a field cannot be chosen.
  """
  where = f"{source.parent if source.is_file() else source}/config.json"
  if strange := sorted(set(overrides) - {"dtype"}):  # published numbers are float32: no products
    raise InputError(f"{where}: {strange[0]} is no choice of a GPT-2.")
  for key, value in _REQUIRED.items():
    if config.get(key, value) != value:
      given = fields.shown(config[key])
      raise InputError(f"{where}: {key}={given} is not supported; it must be {value!r}.")
  ours = dataclasses.fields(GPT2Config)
  given = {field.name: fields.annotated(field.type) for field in ours if field.name in config}
  try:
    return GPT2(GPT2Config(**fields.read("", config, given))), None
  except ValueError as error:
    raise InputError(f"{where}: {error}") from None


def describe(model: GPT2, proc: None) -> dict[str, Any]:
  """Return the config.json of a network."""
  del proc
  fields = dataclasses.asdict(model.config)
  return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **fields, **_REQUIRED}


def entries(model: GPT2) -> Iterator[Entry]:
  """Yield where tensors lie; our names are the public ones, with the layers stacked."""
  for path, _ in jax.tree_util.tree_leaves_with_path(layout.param_shapes(model)):
    *module, name = (entry.key for entry in path)
    public = "bias" if name == "bias" else "weight"  # kernel, scale and embedding: all "weight"
    ours = "/".join([*module, name])
    if module[0] != "h":
      yield Entry(_PREFIX + ".".join([*module, public]), ours)
      continue
    for layer in range(model.config.n_layer):
      yield Entry(f"{_PREFIX}h.{layer}." + ".".join([*module[1:], public]), ours, (layer,))


def match(model: GPT2, tensors: Mapping[str, Any], source: pathlib.Path | str) -> dict[str, Any]:
  """Return the tensors by public name; causal masks and a head equal to the embedding go.

  Raises:
    InputError: a tensor is missing, unexpected, misshapen or there twice, or the head is untied.
  """
  stored: dict[str, str] = {}
  for name in tensors:
    bare = name.removeprefix(_PREFIX)
    if bare in stored:
      raise InputError(f"{source}: tensor {bare!r} appears twice.")
    stored[bare] = name
  wanted = layout.public_shapes(entries(model), layout.param_shapes(model))
  found = {}
  for name, shape in wanted.items():
    bare = name.removeprefix(_PREFIX)
    if bare not in stored:
      said = layout.absent(bare, stored.values()).replace(bare, repr(bare), 1)
      raise InputError(f"{source}: {said[:-1]}; is this a complete GPT-2 checkpoint?")
    found[name] = tensors[stored.pop(bare)]
    if found[name].shape != shape:
      raise InputError(
        f"{source}: {bare} has shape {found[name].shape}; config.json asks for {shape}."
      )
  embedding = found[f"{_PREFIX}wte.weight"]
  if _TIED in stored and not np.array_equal(tensors[stored.pop(_TIED)], embedding):
    raise InputError(f"{source}: {_TIED} differs from the embedding; only tied heads load.")
  strangers = sorted(bare for bare in stored if not _BUFFER.fullmatch(bare))
  if strangers:
    raise InputError(
      f"{source} holds {len(strangers)} tensors that a GPT-2 has not, e.g. {strangers[0]!r}; "
      "is it a different architecture, or are there more layers than config.json says?"
    )
  return found


FAMILY = Family(
  model_types=("gpt2",),
  network=GPT2,
  read=read,
  describe=describe,
  entries=entries,
  match=match,
  own_tokenizer=True,
)
