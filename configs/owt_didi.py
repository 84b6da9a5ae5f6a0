# SPDX-License-Identifier: Apache-2.0
"""DiDi-Instruct at the paper's size and the released hyper-parameters. Not run by us.

With regularisers and guidance (sampler rgas) the paper reports GenPPL 62.2 / 38.2 / 25.0 / 21.9 /
18.4 with 8 / 16 / 32 / 64 / 128 evaluations at entropy 5.15 to 5.21. Without regularisers, as here:
guided 84.6 / 31.0 / 23.6 / 19.6 / 17.5 at 5.17 to 5.22, unguided 92.1 / 44.0 / 32.3 / 26.1 / 21.4.
Put a public MDLM checkpoint into data/mdlm-owt and GPT-2 Large into
data/gpt2-large.

Reference: DiDi-Instruct, arXiv 2509.25035, tables 1 to 3.

  dlm-jax train --config=owt_didi --workdir=runs/owt_didi
"""

from dlm_jax.configs.recipes import didi, openwebtext


def get_config():
  c = openwebtext.openwebtext()
  openwebtext.measured(c, every=200, nfes=(8, 16))
  didi.didi(c, teacher="data/mdlm-owt", judge="data/gpt2-large", chunk=128)
  didi.published(c)
  return c
