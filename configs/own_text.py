# SPDX-License-Identifier: Apache-2.0
"""Your own text, 7.5 M parameters: a judge, a masked teacher, and students of few steps.

A folder of text files is enough; the last twentieth of each is held out.

  variant   what
  judge     reads samples, autoregressive
  teacher   masked diffusion
  student   of the teacher, by IDLM
  didi      another one, by DiDi-Instruct, with a discriminator that can guide it

Reference: MDLM, arXiv 2406.07524; IDLM, arXiv 2602.19066; DiDi-Instruct, arXiv 2509.25035.

  dlm-jax prepare --config=own_text --config.data.source="files:text/*.txt"
  dlm-jax train --config=own_text:judge --workdir=runs/judge
  dlm-jax train --config=own_text:teacher --workdir=runs/teacher
  dlm-jax train --config=own_text:student --workdir=runs/student
"""

from dlm_jax.configs.recipes import brief, didi, idlm, next_token, own_text

VARIANTS = ("judge", "teacher", "student", "didi")
_MEASURED = {"teacher": "runs/teacher", "judge": "runs/judge"}


def get_config(variant="teacher"):
  c = own_text.own_text(dropout=0.1 if variant in ("judge", "teacher") else 0.0)
  if variant == "judge":
    next_token.judge(c)
  else:
    c.model.cond_dim = 64
  if variant == "student":
    idlm.of_steps(c, 4, 8, **_MEASURED)
    brief.matched_distillation(c, steps=300, every=50, lr=1e-5)
  elif variant == "didi":
    didi.didi(c, **_MEASURED, shared_time=True, group_size=8, warmup=20)
    brief.distillation(c, steps=200, every=20, lr=1e-5, b2=0.98)
    c.objective.kl_beta = 50.0
  else:
    own_text.training(c)
  return c
