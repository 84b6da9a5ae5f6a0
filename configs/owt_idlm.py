# SPDX-License-Identifier: Apache-2.0
"""IDLM-MDLM at the paper's size and hyper-parameters. Not run by us.

The paper reports GenPPL 32.75 at entropy 5.42 with 16 steps and 20.45 at 5.23 with 32. Put a public
MDLM checkpoint (config.json, model.safetensors) into data/mdlm-owt and GPT-2 Large into
data/gpt2-large, or point --config.teacher.path at your own run.

Reference: IDLM, arXiv 2602.19066, appendix: AdamW, 1e-6, warm-up 2500, batch 512, EMA 0.9999.

  dlm-jax train --config=owt_idlm --workdir=runs/owt_idlm
"""

from dlm_jax.configs import common, owt_teacher


def get_config():
  c = owt_teacher.get_config()
  c = common.distill(c, teacher="data/mdlm-owt", judge="data/gpt2-large")
  c.objective.accumulate = 8
  c.objective.chunk = 128
  c.optim.schedule = "constant"
  c.train.steps = 10_000
  c.train.checkpoint_every = 500
  c.evaluate.every = 250
  c.evaluate.nfes = (16, 32)
  c.evaluate.samples = 256
  c.evaluate.batch_size = 32
  return c
