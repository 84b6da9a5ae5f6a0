# SPDX-License-Identifier: Apache-2.0
"""IDLM-Duo at the paper's size and hyper-parameters. Not run by us.

The paper reports GenPPL 68.04 at entropy 5.55 with 16 steps. Put a public Duo checkpoint into
data/duo and GPT-2 Large into data/gpt2-large, or point --config.teacher.path at your own run.

Reference: IDLM, arXiv 2602.19066, appendix: AdamW, 1e-6, warm-up 2500, batch 512, EMA 0.9999.

  dlm-jax train --config=owt_idlm_duo --workdir=runs/owt_idlm_duo
"""

from dlm_jax.configs.recipes import idlm, openwebtext


def get_config():
  c = openwebtext.openwebtext()
  openwebtext.measured(c, every=250, nfes=(16, 32))
  idlm.uniform(c, teacher="data/duo", judge="data/gpt2-large", chunk=128)
  idlm.published(c)
  return c
