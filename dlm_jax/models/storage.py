# SPDX-License-Identifier: Apache-2.0
"""How the parameters of a decoder are kept; the function they compute is the same.

stacked  one array per kind of weight for all layers, looped over by `nn.scan`: for training and
         for files.
layers   one array per layer, looped over in Python. Decoding one row reads every weight once per
         pass and does next to nothing else; a scan, or XLA's slices of a stack, may copy each
         layer's weights first, which reads them twice and writes them once.
fused    as layers, with queries, keys and values in one matrix and gate and up in another: fewer,
         larger products.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlm_jax.arrays import Params
from dlm_jax.errors import InputError

STORAGES = ("stacked", "layers", "fused")
# Name of the fused matrix and its parts, by the module that holds them.
_FUSED = {"attention": ("qkv", ("q", "k", "v")), "mlp": ("gate_up", ("gate", "up"))}


def default_storage() -> str:
  """Return what decoding takes unless told: "stacked" on CPU, which compiles fastest; "fused"."""
  return "stacked" if jax.default_backend() == "cpu" else "fused"


class Layers(nn.Module):
  """A stack of blocks, looped over in Python; called as `scan_layers` is.

  Attributes:
    block: see `scan_layers`.
    config: its only field; read for `layers`.
  """

  block: type[nn.Module]
  config: Any

  @nn.compact
  def __call__(self, x, own, *shared):
    """Return x after all layers, and what they put out, stacked."""
    outs = []
    for layer in range(self.config.layers):
      mine = jax.tree.map(lambda a, layer=layer: a[layer], own)
      x, out = self.block(self.config, name=str(layer))(x, mine, *shared)
      outs.append(out)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def regroup(model: Any, params: Params, storage: str, *, consume: bool = False):
  """Return a decoder and its parameters, kept otherwise.

  Args:
    model: a `Decoder` whose parameters are stacked.
    params: its parameters, arrays of any dtype.
    storage: see the module; "stacked" returns what was given, as does a network that knows no
      other.
    consume: free each stacked array as soon as its layers exist, so that memory holds the
      parameters once and their largest array twice. `params` cannot be used afterwards.

  Raises:
    InputError: the storage is unknown, or the parameters are not stacked.
  """
  if not hasattr(model.config, "storage"):
    return model, params
  if model.config.storage != "stacked":
    raise InputError(f"parameters are kept as {model.config.storage!r} already; give stacked ones.")
  regrouped = model.clone(config=dataclasses.replace(model.config, storage=storage))
  if storage == "stacked":
    return model, params
  layers = [{} for _ in range(model.config.layers)]
  _split(params["blocks"], layers, storage == "fused", consume)
  blocks = {str(number): layer for number, layer in enumerate(layers)}
  return regrouped, {**params, "blocks": blocks}


def _split(stacked, layers, fuse, consume):
  """Write the slices of a stacked tree into one tree per layer."""
  for name, value in stacked.items():
    if not isinstance(value, dict):
      for layer, part in zip(layers, _slices((value,), len(layers)), strict=True):
        layer[name] = part
      _free((value,), consume)
      continue
    folders = [layer.setdefault(name, {}) for layer in layers]
    if fuse and name in _FUSED:
      joint, parts = _FUSED[name]
      matrices = tuple(value[part]["kernel"] for part in parts)
      for folder, matrix in zip(folders, _slices(matrices, len(layers)), strict=True):
        folder[joint] = {"kernel": matrix}
      _free(matrices, consume)
      value = {key: tree for key, tree in value.items() if key not in parts}
    _split(value, folders, fuse, consume)


@functools.partial(jax.jit, static_argnums=1)
def _slices(stacks, count):
  """Return the layers of one stack, or of several, joined along their columns."""
  return tuple(jnp.concatenate([s[i] for s in stacks], axis=-1) for i in range(count))


def _free(values, consume):
  if consume:
    jax.block_until_ready(values)
    for value in values:
      value.delete()
