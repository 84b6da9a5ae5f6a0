# SPDX-License-Identifier: Apache-2.0
"""Loss states of inverse distillation under an absorbing process (MDLM and SEDD teachers).

A loss state z is drawn from the student's prediction p and corrupted to time t. No gradient passes
through that draw: it reaches the student through p alone, where the gradient on its logits is, for
MDLM,

  −(1/t) p (a − ⟨p, a⟩),   a = log p_teacher(· | z) − log p_fake(· | z),

at positions masked in both states and 0 elsewhere.

Under the order "spaced" (see `objectives.orders`) the student's input is masked as a sampler with
that order meets it. The loss state's masks are a prefix of a spaced order as well, another one,
drawn independently over all valid positions: so the fake, too, learns on states of that kind, each
position is masked at time t as often as under "random", which the weight 1/t supposes, and pairs of
a hidden and a revealed token come at all distances. With the input's own order the masks of one
state would hold those of the other, and what is revealed first would hardly ever be scored.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import draw
from dlm_jax.arrays import BoolBL, FloatB, FloatBL, FloatBLD, IntBL, KeyB, Params
from dlm_jax.objectives import orders
from dlm_jax.objectives.batch import Batch, position_weights, split_each, valid_tokens
from dlm_jax.objectives.positions import map_positions
from dlm_jax.objectives.setting import Setting


class HardSample(NamedTuple):
  """What one run of the student leaves for the losses.

  Attributes:
    x_gen: its input, really corrupted data; a prompt's own tokens.
    hidden: its trunk output; the gradient path to the student starts here.
    z: a prediction drawn per position, then corrupted to time t; constant.
    group: positions that are drawn at all, where not every mask is: see `groups`.
  """

  x_gen: IntBL
  hidden: FloatBLD
  z: IntBL
  group: BoolBL | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardStates(Setting):
  """How the losses' states are made and read: see the module.

  Attributes:
    order: "random" or "spaced": which positions are masked together.
    guidance: w of the teacher's, see `guidance`.
  """

  order: str = "random"
  guidance: float = 0.0
  through_inputs: ClassVar[bool] = False  # whether gradients pass through teacher and fake

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
    x_gen_BL, group_BL = self.inputs(batch, rng_gen_B)
    hidden_BLD = self.trunk(params, x_gen_BL, batch["t_gen"], dropout_B, noise_B)

    process, length = self.process, x_gen_BL.shape[1]
    uniform_BL2 = jax.vmap(lambda rng: draw.uniforms(rng, (length,)))(rng_token_B)

    def draw_chunk(hidden, x_gen, uniform):
      logits = self.head(params, hidden, batch["t_gen"])
      token = draw.softmax(process.clean_logits(logits)).draw(uniform)
      return jnp.where(x_gen == process.mask_id, token, x_gen)

    frozen_BLD = jax.lax.stop_gradient(hidden_BLD)
    predicted_BL = map_positions(draw_chunk, (frozen_BLD, x_gen_BL, uniform_BL2), self.chunk)
    z_BL = self.loss_state(x_gen_BL, predicted_BL, group_BL, batch, rng_z_B)
    return HardSample(x_gen_BL, hidden_BLD, jax.lax.stop_gradient(z_BL), group_BL)

  def inputs(self, batch: Batch, rng_B: KeyB) -> tuple[IntBL, BoolBL | None]:
    """Return the student's input, and which of its masks are drawn; None: all."""
    return self._masked(batch["tokens"], batch["t_gen"], batch, rng_B), None

  def loss_state(
    self, x_gen_BL: IntBL, predicted_BL: IntBL, group_BL: BoolBL | None, batch: Batch, rng_B: KeyB
  ) -> IntBL:
    """Return z of the student's input with its masks drawn."""
    del x_gen_BL, group_BL
    return self._masked(predicted_BL, batch["t"], batch, rng_B)

  def _masked(self, tokens_BL, t_B, batch, rng_B):
    return orders.masked(self.order, self.process, rng_B, tokens_BL, valid_tokens(batch), t_B)

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
    each, t_B = zip(trees, dropouts, strict=True), self.told(sample, batch)
    return sample.z, tuple(self.trunk(tree, sample.z, t_B, rng_B) for tree, rng_B in each)

  def told(self, sample: HardSample, batch: Batch) -> FloatB:
    """Return the time that networks are told which read z."""
    del sample
    return batch["t"]

  def weights(self, sample: HardSample, batch: Batch) -> FloatBL:
    """Return weights of positions that make a sum L times a mean over valid tokens.

    In each sequence first, then over sequences, as the reference does.
    """
    return position_weights(batch, sample.z.shape, by_sequence=True)

  def counted(self, sample: HardSample, z_BL: IntBL, batch: Batch) -> BoolBL:
    """Return which positions carry loss."""
    del batch
    return (sample.x_gen == self.process.mask_id) & (z_BL == self.process.mask_id)
