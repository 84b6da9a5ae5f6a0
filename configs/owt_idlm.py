# SPDX-License-Identifier: Apache-2.0
"""IDLM-MDLM at the paper's size and hyper-parameters. Not run by us.

The paper reports GenPPL 32.75 at entropy 5.42 with 16 steps and 20.45 at 5.23 with 32. Put a public
MDLM checkpoint (config.json, model.safetensors) into data/mdlm-owt and GPT-2 Large into
data/gpt2-large, or point --config.teacher.path at your own run.

Reference: IDLM, arXiv 2602.19066, appendix: AdamW, 1e-6, warm-up 2500, batch 512, EMA 0.9999.

  dlm-jax train --config=owt_idlm --workdir=runs/owt_idlm
"""

from dlm_jax.configs.recipes import idlm, openwebtext


def get_config():
  c = openwebtext.openwebtext()
  openwebtext.measured(c, every=250, nfes=(16, 32))
  idlm.masked(c, teacher="data/mdlm-owt", judge="data/gpt2-large", chunk=128)
  idlm.published(c)
  return c
