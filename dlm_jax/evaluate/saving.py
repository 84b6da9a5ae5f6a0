# SPDX-License-Identifier: Apache-2.0
"""How many times fewer evaluations, at one entropy, with its error.

The baseline's log GenPPL at that entropy falls with log evaluations; where another sampler's value
with n evaluations cuts the curve, at m, it saves m/n. No more is claimed than what the baseline can
use: a masked sequence of L tokens has at most L states, so its curve ends at its exact limit,
`first_hitting` with L evaluations, and nominal steps above L are no work.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from dlm_jax.evaluate import frontier, generative, matched, tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
  """What one sampler with one number of evaluations saves.

  Attributes:
    name: of the sampler.
    evaluations: n, true ones.
    entropy: nats, at which both are compared.
    genppl, genppl_se: of the sampler at that entropy.
    times: m/n; NaN where the baseline's curve does not reach its GenPPL from above.
    low, high: the same with both curves two combined standard errors worse and better.
    limited: whether the sampler is better than the baseline's last point, within an error: then m
      is that point's evaluations, and more cannot be told.
  """

  name: str
  evaluations: int
  entropy: float
  genppl: float
  genppl_se: float
  times: float
  low: float
  high: float
  limited: bool


def savings(
  rows: Sequence[frontier.Row], baseline: str, entropy: float, *, most: int | None = None
) -> list[Saving]:
  """Compare every sampler with a baseline at one entropy.

  Args:
    rows: of `matched.sweep`: every sampler at several temperatures and numbers of evaluations.
    baseline: name of the sampler that is to be saved; its exact limit is one of its rows.
    entropy: nats; all are interpolated there, nothing is extrapolated.
    most: L, evaluations that a sequence of masks can use; rows of the baseline above are left out.

  Returns:
    One per sampler and number of evaluations whose temperatures enclose the entropy.
  """
  at = [row for row in matched.match(rows, entropy) if math.isfinite(row["genppl"])]
  curve = sorted(
    (row["evaluations"], math.log(row["genppl"]), row["genppl_se"] / row["genppl"])
    for row in at
    if row["name"] == baseline and (most is None or row["evaluations"] <= most)
  )
  return [_saving(row, curve, entropy) for row in at if row["name"] != baseline and curve]


def entropies(rows: Sequence[frontier.Row], count: int = 3) -> list[float]:
  """Return entropies that every sampler reaches with every number of evaluations, evenly apart.

  Args:
    rows: of `matched.sweep`.
    count: how many; none if there is no common range.
  """
  low, high = matched.common_range(rows)
  steps = [(i + 0.5) / count for i in range(count)]
  return [low + step * (high - low) for step in steps] if low < high else []


def table(rows: Sequence[frontier.Row], baseline: str, entropy: float | None = None) -> str:
  """Return the savings as a Markdown table.

  Args:
    rows: of `matched.sweep`.
    baseline: name of the sampler that is to be saved.
    entropy: nats; None: see `entropies`.
  """
  found = [
    one
    for at in ([entropy] if entropy is not None else entropies(rows))
    for one in savings(rows, baseline, at)
  ]
  if not found:
    return "no entropy that all reach lies between these temperatures: take wider ones."
  cells = [
    (
      one.name,
      str(one.evaluations),
      f"{one.entropy:.2f}",
      generative.plus_minus(one.genppl, one.genppl_se),
      _times(one),
    )
    for one in sorted(found, key=lambda one: (one.name, one.entropy, one.evaluations))
  ]
  return tables.markdown(("model", "evaluations", "entropy", "GenPPL", "times fewer"), cells)


def _times(one: Saving) -> str:
  if math.isnan(one.times):
    return "fewer than the baseline's first"
  bounds = [f"{x:.1f}" if math.isfinite(x) else "?" for x in (one.low, one.high)]
  return f"{one.times:.1f} ({' … '.join(bounds)}{', its limit' if one.limited else ''})"


def _saving(row, curve, entropy) -> Saving:
  n, value = row["evaluations"], math.log(row["genppl"])
  nearest = min(curve, key=lambda point: abs(point[1] - value))
  error = math.hypot(row["genppl_se"] / row["genppl"], nearest[2])  # of the difference
  times, low, high = (_crossing(curve, value + shift * error) / n for shift in (0, 2, -2))
  return Saving(
    name=row["name"],
    evaluations=n,
    entropy=entropy,
    genppl=row["genppl"],
    genppl_se=row["genppl_se"],
    times=times,
    low=low,
    high=high,
    limited=value - curve[-1][1] <= error,
  )


def _crossing(curve, value) -> float:
  """Return the evaluations where the curve first has a value: NaN above it, the last below it."""
  if value > curve[0][1]:
    return math.nan
  for (m0, a, _), (m1, b, _) in itertools.pairwise(curve):
    if a >= value > b:
      return math.exp(math.log(m0) + (a - value) / (a - b) * math.log(m1 / m0))
  return float(curve[-1][0])
