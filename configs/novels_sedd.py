# SPDX-License-Identifier: Apache-2.0
"""SEDD teacher, absorbing states and score entropy, on the novels. Not run by us yet.

The data of `novels_teacher`. Its IDLM student: `novels_idlm_sedd`.

Reference: SEDD, arXiv 2310.16834.

  dlm-jax prepare --config=novels_sedd
  dlm-jax train --config=novels_sedd --workdir=runs/novels_sedd
"""

from dlm_jax.configs import novels_teacher


def get_config():
  c = novels_teacher.get_config()
  c.process.name = "absorbing_score"
  c.objective.name = "sedd"
  return c
