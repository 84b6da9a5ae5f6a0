# SPDX-License-Identifier: Apache-2.0
"""The switches of DiDi-Instruct; every row of the paper's ablations is one of them."""

import dataclasses
import math

from dlm_jax.errors import InputError
from dlm_jax.objectives import orders
from dlm_jax.objectives.didi_instruct.rewards import OMEGAS
from dlm_jax.objectives.options import ChunkedOptions

REAL_SIDES = ("data", "teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ChunkedOptions):
  """How a student is distilled on the integral KL; see also `ChunkedOptions`.

  With one micro-batch the student runs once; with more, its rollout is drawn first and run again
  for its gradient, from the same keys: the same numbers.

  Defaults are the released code's, but for: regularisers off, no dropout in the student, groups of
  different data rows (the released code repeats one row G times; so do we where there are prompts).

  Attributes:
    score_decomposition: write in two steps, through a state at time t_mid; False: in one.
    coupled_time: the noise level t of rewards is t_mid; False: drawn apart.
    omega: weight ω(t): "elbo" −α'/(1 − α), 1/t under the log-linear schedule, or "constant" 1.
    omega_clip: smallest and largest weight.
    time_beta: a, b of π = Beta(a, b), from which t is drawn.
    time_clip: times are clipped to this range after drawing.
    importance_weight: divide the weight by π(t), taken before clipping: large where π is small.
    shared_time: one t for all members of a group. Published: False. A reward depends on how much of
      the text is to be seen, so that advantages of members with times of their own compare times
      as well. Two runs of the quick start's teacher (322.1 GenPPL at 4.32 nats with 8 evaluations,
      64 samples): own times, G = 4, 352.1 at 4.40 after 60 steps; one time, G = 8, 322.2 at 4.38.
    t0: time of the final state; at 1e-3 one mask in a thousand is left, at 0 none.
    order: "random" or "spaced": which positions the student's steps reveal together, and the noise
      of rewards masks together; see `objectives.orders`. The teacher's samples stay random.
    remask: probability that a token of the intermediate state is masked again.
    group_size: G, consecutive sequences whose rewards are normalised together.
    reward_clip: largest logit of a position; the best discriminator of smoothed labels stays below
      log(1/s − 1), 2.2 at s = 0.1, by itself.
    advantage_clip: largest advantage; idle below G = 11.
    kl_beta: weight of the teacher's divergence, a mean over masked positions, then sequences; 0 is
      off.
    kl_scales: its factors at the first and the second step.
    jeffreys: 0 KL(teacher ‖ student), 1 the reverse, between a mixture.
    entropy_beta: weight of the entropy bonus; 0 is off.
    real: the discriminator's other side: "data", or "teacher": the teacher's own samples.
    teacher_steps: evaluations per teacher sample.
    label_smoothing: s; labels are 1 − s and s, which squashes the reward: see `method`.
    trained_layers: blocks of the discriminator that are trained, from the top. None: four, or all.
    warmup: steps in which the student, its optimiser and its learning rate wait.
    dropout: in the student's rollout.

  Raises:
    InputError: a number out of range or an unknown name.
  """

  ema_decay: float | None = 0.999
  score_decomposition: bool = True
  coupled_time: bool = True
  omega: str = "elbo"
  omega_clip: tuple[float, ...] = (0.1, 10.0)
  time_beta: tuple[float, ...] = (1.0, 1.0)
  time_clip: tuple[float, ...] = (0.02, 0.98)
  importance_weight: bool = False
  shared_time: bool = False
  t0: float = 1e-3
  order: str = "random"
  remask: float = 0.0
  group_size: int = 4
  reward_clip: float = 8.0
  advantage_clip: float = 3.0
  kl_beta: float = 0.0
  kl_scales: tuple[float, ...] = (0.01, 0.01)
  jeffreys: float = 0.0
  entropy_beta: float = 0.0
  real: str = "data"
  teacher_steps: int = 64
  label_smoothing: float = 0.1
  trained_layers: int | None = None
  warmup: int = 0
  dropout: bool = False

  def __post_init__(self):
    super().__post_init__()
    orders.check(self.order)
    if self.group_size < 2:
      raise InputError(
        f"objective.group_size={self.group_size}: rewards are normalised by their spread within a "
        "group, and one sequence has none; use 2 or more."
      )
    for name, allowed in (("omega", OMEGAS), ("real", REAL_SIDES)):
      if getattr(self, name) not in allowed:
        raise InputError(
          f"objective.{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}."
        )
    for name in ("omega_clip", "time_clip", "time_beta", "kl_scales"):
      if len(getattr(self, name)) != 2:
        raise InputError(f"objective.{name}={getattr(self, name)} must be two numbers: (a, b).")
    for name, top in (("time_clip", 1.0), ("omega_clip", math.inf)):
      low, high = getattr(self, name)
      if not 0 < low < high < top:
        raise InputError(f"objective.{name}={(low, high)} must rise and lie inside (0, {top}).")
    self._check_range(0, math.inf, "kl_beta", "entropy_beta", "warmup")
    self._check_range(0, 1, "jeffreys")
    if not 0 <= self.remask < 1 or not 0 <= self.label_smoothing < 0.5:
      raise InputError(
        f"objective.remask={self.remask} must be in [0, 1) and objective.label_smoothing="
        f"{self.label_smoothing} in [0, 0.5)."
      )
    for name in ("reward_clip", "advantage_clip"):
      if getattr(self, name) <= 0:
        raise InputError(f"objective.{name}={getattr(self, name)} must be positive.")
    if min(self.time_beta) <= 0 or min(self.kl_scales) < 0:
      raise InputError(
        f"objective.time_beta={self.time_beta} must be positive and objective.kl_scales="
        f"{self.kl_scales} not negative."
      )
    if not 0 <= self.t0 < self.time_clip[0]:
      raise InputError(f"objective.t0={self.t0} must be below time_clip[0]={self.time_clip[0]}.")
    self._check_range(1, math.inf, "teacher_steps")

  def layers_to_train(self, layers: int) -> int:
    """Return how many of the discriminator's blocks are trained, of so many.

    Raises:
      InputError: more than there are, or none.
    """
    trained = min(4, layers) if self.trained_layers is None else self.trained_layers
    if not 1 <= trained <= layers:
      raise InputError(
        f"objective.trained_layers={trained} must be in [1, {layers}], model.layers."
      )
    return trained

  def check_batch(self, size: int) -> None:
    """Raise InputError unless groups fill a global batch."""
    group = self.group_size
    if size % group:
      raise InputError(
        f"loader.batch_size={size} is not divisible by objective.group_size={group}; use "
        f"{max(size // group, 1) * group} or {(size // group + 1) * group}."
      )

  def _check_range(self, low, high, *names):
    for name in names:
      if not low <= getattr(self, name) <= high:
        allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise InputError(f"objective.{name}={getattr(self, name)} must be {allowed}.")
