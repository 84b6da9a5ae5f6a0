# SPDX-License-Identifier: Apache-2.0
"""dlm_jax: few-step diffusion language models in JAX.

texts = dlm_jax.load("runs/quickstart/student")(steps=8, num=4, seed=0)
"""

__all__ = ["load"]


def __getattr__(name: str):
  """Import `load` and look up `__version__` on first use: `import dlm_jax.sample` stays light."""
  if name == "load":
    from dlm_jax.text.load import load

    return load
  if name == "__version__":
    from importlib import metadata

    try:
      return metadata.version("dlm_jax")
    except metadata.PackageNotFoundError:  # a source tree on the path
      return "0+unknown"
  raise AttributeError(f"module 'dlm_jax' has no attribute {name!r}")
