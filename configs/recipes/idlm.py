# SPDX-License-Identifier: Apache-2.0
"""IDLM: students of masked and of uniform-state teachers.

Reference: IDLM, arXiv 2602.19066, appendix; released scripts.
"""

from dlm_jax.configs.base import optional
from ml_collections import ConfigDict


def masked(c, teacher, judge, chunk=0, *, order="random", steps=(), interval=(1e-3, 1.0)):
  """Distil a masked teacher."""
  c.objective.name = "idlm"
  c.objective.time_coupling = "same_order"  # same_order or permuted
  c.objective.order = order  # random or spaced: which positions are masked together
  c.objective.steps = steps  # of the samplers whose own loss is taken, e.g. (4, 8); (): all at once
  c.objective.interval = interval  # smallest and largest loss time
  c.objective.fake_updates = 1  # of the fake per update of the student, each on its own batch
  c.objective.guidance = 0.0  # of the teacher by what it says of masks alone; 0: none
  c.objective.chunk = optional(int, chunk)  # positions per chunk of logits; 0: all
  c.objective.anchor = 10.0  # of model.mask_noise: weight of the mean over noises
  c.objective.noise_scale = 2.0  # of model.mask_noise: size at the start, over an embedding's
  c.teacher.path = teacher
  c.evaluate.judge = judge
  c.optim.clip = 0.0
  c.optim.fake = ConfigDict({"lr": optional(float)})  # its own peak; none: optim.lr


def of_steps(c, *steps, teacher, judge):
  """Distil a masked teacher into a student of samplers with so many spaced steps.

  The loss is the sampler's own, of few hidden positions of a group at a time.
  """
  masked(c, teacher, judge, order="spaced", steps=steps, interval=(1e-3, 0.3))
  c.evaluate.nfes = steps


def uniform(c, teacher, judge, chunk=0, tau=1e-3):
  """Distil a uniform-state teacher."""
  masked(c, teacher, judge, chunk)
  c.process.name = "uniform"
  c.model.time_conditioning = True
  c.objective.gamma_min = -3.55  # window of the Gaussian states
  c.objective.gamma_max = -1.85
  c.objective.tau = tau  # temperature of the soft inputs
  c.objective.path_gradient = True  # False: the ablation without gradient through the state
  c.evaluate.noise_removal = "greedy"


def published(c):
  """Train as the paper: AdamW without decay, clipping or learning-rate decay."""
  c.loader.batch_size = 512
  c.objective.accumulate = 8
  c.optim.lr = 1e-6
  c.train.steps = 10_000
  c.train.checkpoint_every = 500
