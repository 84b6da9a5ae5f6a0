# SPDX-License-Identifier: Apache-2.0
"""IDLM-DCD at the paper's size and hyper-parameters. Not run by us.

The paper reports GenPPL 77.47 at entropy 5.28 with 4 steps and 53.61 at 5.41 with 8, greedy tail.
Put a public distilled Duo checkpoint into data/duo-distilled and GPT-2 Large into data/gpt2-large,
or point --config.teacher.path at your own run of `owt_dcd`.

Reference: IDLM, arXiv 2602.19066, appendix: as IDLM-Duo.

  dlm-jax train --config=owt_idlm_dcd --workdir=runs/owt_idlm_dcd
"""

from dlm_jax.configs.recipes import idlm, openwebtext


def get_config():
  c = openwebtext.openwebtext()
  openwebtext.measured(c, every=250, nfes=(4, 8, 16))
  idlm.uniform(c, teacher="data/duo-distilled", judge="data/gpt2-large", chunk=128)
  idlm.published(c)
  return c
