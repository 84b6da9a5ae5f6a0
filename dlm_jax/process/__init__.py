# SPDX-License-Identifier: Apache-2.0
"""Forward corruption processes, one sequence at a time."""

from dlm_jax.process.absorbing import Absorbing
from dlm_jax.process.block import BlockNoise
from dlm_jax.process.gaussian import GaussianDuality
from dlm_jax.process.score import AbsorbingScore
from dlm_jax.process.uniform import Uniform

__all__ = ["Absorbing", "AbsorbingScore", "BlockNoise", "GaussianDuality", "Uniform"]
