# SPDX-License-Identifier: Apache-2.0
"""Inverse distillation of what a sampler with K steps does: one group of positions at a time.

A sampler with K steps never uses a whole prediction. At step k it draws the positions of group k,
independently of each other given what is revealed so far, and predicts the rest anew. So here a
sequence gets a K, a step k and a reveal order, with the sampler's own grid and rounding, and

  x_gen   data c with every position masked whose reveal step is k or later: the student's input,
  G       the positions of step k: they alone are drawn, from p = Π_{l in G} p_l(· | c),
  z       x_gen with G revealed as drawn, each hidden again with probability t; S is what is hidden.

Positions of later steps are masked in x_gen and in z, and carry no loss. Those in S have the weight
−α'/(1 − α), under the log-linear schedule 1/t, times K.

What the gap is then. Let n = |G|. Over t ~ U(0, 1) a set S with s members has the weight
∫ tˢ⁻¹ (1 − t)ⁿ⁻ˢ dt = 1/(s C(n, s)): that of a random permutation of G that reveals G \\ S first,
and then each member of S as often as any other. So

  Σ_S Σ_{l in S} weight · E[log p(x_l | ·) − log teacher(x_l | z)]  =  KL of two path measures,

both of which start from x_gen and reveal G one by one in random order, the student's from p and the
teacher's from its prediction given the state z so far. A masked-diffusion teacher is any-order: its
prediction at l given what is visible is the conditional in which all masked positions, the later
ones too, are summed out. So the chain rule makes the second the teacher's joint law of G given c
where its conditionals are consistent, and the KL is

  KL(p_θ(x_G | c) ‖ teacher(x_G | c)),

the local error of step k: what the sampler loses there to independence and to its prediction. Steps
are drawn evenly, hence the factor K: the expectation is the sum of the local errors of all steps,
for whatever sizes of groups, Σ n_k = L tokens, and gradients have the scale of a whole prediction's
for every K.

That is with the log-probability of x_l given all that was: x_gen and the draws, which is log p_l.
The fake reads z alone, where what was given and what was drawn look alike, and is trained on these
same states and positions; at its best it is E[p_l | z], the reveal law of the student's path seen
state by state. By convexity the gap is at most the local error, it is that error where z tells
(at the first step, nothing being given), and it is 0 if and only if the state-by-state laws agree.

As everywhere in IDLM no gradient passes through the draws: it is that of the KL with the law of z
held. Of the terms s = 1, everything else in G revealed, the gradient is the exact one of
KL(p_θ(x_G | c) ‖ teacher(x_G | c)), for a fake that knows c: p factorises.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dlm_jax.arrays import BoolBL, FloatB, FloatBL, IntBL, KeyB
from dlm_jax.objectives import orders as spaced
from dlm_jax.objectives.batch import Batch, valid_tokens
from dlm_jax.objectives.idlm.absorbing import HardSample, HardStates
from dlm_jax.process import grids, orders


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedStates(HardStates):
  """States of groups: see the module.

  A network that is told the time is told, as student, the time of the sampler's grid, as the
  sampler tells it; as teacher and fake the time at which the share of masks in z is the expected
  one, which it was trained on, not the loss time t.

  Attributes:
    steps: the numbers of steps K that sequences get, equally many each.
  """

  steps: tuple[int, ...]

  def choose(self, batch: Batch, eps: float = 1e-3) -> Batch:
    """Add to a global batch "run", the index of a sequence's K, and "step", its k.

    Both follow from "t_gen", whose strata are those of `couple_times`, so that every step of every
    K is met equally often; "t_gen" becomes the time of that step on the grid.
    """
    steps_R = jnp.asarray(self.steps)
    place_B = (batch["t_gen"] - eps) / (1 - eps) * steps_R.size
    run_B = jnp.clip(place_B.astype(jnp.int32), 0, steps_R.size - 1)
    step_B = ((place_B - run_B) * steps_R[run_B]).astype(jnp.int32)
    step_B = jnp.clip(step_B, 0, steps_R[run_B] - 1)
    length, t_B = batch["tokens"].shape[1], jnp.zeros_like(batch["t_gen"])
    for run, steps in enumerate(self.steps):
      t_K = orders.times(self.process, self.order, steps, length)
      time_B = t_K[jnp.minimum(step_B, steps)]
      t_B = jnp.where(run_B == run, time_B, t_B)
    return {**batch, "t_gen": t_B, "run": run_B, "step": step_B}

  def inputs(self, batch: Batch, rng_B: KeyB) -> tuple[IntBL, BoolBL]:
    """Return the student's input, and the group that is drawn from its prediction."""
    valid_BL = valid_tokens(batch)
    place_BL, edges = self._edges(valid_BL, rng_B)
    before_B, after_B = 0, 0
    for run, edge_BK in enumerate(edges):
      at = lambda k_B, edge_BK=edge_BK: jnp.take_along_axis(edge_BK, k_B[:, None], axis=1)[:, 0]  # noqa: E731
      step_B = jnp.minimum(batch["step"], self.steps[run] - 1)
      here_B = batch["run"] == run
      before_B = jnp.where(here_B, at(step_B), before_B)
      after_B = jnp.where(here_B, at(step_B + 1), after_B)
    masked_BL = valid_BL & (place_BL < before_B[:, None])
    group_BL = masked_BL & (place_BL >= after_B[:, None])
    return jnp.where(masked_BL, self.process.mask_id, batch["tokens"]), group_BL

  def _edges(self, valid_BL, rng_B):
    """Return a number per position and, by K, the numbers [B, K + 1] below which it is masked.

    Column k holds for the state before step k.
    """
    length = valid_BL.shape[1]
    times = [orders.times(self.process, self.order, steps, length) for steps in self.steps]
    survives = [orders.survives(self.process, t_K) for t_K in times]
    if self.order == "random":
      u_BL = jax.vmap(lambda rng: jax.random.uniform(rng, (length,)))(rng_B)
      rows = [jnp.concatenate([jnp.ones(1), share_K])[None] for share_K in survives]
      return u_BL, [jnp.broadcast_to(row, (u_BL.shape[0], row.shape[1])) for row in rows]
    rank_BL, count_B, rounding_B = spaced.draw(rng_B, valid_BL)
    left = [orders.left(count_B, share_K, rounding_B) for share_K in survives]
    return rank_BL, [jnp.concatenate([count_B[:, None], left_BK], axis=1) for left_BK in left]

  def loss_state(
    self, x_gen_BL: IntBL, predicted_BL: IntBL, group_BL: BoolBL, batch: Batch, rng_B: KeyB
  ) -> IntBL:
    """Return z: the input with its group revealed, but for what is hidden again at time t."""
    alpha, length = self.process.schedule.alpha, x_gen_BL.shape[1]
    hide_B = (1 - alpha(batch["t"])) / (1 - alpha(1.0))
    u_BL = jax.vmap(lambda rng: jax.random.uniform(rng, (length,)))(rng_B)
    return jnp.where(group_BL & (u_BL >= hide_B[:, None]), predicted_BL, x_gen_BL)

  def told(self, sample: HardSample, batch: Batch) -> FloatB:
    """Return the time at which so large a share of masks as in z is the expected one."""
    schedule, valid_BL = self.process.schedule, valid_tokens(batch)
    masked_B = jnp.sum(valid_BL & (sample.z == self.process.mask_id), axis=1)
    share_B = masked_B / jnp.maximum(valid_BL.sum(1), 1)
    return jnp.clip(schedule.inverse(1 - share_B * (1 - schedule.alpha(1.0))), grids.END, 1.0)

  def weights(self, sample: HardSample, batch: Batch) -> FloatBL:
    """Return weights that make a sum one over the positions of the group, K times."""
    steps_B: Int[Array, B] = jnp.asarray(self.steps)[batch["run"]]
    return super().weights(sample, batch) * sample.group * steps_B[:, None]

  def counted(self, sample: HardSample, z_BL: IntBL, batch: Batch) -> BoolBL:
    """Return which positions carry loss."""
    return super().counted(sample, z_BL, batch) & sample.group
