# SPDX-License-Identifier: Apache-2.0
"""Score entropy (SEDD) of an absorbing process; trains score teachers.

The network's logits are log f + log(V − 1), unnormalised, and the score from the mask to a token y
is s_y = α/(1 − α) f_y. Minimising score entropy makes f the posterior p(x₀ = y | xₜ): the term
−α'/(1 − α) (Σf − 1), which masked diffusion does not have, does the normalising.
"""

import optax

from dlm_jax.models import DiT
from dlm_jax.objectives import mdlm
from dlm_jax.objectives.mdlm import TRAINED, loss
from dlm_jax.objectives.state import Objective
from dlm_jax.process import AbsorbingScore

__all__ = ["TRAINED", "loss", "make"]


def make(
  *,
  model: DiT,
  process: AbsorbingScore,
  optimizers: dict[str, optax.GradientTransformation],
  accumulate: int = 1,
  ema_decay: float | None = 0.9999,
) -> Objective:
  """Build training of one tree, "model", on score entropy in nats per valid token.

  `loss` is that of `mdlm`: the process makes the difference.

  Raises:
    ValueError: the process normalises, so that its loss would be that of `mdlm`.

  Reference: SEDD, arXiv 2310.16834, equations 5 and 13.
  """
  if not isinstance(process, AbsorbingScore):
    raise ValueError("SEDD trains a score: it needs the process AbsorbingScore.")
  return mdlm.make(
    model=model, process=process, optimizers=optimizers, accumulate=accumulate, ema_decay=ema_decay
  )
