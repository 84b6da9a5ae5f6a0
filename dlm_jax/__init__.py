# SPDX-License-Identifier: Apache-2.0
"""dlm_jax: few-step diffusion language models in JAX.

texts = dlm_jax.load("runs/quickstart/student")(steps=8, num=4, seed=0)
"""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
  """Import `load` on first use, so that `import dlm_jax.sample` stays light."""
  if name == "load":
    from dlm_jax.text.load import load

    return load
  raise AttributeError(f"module 'dlm_jax' has no attribute {name!r}")
