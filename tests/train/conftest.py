# SPDX-License-Identifier: Apache-2.0
"""Quick compilation for tests of training."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
  """Compile without optimisation: these networks are tiny and run a few times."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
