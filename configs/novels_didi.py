# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct student of the novels teacher. Not run by us yet.

Needs runs/novels_teacher and runs/novels_judge.

Reference: DiDi-Instruct, arXiv 2509.25035.

  dlm-jax train --config=novels_didi --workdir=runs/novels_didi
  dlm-jax sample --checkpoint=runs/novels_didi --sampler=rgas --steps=16
"""

from dlm_jax.configs import common, novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c = common.didi(c, teacher="runs/novels_teacher", judge="runs/novels_judge")
  return common.brief_didi(c)
