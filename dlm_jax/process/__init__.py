# SPDX-License-Identifier: Apache-2.0
"""Forward corruption processes, one sequence at a time."""

from dlm_jax.process.absorbing import Absorbing

__all__ = ["Absorbing"]
