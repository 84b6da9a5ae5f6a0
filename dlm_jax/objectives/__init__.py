# SPDX-License-Identifier: Apache-2.0
"""Training methods: one file each, with `make(...) -> Objective`; the folder is the list."""

from dlm_jax.objectives.batch import draw_batch
from dlm_jax.objectives.state import Objective, TrainState, output_params, update

__all__ = ["Objective", "TrainState", "draw_batch", "output_params", "update"]
