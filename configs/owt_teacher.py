# SPDX-License-Identifier: Apache-2.0
"""MDLM teacher, 170 M parameters, OpenWebText with the paper's hyper-parameters. Not run by us.

OpenWebText as text files or jsonl in data/openwebtext/; GPT-2's vocab.json and merges.txt in
data/gpt2/. The papers hold out the last 100,000 documents; here 1.25 % of them by hash.

Reference: MDLM, arXiv 2406.07524, appendix: 1 M steps, batch 512, length 1024.

  dlm-jax prepare --config=owt_teacher
  dlm-jax train --config=owt_teacher --workdir=runs/owt_teacher
"""

from dlm_jax.configs import common


def get_config():
  c = common.base()
  c.data.directory = "data/owt_packed"
  c.data.source = "files:data/openwebtext/*.jsonl*"
  c.data.options.validation_fraction = 0.0125
  c.data.tokenizer = "data/gpt2"
  c.data.length = 1024
  c.model.vocab_size = 50258
  c.model.unroll = c.model.layers
  c.loader.batch_size = 512
  c.train.steps = 1_000_000
  c.train.checkpoint_every = 5000
  return c
