# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct student of the proteins teacher; needs runs/proteins_teacher and proteins_judge.

Not run to its end by us: on one H100 whose half was taken it stopped for want of memory, in one
micro-batch; now there are four.

Reference: DiDi-Instruct, arXiv 2509.25035, section 4.4.

  dlm-jax train --config=proteins_didi --workdir=runs/proteins_didi
"""

from dlm_jax.configs import common, proteins_teacher


def get_config():
  c = proteins_teacher.get_config()
  c = common.didi(c, teacher="runs/proteins_teacher", judge="runs/proteins_judge")
  return common.brief_didi(c)
