# SPDX-License-Identifier: Apache-2.0
"""IDLM student that starts from the novels DCD student.

Needs runs/novels_dcd and runs/novels_judge. 150 updates took 191 s on one H100, beside another run.
GenPPL / entropy went from 237 / 4.44 with 8 evaluations and 189 / 4.48 with 16 to 230 / 4.69 and
200 / 4.70 (128 samples, greedy tail). The selection, by GenPPL, keeps the DCD student.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm_dcd --workdir=runs/novels_idlm_dcd
"""

from dlm_jax.configs import novels_idlm_duo


def get_config():
  c = novels_idlm_duo.get_config()
  c.teacher.path = "runs/novels_dcd"
  return c
