# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct: a masked teacher's student, and the discriminator that rewards it.

Reference: DiDi-Instruct, arXiv 2509.25035, section 4 and appendix.
"""

from dlm_jax.configs.base import optional
from ml_collections import ConfigDict


def didi(
  c,
  teacher,
  judge,
  *,
  shared_time=False,
  group_size=4,
  warmup=0,
  trained_layers=4,
  rate=1e-5,
  chunk=0,
):
  """Distil with the released hyper-parameters of the method; `rate` is the discriminator's.

  Its regularisers are off: the paper's own ablation is better without them from 16 evaluations on.
  """
  c.objective.name = "didi_instruct"
  c.objective.score_decomposition = True  # write in two steps; False: in one
  c.objective.coupled_time = True  # rewards at the intermediate state's noise level
  c.objective.omega = "elbo"  # elbo (-alpha'/(1 - alpha)) or constant
  c.objective.omega_clip = (0.1, 10.0)
  c.objective.time_beta = (1.0, 1.0)  # a, b of the Beta that times are drawn from
  c.objective.time_clip = (0.02, 0.98)
  c.objective.importance_weight = False  # divide by the Beta's density
  c.objective.shared_time = shared_time  # rewards of one noise level are compared: `DiDiOptions`
  c.objective.t0 = 1e-3  # time of the final state; 0: no mask is left
  c.objective.order = "random"  # random or spaced: which positions are masked together
  c.objective.remask = 0.0  # share of the intermediate state's tokens
  c.objective.group_size = group_size  # sequences whose rewards are normalised together
  c.objective.reward_clip = 8.0  # nats
  c.objective.advantage_clip = 3.0
  c.objective.kl_beta = 0.0  # weight of the teacher's divergence
  c.objective.kl_scales = (0.01, 0.01)  # its factors at the two steps
  c.objective.jeffreys = 0.0  # 0: KL(teacher || student), 1: the reverse
  c.objective.entropy_beta = 0.0  # weight of the entropy bonus
  c.objective.real = "data"  # the discriminator's other side: data or teacher
  c.objective.teacher_steps = 64  # evaluations per teacher sample
  c.objective.label_smoothing = 0.1
  c.objective.trained_layers = optional(int, trained_layers)  # of the discriminator, from the top;
  # none: four, or all of a network with fewer
  c.objective.warmup = warmup  # steps in which the student waits
  c.objective.dropout = False  # in the student's rollout
  c.objective.chunk = optional(int, chunk)  # positions per chunk of logits; 0: all
  c.teacher.path = teacher
  c.evaluate.judge = judge
  c.optim.final = 0.0
  c.optim.clip = 0.5
  c.optim.discriminator = ConfigDict({"lr": rate, "clip": 1.0})  # its own; other fields as above


def published(c):
  """Train as the released scripts do: the rate falls to nothing."""
  c.loader.batch_size = 32
  c.objective.ema_decay = 0.999
  c.optim.lr = 1e-6
  c.optim.warmup = 0
  c.optim.schedule = "linear"
  c.train.steps = 10_000
  c.train.checkpoint_every = 200
