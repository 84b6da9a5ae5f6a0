# SPDX-License-Identifier: Apache-2.0
"""Students whose masks carry noise, so that one prediction can be a dependent law.

Given what is visible, a masked network answers with independent tokens. One that is given noise n
with its masks answers with a mixture of such laws, E_n Π p(· | n), which can be any law. All of
inverse distillation stays as it is, conditional on the noise; teacher and fake get none.

Left alone, the mixture is not found. The pull towards agreement between tokens is felt by the mean
over the noise just as by what depends on it, and the mean, which every parameter moves, is faster:
the student settles on one of the teacher's modes. But of the mean the right answer is known. The
clean tokens' law given what is visible has the teacher's predictions as its marginals, so at the
optimum, for every input,

  E_n p(· | x, n) = p_teacher(· | x),

and the `anchor` is the squared distance between the two. It leaves to inverse distillation what
the teacher does not say: how tokens depend on each other.

Reference: own work; infinite masks, arXiv 2605.10518, have the noise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dlm_jax.arrays import KeyB, Params, RngKey
from dlm_jax.errors import InputError
from dlm_jax.models.dit import head_params
from dlm_jax.objectives.batch import Batch
from dlm_jax.objectives.idlm.absorbing import HardSample, HardStates
from dlm_jax.objectives.positions import sum_positions
from dlm_jax.process import Absorbing, Process

PROJECTION = "mask_noise"  # name of the parameter


def anchor(
  params: Params,
  sample: HardSample,
  batch: Batch,
  noise_B: KeyB,
  weights: Float[Array, "B L"],
  *,
  states: HardStates,
  teacher: Params,
) -> Float[Array, ""]:
  """Estimate Σ_masked |E_n p − p_teacher|² of the student's inputs, without bias.

  It is the product of two differences, each of a noise of its own: the sample's and a new one. So a
  value may be negative.

  Args:
    params: the student's.
    sample: one run of it.
    batch: that it was run on.
    noise_B: keys of the second noise.
    weights: of positions.
    states: network and process.
    teacher: its parameters.
  """
  process, t_B = states.process, batch["t_gen"]
  again_BLD = states.trunk(params, sample.x_gen, t_B, None, noise_B)
  teacher_BLD = states.trunk(teacher, sample.x_gen, t_B)

  def product(head, first, second, of_teacher, x_gen):
    p = lambda tree, hidden: jnp.exp(  # noqa: E731
      jax.vmap(process.log_x0)(states.head(tree, hidden, t_B), x_gen)
    )
    target = p(teacher, of_teacher)
    return jnp.sum((p(head, first) - target) * (p(head, second) - target), -1), ()

  moving, fixed = (sample.hidden, again_BLD), (teacher_BLD, sample.x_gen)
  masked_BL = sample.x_gen == process.mask_id
  weights = weights * masked_BL
  return sum_positions(product, head_params(params), moving, fixed, weights, states.chunk)[0]


def started(trees: dict[str, Params], rng: RngKey, width: int, scale: float) -> dict[str, Params]:
  """Return the trees of a run's start with projections of the noise.

  The student's is random, Gaussian, and adds to a mask `scale` times the size of its embedding: at
  zero the objective is stationary in it. Teacher and fake get zeros.

  Args:
    trees: by name, "student" among them; all alike.
    rng: of the student's projection.
    width: N of the noise.
    scale: of what it adds, root mean square over that of the teacher's embeddings.
  """
  table_VD = trees["student"]["embed"]["embedding"]
  zeros_ND = jnp.zeros((width, table_VD.shape[1]), table_VD.dtype)
  size = scale * jnp.sqrt(jnp.mean(table_VD**2) / width)
  random_ND = size * jax.random.normal(rng, zeros_ND.shape, zeros_ND.dtype)
  projections = {name: random_ND if name == "student" else zeros_ND for name in trees}
  return {name: {**tree, PROJECTION: projections[name]} for name, tree in trees.items()}


def check(process: Process, width: int) -> None:
  """Raise InputError where noise has no masks to go with."""
  if width and not isinstance(process, Absorbing):
    raise InputError(f"model.mask_noise={width} needs an absorbing process; use 0.")
