# SPDX-License-Identifier: Apache-2.0
"""What real text scores, beside which samples are read."""

import dataclasses

import numpy as np
from jaxtyping import Int

from dlm_jax.evaluate.judge import JudgeWithTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
  """What real text scores: the horizontal lines of the plot.

  Attributes:
    genppl: the judge's perplexity of held-out text; None draws no line.
    entropy: its entropy in nats; None draws no line.
    label: what to call it.
    genppl_se: standard error of the first; None: it is not known.
    entropy_se: of the second.
  """

  genppl: float | None = None
  entropy: float | None = None
  label: str = "validation text"
  genppl_se: float | None = None
  entropy_se: float | None = None


def score(judge: JudgeWithTokens, tokens_NL: Int[np.ndarray, "N L"]) -> Reference:
  """Return what real text scores: GenPPL and entropy as of samples, with their errors.

  Args:
    judge: of `evaluate.judge.load_judge`.
    tokens_NL: held-out text in the generators' ids, as long as their samples.
  """
  count = len(tokens_NL)
  quality = judge.quality(tokens_NL, batch_size=min(count, 64))
  return Reference(
    genppl=quality.genppl,
    genppl_se=quality.genppl_se,
    entropy=quality.entropy,
    entropy_se=quality.entropy_se,
    label=f"{count} validation texts",
  )
