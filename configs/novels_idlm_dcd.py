# SPDX-License-Identifier: Apache-2.0
"""IDLM student that starts from the novels DCD student. Not run by us yet.

Needs runs/novels_dcd and runs/novels_judge.

Reference: IDLM, arXiv 2602.19066.

  dlm-jax train --config=novels_idlm_dcd --workdir=runs/novels_idlm_dcd
"""

from dlm_jax.configs import novels_idlm_duo


def get_config():
  c = novels_idlm_duo.get_config()
  c.teacher.path = "runs/novels_dcd"
  return c
