# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: the experiments at the top of the tree are dlm_jax.configs."""

from setuptools import find_packages, setup

CONFIGS = ["dlm_jax.configs", *(f"dlm_jax.configs.{name}" for name in find_packages("configs"))]
setup(packages=[*find_packages(include=["dlm_jax", "dlm_jax.*"]), *CONFIGS])
