# SPDX-License-Identifier: Apache-2.0
"""Forward corruption processes, one sequence at a time."""

from typing import Any, Protocol, runtime_checkable

from dlm_jax.arrays import FloatL, FloatLV, IntL, RngKey, Scalar
from dlm_jax.process.absorbing import Absorbing
from dlm_jax.process.block import BlockNoise
from dlm_jax.process.gaussian import GaussianDuality
from dlm_jax.process.score import AbsorbingScore
from dlm_jax.process.uniform import Uniform

__all__ = [
  "MASKED",
  "NAMES",
  "Absorbing",
  "AbsorbingScore",
  "BlockNoise",
  "GaussianDuality",
  "Process",
  "Uniform",
  "has_mask",
]

# What configs and config.json call them.
NAMES = {"absorbing": Absorbing, "absorbing_score": AbsorbingScore, "uniform": Uniform}
# Those that replace tokens by a mask.
MASKED = tuple(name for name, kind in NAMES.items() if "mask_id" in kind.__dataclass_fields__)


@runtime_checkable
class Process(Protocol):
  """What turns data into noise, and says what a network's prediction means; 1 = noise, 0 = data.

  Attributes:
    vocab_size: tokens, a mask included.
    schedule: α(t), see `schedules`.
    mask_id: only of one with a mask, see `has_mask`.
  """

  vocab_size: int
  schedule: Any

  def prior(self, rng: RngKey, length: int) -> IntL:
    """Draw a sequence at t = 1."""
    ...

  def corrupt(self, rng: RngKey, x0_L: IntL, t: Scalar) -> IntL:
    """Draw xt given x0."""
    ...

  def log_x0(self, logits_LV: FloatLV, xt_L: IntL) -> FloatLV:
    """Return log p(x0 | xt), normalised."""
    ...

  def nll(self, log_x0_LV: FloatLV, xt_L: IntL, x0_L: IntL, t: Scalar) -> FloatL:
    """Return the integrand of the NELBO, nats per token."""
    ...

  def posterior(self, log_x0_LV: FloatLV, xt_L: IntL, s: Scalar, t: Scalar) -> FloatLV:
    """Return q(xs | xt, x0 ~ p), dense: what samplers are tested against."""
    ...


def has_mask(process: Process | None) -> bool:
  """Tell whether a process replaces tokens by a mask, which then is one of its tokens."""
  return getattr(process, "mask_id", None) is not None
