# SPDX-License-Identifier: Apache-2.0
"""MDLM teacher, 170 M parameters, OpenWebText with the paper's hyper-parameters. Not run by us.

OpenWebText as text files or jsonl in data/openwebtext/; GPT-2's vocab.json and merges.txt in
data/gpt2/. The papers hold out the last 100,000 documents; here 1.25 % of them by hash.

Reference: MDLM, arXiv 2406.07524, appendix: 1 M steps, batch 512, length 1024.

  dlm-jax prepare --config=owt_teacher
  dlm-jax train --config=owt_teacher --workdir=runs/owt_teacher
"""

from dlm_jax.configs.recipes import openwebtext


def get_config():
  c = openwebtext.openwebtext()
  openwebtext.training(c)
  return c
