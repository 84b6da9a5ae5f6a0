# SPDX-License-Identifier: Apache-2.0
"""Score entropy (SEDD) of an absorbing process; trains score teachers.

The network's logits are log f + log(V − 1), unnormalised, and the score from the mask to a token y
is s_y = α/(1 − α) f_y. Minimising score entropy makes f the posterior p(x₀ = y | xₜ): the term
−α'/(1 − α) (Σf − 1), which masked diffusion does not have, does the normalising.
"""

from typing import Any

from dlm_jax.models import DiT
from dlm_jax.objectives import mdlm
from dlm_jax.objectives.mdlm import NETWORK, PASSES, TRAINED, Options, loss
from dlm_jax.objectives.state import Objective, Optimizers, check_class
from dlm_jax.process import AbsorbingScore

__all__ = ["NETWORK", "PASSES", "TRAINED", "Options", "loss", "make"]


def make(
  *, model: DiT, process: AbsorbingScore, optimizers: Optimizers, **options: Any
) -> Objective:
  """Build training of one tree, "model", on score entropy in nats per valid token.

  `loss` and `Options` are those of `mdlm`: the process makes the difference.

  Raises:
    InputError: the process normalises, so that its loss would be that of `mdlm`.

  Reference: SEDD, arXiv 2310.16834, equations 5 and 13.
  """
  check_class("process.name", process, (AbsorbingScore,), "SEDD trains the score of AbsorbingScore")
  return mdlm.make(model=model, process=process, optimizers=optimizers, **options)
