# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion teacher, 35 M parameters, on about 90 MB of English novels.

Put your own plain-text books into data/novels/; documents are split at four line ends.

2,200 steps took 184 s on one H100: validation bound 64.4 per token; see docs/results.md.

Reference: MDLM, arXiv 2406.07524.

  dlm-jax prepare --config=novels_teacher
  dlm-jax train --config=novels_teacher --workdir=runs/novels_teacher
"""

from dlm_jax.configs.recipes import novels


def get_config():
  c = novels.novels(unrolled=True)
  novels.training(c, steps=2200, evaluate_every=400)
  return c
