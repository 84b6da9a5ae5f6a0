# SPDX-License-Identifier: Apache-2.0
"""The switches of DiDi-Instruct; every row of the paper's ablations is one of them."""

import dataclasses

from dlm_jax.objectives._rewards import OMEGAS

REAL_SIDES = ("data", "teacher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiDiOptions:
  """How a student is distilled on the integral KL; defaults are the released code's, with its
  regularisers off.

  Attributes:
    score_decomposition: write in two steps, through a state at time t_mid; False: in one.
    coupled_time: the noise level t of rewards is t_mid; False: drawn apart.
    omega: weight ω(t): "elbo" −α'/(1 − α), 1/t under the log-linear schedule, or "constant" 1.
    omega_clip: smallest and largest weight.
    time_beta: a, b of π = Beta(a, b), from which t is drawn.
    time_clip: times are clipped to this range after drawing.
    importance_weight: divide the weight by π(t).
    shared_time: one t for all members of a group. Published: False. A reward grows with how much of
      the text is to be seen, so advantages of members with times of their own mostly compare times:
      on the quick start's teacher (322.1 GenPPL at 4.32 nats, 8 evaluations) 60 steps led to 352.1
      at 4.40, and 80 steps with one time per group of 8 to 294.6 at 4.37 (64 samples).
    t0: time of the final state; at 1e-3 one mask in a thousand is left, at 0 none.
    remask: probability that a token of the intermediate state is masked again.
    group_size: G, consecutive sequences whose rewards are normalised together.
    reward_clip: largest log-odds of a position.
    advantage_clip: largest advantage; idle below G = 11.
    kl_beta: weight of the teacher's divergence; 0 is off.
    kl_scales: its factors at the first and the second step.
    jeffreys: 0 KL(teacher ‖ student), 1 the reverse, between a mixture.
    entropy_beta: weight of the entropy bonus; 0 is off.
    real: the discriminator's other side: "data", or "teacher": the teacher's own samples.
    teacher_steps: evaluations per teacher sample.
    label_smoothing: s; labels are 1 − s and s.
    trained_layers: blocks of the discriminator that are trained, from the top.
    warmup: steps in which the student waits for the discriminator.
    dropout: in the student's rollout.

  Raises:
    ValueError: a number out of range or an unknown name.
  """

  score_decomposition: bool = True
  coupled_time: bool = True
  omega: str = "elbo"
  omega_clip: tuple[float, float] = (0.1, 10.0)
  time_beta: tuple[float, float] = (1.0, 1.0)
  time_clip: tuple[float, float] = (0.02, 0.98)
  importance_weight: bool = False
  shared_time: bool = False
  t0: float = 1e-3
  remask: float = 0.0
  group_size: int = 4
  reward_clip: float = 8.0
  advantage_clip: float = 3.0
  kl_beta: float = 0.0
  kl_scales: tuple[float, float] = (0.01, 0.01)
  jeffreys: float = 0.0
  entropy_beta: float = 0.0
  real: str = "data"
  teacher_steps: int = 64
  label_smoothing: float = 0.1
  trained_layers: int = 4
  warmup: int = 0
  dropout: bool = False

  def __post_init__(self):
    if self.group_size < 2:
      raise ValueError(
        f"objective.group_size={self.group_size}: rewards are normalised by their spread within a "
        "group, and one sequence has none; use 2 or more."
      )
    for name, allowed in (("omega", OMEGAS), ("real", REAL_SIDES)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"objective.{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}."
        )
    for name in ("time_clip", "omega_clip"):
      low, high = getattr(self, name)
      if not 0 < low < high or (name == "time_clip" and high >= 1):
        raise ValueError(f"objective.{name}={(low, high)} must be two rising positive numbers.")
    if min(self.time_beta) <= 0:
      raise ValueError(f"objective.time_beta={self.time_beta} must be positive.")
    for name in ("remask", "jeffreys", "label_smoothing"):
      top = 0.5 if name == "label_smoothing" else 1.0
      if not 0 <= getattr(self, name) <= top or (name != "jeffreys" and getattr(self, name) == top):
        raise ValueError(f"objective.{name}={getattr(self, name)} must be in [0, {top}).")
    if not 0 <= self.t0 < self.time_clip[0]:
      raise ValueError(f"objective.t0={self.t0} must be below time_clip[0]={self.time_clip[0]}.")
    for name in ("teacher_steps", "trained_layers"):
      if getattr(self, name) < 1:
        raise ValueError(f"objective.{name}={getattr(self, name)} must be at least 1.")
    if self.warmup < 0:
      raise ValueError(f"objective.warmup={self.warmup} must not be negative.")
