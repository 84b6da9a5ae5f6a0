# SPDX-License-Identifier: Apache-2.0
"""IDLM student that starts from the novels DCD student.

Needs runs/novels_dcd and runs/novels_judge. 250 updates on one H100 did not help at this size, see
`novels_idlm_duo`: GenPPL / entropy with 4 evaluations went from 394 / 4.32 to 595 / 4.45 (128
samples, greedy tail), so the network that is kept is the DCD student.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm_dcd --workdir=runs/novels_idlm_dcd
"""

from dlm_jax.configs import novels_idlm_duo


def get_config():
  c = novels_idlm_duo.get_config()
  c.teacher.path = "runs/novels_dcd"
  return c
