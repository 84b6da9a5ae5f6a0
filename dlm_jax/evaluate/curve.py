# SPDX-License-Identifier: Apache-2.0
"""How much better than a teacher at its best temperature: GenPPL at the student's own entropy.

A student can lower its GenPPL by narrowing its samples, and so can its teacher, by a lower
temperature. So the teacher is sampled once at several temperatures, a curve of log GenPPL over
entropy per number of evaluations, and a student's score is what it lies above that curve at its own
entropy: 0 for one that has but narrowed, negative for one that is better.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dlm_jax.evaluate import frontier, matched
from dlm_jax.evaluate.generative import Quality

_KEPT = ("genppl", "genppl_se", "entropy", "entropy_se", "correlation")


def row(temperature: float, quality: Quality) -> dict[str, float]:
  """Return a point of a curve, JSON-able."""
  return {"temperature": temperature} | {name: getattr(quality, name) for name in _KEPT}


def above(curve: Sequence[Mapping[str, Any]], quality: Quality) -> tuple[float, float]:
  """Return log GenPPL of samples minus the curve's at their entropy, and its standard error.

  Args:
    curve: of `row`, of one number of evaluations.
    quality: of the samples.

  Returns:
    NaN twice where no two temperatures enclose the entropy: nothing is extrapolated. The error
    counts those of both sides, of GenPPL and of entropy, and that these vary together; it takes the
    samples for independent of the curve's.
  """
  points = sorted(curve, key=lambda point: point["temperature"])
  blank = dict.fromkeys(frontier.COLUMNS, math.nan)
  rows = [{**blank, **p, "options": {"temperature": p["temperature"]}} for p in points]
  rows = [{**one, "name": "teacher", "nfe": 0} for one in rows]
  (at,) = matched.match(rows, entropy=quality.entropy)
  if not (at["genppl"] > 0 and quality.genppl > 0):  # NaN is not
    return math.nan, math.nan
  warmer = next(i for i, p in enumerate(points) if p["temperature"] >= at["options"]["temperature"])
  a, b = points[max(warmer, 1) - 1], points[max(warmer, 1)]
  slope = math.log(b["genppl"] / a["genppl"]) / (b["entropy"] - a["entropy"])
  own = matched.error(row(1.0, quality), slope)
  error = math.hypot(own, at["genppl_se"] / at["genppl"])
  return math.log(quality.genppl / at["genppl"]), error
