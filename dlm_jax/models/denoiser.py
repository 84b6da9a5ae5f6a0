# SPDX-License-Identifier: Apache-2.0
"""A network together with its parameters, as a pytree."""

from typing import Any

import flax.struct
import jax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from dlm_jax.arrays import FloatB, FloatBKD, FloatBKV, FloatBLD, FloatBLV, Params
from dlm_jax.mesh import batch_axes, by_compiler
from dlm_jax.models.exported import exportable


@exportable
@flax.struct.dataclass
class Denoiser:
  """Bind a network to parameters; may be an argument of a jitted function.

  Of one stored by `jax.export` too, which needs the package flatbuffers for that: see `exported`.

  Where a mesh with explicit axes is in force the compiler shards what is inside, and the result is
  split as batches are: see `mesh.by_compiler`. `model.apply` alone leaves that to you.

  Attributes:
    model: a network as `protocols.Denoiser` has it; static.
    params: its parameters; the only leaves.
  """

  model: Any = flax.struct.field(pytree_node=False)
  params: Params = None

  def __call__(self, tokens, sigma_B: FloatB) -> FloatBLV:
    """Return float32 logits for ids [B, L] or soft tokens [B, L, V]."""
    return self._apply(tokens, sigma_B)

  @property
  def mask_noise(self) -> int:
    """Return the width N of the Gaussian noise that masks are given in sampling; 0: none."""
    return getattr(getattr(self.model, "config", None), "mask_noise", 0)

  def trunk(self, tokens, sigma_B: FloatB, noise_BLN: Any = None) -> FloatBLD:
    """Return the hidden states that `head` reads; noise is float [B, L, N], 0 but at masks."""
    if noise_BLN is None:
      return self._apply(tokens, sigma_B, method="trunk")
    return self._apply(tokens, sigma_B, None, noise_BLN, method="trunk")

  def head(self, hidden_BKD: FloatBKD, sigma_B) -> FloatBKV:
    """Return float32 logits of hidden states at any positions."""
    return self._apply(hidden_BKD, sigma_B, method="head")

  def _apply(self, x, *given, **options):
    run = lambda params, *inputs: self.model.apply({"params": params}, *inputs, **options)  # noqa: E731
    rows = PartitionSpec(batch_axes(x.shape[0]) or None)
    return by_compiler(run, rows)(self.params, x, *given)

  def cast(self, dtype: DTypeLike) -> "Denoiser":
    """Return a copy with matrices in `dtype`: a sampling loop then casts them once, not per step.

    What enters float32 arithmetic stays float32: embeddings, norms, biases, the time network.
    """

    def cast(path, x):
      keys = [entry.key for entry in path]
      matrix = keys[-1] == "kernel" and not {"time", "modulation"} & set(keys)
      return x.astype(dtype) if matrix else x

    return self.replace(params=jax.tree_util.tree_map_with_path(cast, self.params))

  def aligned(self) -> "Denoiser":
    """Return a copy with the vocabulary head padded, where a GPU wants that, for a loop's sake.

    Any evaluation would pad it, to the same effect, and a compiler leaves that inside the loop: see
    `layers.padded`. For inside a jitted function; a network without a method `aligned` stays as is.
    """
    align = getattr(self.model, "aligned", None)
    return self if align is None else self.replace(params=align(self.params))
