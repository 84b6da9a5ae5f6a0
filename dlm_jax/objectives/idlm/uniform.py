# SPDX-License-Identifier: Apache-2.0
"""Loss states of inverse distillation under a uniform process (Duo teachers).

The state is Gaussian, w = α̃ p + σ̃ ξ, with hard token z = argmax w. Teacher and fake read the soft
input w/τ, so gradients reach the student by two paths: through its prediction p in the loss, and
through w in the networks' inputs. Training without the second one is reported to diverge.
"""

import dataclasses
from typing import ClassVar, NamedTuple

from dlm_jax.arrays import BoolBL, FloatB, FloatBL, FloatBLD, IntBL, KeyB, Params
from dlm_jax.objectives.batch import Batch, position_weights, valid_tokens
from dlm_jax.objectives.gaussian_states import Noising, Relaxation, embed_data, embed_predictions
from dlm_jax.objectives.setting import Setting


class SoftSample(NamedTuple):
  """What one run of the student leaves for the losses.

  Attributes:
    x_gen: the argmax of its soft input, really diffused data; a prompt's own tokens.
    hidden: its trunk output; the gradient path to the student starts here.
    rng_noise: keys of the loss state's noise: it is made from the prediction where it is read.
  """

  x_gen: IntBL
  hidden: FloatBLD
  rng_noise: KeyB


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftStates(Setting):
  """How the losses' states are made and read: see the module.

  Attributes:
    relaxation: how states are made soft.
  """

  relaxation: Relaxation
  through_inputs: ClassVar[bool] = True  # whether gradients pass through teacher and fake
  guidance: ClassVar[float] = 0.0  # there is no state of nothing

  def rollout(
    self, params: Params, batch: Batch, rngs: tuple[KeyB, ...], dropout_B: KeyB | None
  ) -> SoftSample:
    """Run the student once on diffused data; arguments as for `HardStates.rollout`."""
    rng_gen_B, _, rng_noise_B = rngs
    given = Noising(batch["tokens"], rng_gen_B, batch["t_gen"], valid_tokens(batch))
    x_gen_BL, embedded_BLD = embed_data(params, given, setting=self, relaxation=self.relaxation)
    hidden_BLD = self.body(params, embedded_BLD, batch["t_gen"], dropout_B)
    return SoftSample(x_gen_BL, hidden_BLD, rng_noise_B)

  def read(
    self,
    student: Params,
    sample: SoftSample,
    batch: Batch,
    trees: tuple[Params, ...],
    dropouts: tuple[KeyB | None, ...],
  ) -> tuple[IntBL, tuple[FloatBLD, ...]]:
    """Return the loss state's tokens z and the trunk output of every tree that reads it."""
    z_BL, inputs = embed_predictions(
      lambda hidden_BKD: self.head(student, hidden_BKD, batch["t_gen"]),
      (sample.hidden,),
      trees,
      Noising(sample.x_gen, sample.rng_noise, batch["t"], valid_tokens(batch)),
      setting=self,
      relaxation=self.relaxation,
    )
    each = zip(trees, inputs, dropouts, strict=True)
    return z_BL, tuple(self.body(tree, x_BLD, batch["t"], rng_B) for tree, x_BLD, rng_B in each)

  def told(self, sample: SoftSample, batch: Batch) -> FloatB:
    """Return the time that networks are told which read the loss state."""
    del sample
    return batch["t"]

  def weights(self, sample: SoftSample, batch: Batch) -> FloatBL:
    """Return weights of positions that make a sum L times a mean over all valid tokens.

    Over the whole batch at once, as the reference does.
    """
    return position_weights(batch, sample.x_gen.shape, by_sequence=False)

  def counted(self, sample: SoftSample, z_BL: IntBL, batch: Batch) -> BoolBL:
    """Return which positions carry loss."""
    del sample, z_BL
    return valid_tokens(batch)
