# SPDX-License-Identifier: Apache-2.0
"""The masked diffusion teacher that ships with the package, on Python source text.

Reference: MDLM, arXiv 2406.07524.

Five minutes on one H100, beside the judge: validation bound 19.8 per token.

  dlm-jax prepare --config=quickstart_teacher
  dlm-jax train --config=quickstart_teacher --workdir=runs/quickstart_teacher

The variant :cpu is what `dlm-jax quickstart --from_scratch` trains, in about an hour of two cores.
"""

from dlm_jax.configs.recipes import quickstart

VARIANTS = ("cpu",)


def get_config(variant=""):
  c = quickstart.quickstart(tests=variant != "cpu")
  c.model.cond_dim = 16
  if variant == "cpu":
    quickstart.training_on_cpu(c, ema_decay=0.9995, steps=3000, warmup=200)
  else:
    quickstart.training(c, ema_decay=0.9995, steps=7500, evaluate_every=1000)
  return c
