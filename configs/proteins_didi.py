# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct student of the proteins teacher; needs runs/proteins_teacher and proteins_judge.

Not run to its end by us: on one H100 whose half was taken it stopped for want of memory, in one
micro-batch; now there are four.

Reference: DiDi-Instruct, arXiv 2509.25035, section 4.4.

  dlm-jax train --config=proteins_didi --workdir=runs/proteins_didi
"""

from dlm_jax.configs.recipes import brief, didi, proteins


def get_config():
  c = proteins.proteins()
  didi.didi(
    c,
    teacher="runs/proteins_teacher",
    judge="runs/proteins_judge",
    shared_time=True,
    group_size=8,
    warmup=50,
    rate=5e-5,
  )
  brief.distillation(c, steps=600, every=50, lr=1e-5, b2=0.98)
  c.objective.accumulate = 4  # in one piece 128 × 512 tokens took 48 GiB
  return c
