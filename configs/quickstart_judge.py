# SPDX-License-Identifier: Apache-2.0
"""The autoregressive judge that ships with the package, on Python source text.

Three minutes on one H100, beside the teacher: validation perplexity 12.2 per token.

dlm-jax prepare --config=quickstart_judge
dlm-jax train --config=quickstart_judge --workdir=runs/quickstart_judge

The variant :cpu is what `dlm-jax quickstart --from_scratch` trains, in about an hour of two cores.
"""

from dlm_jax.configs.recipes import next_token, quickstart

VARIANTS = ("cpu",)


def get_config(variant=""):
  c = quickstart.quickstart(tests=variant != "cpu")
  next_token.judge(c)
  if variant == "cpu":
    quickstart.training_on_cpu(c, ema_decay=0.999, steps=1200, warmup=120)
  else:
    quickstart.training(c, ema_decay=0.999, steps=3500, evaluate_every=500)
  return c
