# SPDX-License-Identifier: Apache-2.0
"""Loss states of inverse distillation under an absorbing process (MDLM and SEDD teachers).

A loss state z is drawn from the student's prediction p and corrupted to time t. No gradient passes
through that draw: it reaches the student through p alone, where the gradient on its logits is, for
MDLM,

  −(1/t) p (a − ⟨p, a⟩),   a = log p_teacher(· | z) − log p_fake(· | z),

at positions masked in both states and 0 elsewhere.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import draw
from dlm_jax.arrays import BoolBL, FloatBLD, IntBL, KeyB, Params
from dlm_jax.objectives.batch import Batch, split_each, valid_tokens
from dlm_jax.objectives.positions import map_positions
from dlm_jax.objectives.setting import Setting


class HardSample(NamedTuple):
  """What one run of the student leaves for the losses.

  Attributes:
    x_gen: its input, really corrupted data; a prompt's own tokens.
    hidden: its trunk output; the gradient path to the student starts here.
    z: a prediction drawn per position, then corrupted to time t; constant.
  """

  x_gen: IntBL
  hidden: FloatBLD
  z: IntBL


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardStates(Setting):
  """How the losses' states are made and read: see the module."""

  through_inputs: ClassVar[bool] = False  # whether gradients pass through teacher and fake
  by_sequence: ClassVar[bool] = True  # whether valid tokens are averaged in each sequence first

  def rollout(
    self, params: Params, batch: Batch, rngs: tuple[KeyB, ...], dropout_B: KeyB | None
  ) -> HardSample:
    """Run the student once on corrupted data and draw the loss state from its prediction.

    Args:
      params: the student's.
      batch: with "tokens", "t" and "t_gen".
      rngs: keys for the student's input and the noise of its masks, for the draw from its
        prediction, for the loss state.
      dropout_B: keys for dropout in the student; None for evaluation.
    """
    rng_gen_B, rng_token_B, rng_z_B = rngs
    noise_B = None
    if self.mask_noise:
      rng_gen_B, noise_B = split_each(rng_gen_B, 2)
    x0_BL, valid_BL, process = batch["tokens"], valid_tokens(batch), self.process
    x_gen_BL = jax.vmap(process.corrupt)(rng_gen_B, x0_BL, batch["t_gen"])
    x_gen_BL = jnp.where(valid_BL, x_gen_BL, x0_BL)
    hidden_BLD = self.trunk(params, x_gen_BL, batch["t_gen"], dropout_B, noise_B)

    length = x0_BL.shape[1]
    uniform_BL2 = jax.vmap(lambda rng: draw.uniforms(rng, (length,)))(rng_token_B)

    def draw_chunk(hidden, x_gen, uniform):
      logits = self.head(params, hidden, batch["t_gen"])
      token = draw.softmax(process.clean_logits(logits)).draw(uniform)
      return jnp.where(x_gen == process.mask_id, token, x_gen)

    frozen_BLD = jax.lax.stop_gradient(hidden_BLD)
    predicted_BL = map_positions(draw_chunk, (frozen_BLD, x_gen_BL, uniform_BL2), self.chunk)
    z_BL = jax.vmap(process.corrupt)(rng_z_B, predicted_BL, batch["t"])
    z_BL = jnp.where(valid_BL, z_BL, x0_BL)
    return HardSample(x_gen_BL, hidden_BLD, jax.lax.stop_gradient(z_BL))

  def read(
    self,
    student: Params,
    sample: HardSample,
    batch: Batch,
    trees: tuple[Params, ...],
    dropouts: tuple[KeyB | None, ...],
  ) -> tuple[IntBL, tuple[FloatBLD, ...]]:
    """Return the loss state z and the trunk output of every tree that reads it."""
    del student
    each = zip(trees, dropouts, strict=True)
    return sample.z, tuple(self.trunk(tree, sample.z, batch["t"], rng_B) for tree, rng_B in each)

  def counted(self, sample: HardSample, z_BL: IntBL, batch: Batch) -> BoolBL:
    """Return which positions carry loss."""
    del batch
    return (sample.x_gen == self.process.mask_id) & (z_BL == self.process.mask_id)
