# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct student of the novels teacher; needs runs/novels_teacher and runs/novels_judge.

At twice these learning rates, 400 steps on one H100 were unstable and the run stopped, collapsed:
docs/results.md. Not run by us at these.

Reference: DiDi-Instruct, arXiv 2509.25035.

  dlm-jax train --config=novels_didi --workdir=runs/novels_didi
  dlm-jax sample --checkpoint=runs/novels_didi --sampler=rgas --steps=16
"""

from dlm_jax.configs import common, novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c = common.didi(c, teacher="runs/novels_teacher", judge="runs/novels_judge")
  return common.brief_didi(c)
