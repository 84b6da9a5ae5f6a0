# SPDX-License-Identifier: Apache-2.0
"""dlm_jax: few-step diffusion language models in JAX.

texts = dlm_jax.load("runs/quickstart/student")(steps=8, num=4, seed=0)
"""

__version__ = "0.1.0"
