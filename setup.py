# SPDX-License-Identifier: Apache-2.0
"""Package definition; tool settings live in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

setup(
  name="dlm_jax",
  version="0.1.0",
  description="Few-step diffusion language models in JAX: train, distil, sample, evaluate.",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  # The experiments live at the top of the tree and are importable as dlm_jax.configs.
  packages=[*find_packages(include=["dlm_jax", "dlm_jax.*"]), "dlm_jax.configs"],
  package_dir={"dlm_jax": "dlm_jax", "dlm_jax.configs": "configs"},
  package_data={"dlm_jax": ["assets/**/*"]},
  install_requires=[
    "absl-py>=2.1",
    "chex>=0.1.90",
    "flax>=0.12.8",
    "grain>=0.2.12",
    "importlib_resources>=6.0",  # tensorflow-datasets imports it and does not declare it
    "jax>=0.10",
    "jaxtyping>=0.3",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "safetensors>=0.5",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.21",
    "tqdm>=4.66",
  ],
  extras_require={
    "test": [
      "beartype>=0.20",
      "build>=1.2",
      "hypothesis>=6.100",
      "ipykernel>=6.29",
      "nbclient>=0.10",
      "nbformat>=5.10",
      "pytest>=8.3",
      "pytest-xdist>=3.7",
      "ruff>=0.12",
      "scipy>=1.13",
      "setuptools>=77",
    ],
    "cuda13": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "eval": ["mauve-text>=0.4"],
    "notebooks": ["ipywidgets>=8", "jupyterlab>=4"],
  },
  entry_points={"console_scripts": ["dlm-jax = dlm_jax.cli.main:run"]},
  classifiers=[
    "License :: OSI Approved :: Apache Software License",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
