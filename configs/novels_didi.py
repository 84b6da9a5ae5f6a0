# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct student of the novels teacher; needs runs/novels_teacher and runs/novels_judge.

The discriminator's rate is as low as the student's, and the teacher's divergence counts: without
either the student collapsed (docs/results.md).

Reference: DiDi-Instruct, arXiv 2509.25035.

  dlm-jax train --config=novels_didi --workdir=runs/novels_didi
  dlm-jax sample --checkpoint=runs/novels_didi --sampler=rgas --steps=16
"""

from dlm_jax.configs.recipes import brief, didi, novels


def get_config():
  c = novels.novels()
  didi.didi(
    c,
    teacher="runs/novels_teacher",
    judge="runs/novels_judge",
    shared_time=True,
    group_size=8,
    warmup=50,
  )
  brief.distillation(c, steps=300, every=25, lr=1e-5, b2=0.98)
  c.objective.accumulate = 4  # in one piece 128 × 512 tokens took 48 GiB at 17 M parameters
  c.objective.kl_beta = 50.0
  return c
