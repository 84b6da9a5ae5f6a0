# SPDX-License-Identifier: Apache-2.0
"""Duo teacher, 170 M parameters, OpenWebText with the released hyper-parameters. Not run by us.

The data of `owt_teacher`. The last row of the vocabulary is padding, as in the public network.

Reference: Duo, arXiv 2506.10892: 1 M steps, batch 512, soft inputs in the first half.

  dlm-jax prepare --config=owt_duo
  dlm-jax train --config=owt_duo --workdir=runs/owt_duo
"""

from dlm_jax.configs.recipes import duo, openwebtext


def get_config():
  c = openwebtext.openwebtext()
  openwebtext.training(c)
  duo.duo(c)
  return c
