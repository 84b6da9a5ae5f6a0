# SPDX-License-Identifier: Apache-2.0
"""What the losses of a distillation run on: one network, one process, so many positions at once."""

import dataclasses

from dlm_jax import draw
from dlm_jax.arrays import FloatB, FloatBKD, FloatBKV, FloatBLD, IntBL, KeyB, Params
from dlm_jax.errors import InputError
from dlm_jax.models import DiT
from dlm_jax.process import Absorbing, Uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """A network whose parameters change from call to call, and what it is trained on; static.

  Attributes:
    model: network of all trees.
    process: the forward process; its schedule says what the network is told of a time.
    chunk: positions whose dense [B, chunk, V] arrays are alive at a time; must divide L. None: all.
  """

  model: DiT
  process: Absorbing | Uniform
  chunk: int | None = None

  @property
  def mask_noise(self) -> int:
    """Return the width of the noise that the network may be given with its masks; 0: none."""
    return self.model.config.mask_noise

  def sigma(self, t_B: FloatB) -> FloatB:
    """Return what the network is told of times."""
    return self.process.schedule.sigma(t_B)

  def trunk(
    self,
    params: Params,
    tokens_BL: IntBL,
    t_B: FloatB,
    dropout_B: KeyB | None = None,
    noise_B: KeyB | None = None,
  ) -> FloatBLD:
    """Return hidden states of tokens at their times; dropout, and noise of masks, by their keys."""
    inputs = (tokens_BL, self.sigma(t_B), dropout_B)
    if noise_B is not None:
      masked_BL = tokens_BL == self.process.mask_id
      inputs += (draw.mask_noise(noise_B, masked_BL, self.mask_noise),)
    return self.model.apply({"params": params}, *inputs, method="trunk")

  def body(
    self, params: Params, embedded_BLD: FloatBLD, t_B: FloatB, dropout_B: KeyB | None = None
  ) -> FloatBLD:
    """Return hidden states of embedded tokens, which may be soft."""
    sigma_B = self.sigma(t_B)
    return self.model.apply({"params": params}, embedded_BLD, sigma_B, dropout_B, method="body")

  def embedded(self, params: Params, tokens) -> FloatBKD:
    """Return embeddings of ids or soft tokens, at any positions."""
    return self.model.apply({"params": params}, tokens, method="embedded")

  def head(self, params: Params, hidden_BKD: FloatBKD, t_B: FloatB) -> FloatBKV:
    """Return logits of hidden states at any positions."""
    return self.model.apply({"params": params}, hidden_BKD, self.sigma(t_B), method="head")


def check_time_conditioning(model: DiT) -> None:
  """Raise InputError unless a network is told the time."""
  if not model.config.time_conditioning:
    raise InputError("a uniform process needs model.time_conditioning=True.")
