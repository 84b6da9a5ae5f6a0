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

import numpy as np

from dlm_jax.evaluate import frontier, generative, matched, tables
from dlm_jax.process import has_mask

_KEPT = ("temperature", "nucleus", "top_k")  # options that mean the same in the limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
  """What one sampler with one number of evaluations saves.

  Attributes:
    name: of the sampler.
    evaluations: n, true ones.
    entropy: nats, at which both are compared.
    genppl, genppl_se: of the sampler at that entropy.
    times: m/n; NaN where the baseline's curve does not reach its GenPPL from above.
    low, high: the same with both curves two combined standard errors worse and better; high is
      infinite where the baseline has points of more evaluations, but none at this entropy.
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

  @property
  def shown(self) -> bool:
    """Whether fewer evaluations do, beyond two combined standard errors."""
    return self.low > 1


def limit_name(baseline: str) -> str:
  """Return what the exact limit of a baseline is called."""
  return f"{baseline}, exact limit"


def limit(sampler: frontier.Sampler) -> frontier.Sampler | None:
  """Return a sampler's exact limit: one token per evaluation; None where there is no such.

  Those of masks have one; not those of proteins and conversations, whose texts differ in how many
  tokens they take.

  Args:
    sampler: with its temperature, nucleus and top-k, which the limit has too.
  """
  if isinstance(sampler, frontier.TemplateSampler) or not has_mask(sampler.process):
    return None
  options = {name: sampler.options[name] for name in _KEPT if name in sampler.options}
  options["sampler"] = "first_hitting"
  return dataclasses.replace(sampler, options=options, critic=None)


def savings(
  rows: Sequence[frontier.Row],
  baseline: str,
  entropy: float | None = None,
  *,
  most: int | None = None,
) -> list[Saving]:
  """Compare every sampler with a baseline at one entropy.

  Args:
    rows: of `matched.sweep`: every sampler at several temperatures and numbers of evaluations.
    baseline: name of the sampler that is to be saved; rows of its `limit_name` belong to it.
    entropy: nats; all are interpolated there, nothing is extrapolated. None: every row of the
      others as it is, at its own entropy; then only the baseline needs several temperatures.
    most: L, evaluations that a sequence of masks can use; rows of the baseline above are left out.

  Returns:
    One per sampler and number of evaluations whose temperatures enclose the entropy, or per row
    whose entropy the baseline's temperatures enclose.
  """
  names = (baseline, limit_name(baseline))
  base = [row for row in rows if row["name"] in names]
  base = [row for row in base if most is None or row["evaluations"] <= most]
  others = [row for row in rows if row["name"] not in names]
  if entropy is not None:
    others = matched.match(others, entropy)
  last = max((row["evaluations"] for row in base), default=0)
  found = []
  for row in others:
    curve = _curve(base, row["entropy"])
    if curve and math.isfinite(row["genppl"]):
      found.append(_saving(row, curve, last))
  return found


def nearest(rows: Sequence[frontier.Row], baseline: str) -> list[Saving]:
  """Return one saving per sampler and number of evaluations, at an entropy that was measured.

  Of several temperatures that is taken whose entropy is nearest to where most points of the
  baseline can be compared: a choice that its GenPPL has no part in.

  Args:
    rows: of `matched.sweep`; the baseline at two temperatures or more.
    baseline: name of the sampler that is to be saved.
  """
  names = (baseline, limit_name(baseline))
  groups = matched.groups([row for row in rows if row["name"] in names])
  wide = [row for group in groups if len(group) > 1 for row in group]
  middle = next(iter(matched.entropies(wide, 1) if wide else []), None)
  if middle is None:
    return []
  found: dict = {}
  for one in savings(rows, baseline):
    key, away = (one.name, one.evaluations), abs(one.entropy - middle)
    if key not in found or away < abs(found[key].entropy - middle):
      found[key] = one
  return sorted(found.values(), key=lambda one: (one.name, one.evaluations))


def _curve(base, entropy) -> list[tuple]:
  """Return evaluations, log GenPPL, its error, and its slope in entropy, of the baseline."""
  points = []
  for group in matched.groups(base):
    (at,) = matched.match(group, entropy)
    if math.isfinite(at["genppl"]):
      logs = [math.log(row["genppl"]) for row in group]
      slope = np.polyfit([row["entropy"] for row in group], logs, 1)[0]
      points.append(
        (at["evaluations"], math.log(at["genppl"]), at["genppl_se"] / at["genppl"], slope)
      )
  return sorted(points)


def table(rows: Sequence[frontier.Row], baseline: str, entropy: float | None = None) -> str:
  """Return the savings as a Markdown table.

  Args:
    rows: of `matched.sweep`.
    baseline: name of the sampler that is to be saved.
    entropy: nats; None: see `matched.entropies`.
  """
  found = [
    one
    for at in ([entropy] if entropy is not None else matched.entropies(rows))
    for one in savings(rows, baseline, at)
  ]
  if not found:
    return "no entropy that all reach lies between these temperatures: take wider ones."
  return tabled(sorted(found, key=lambda one: (one.name, one.entropy, one.evaluations)))


def by_name(found: Sequence[Saving]) -> dict[str, list[Saving]]:
  """Return savings by model, fewest evaluations first."""
  named: dict[str, list[Saving]] = {}
  for one in sorted(found, key=lambda one: one.evaluations):
    named.setdefault(one.name, []).append(one)
  return named


def tabled(found: Sequence[Saving]) -> str:
  """Return savings as a Markdown table, in their order."""
  cells = [
    (
      one.name,
      str(one.evaluations),
      f"{one.entropy:.2f}",
      generative.plus_minus(one.genppl, one.genppl_se),
      _times(one),
    )
    for one in found
  ]
  return tables.markdown(("model", "evaluations", "entropy", "GenPPL", "times fewer"), cells)


def told(one: Saving, baseline: str) -> str:
  """Say in a sentence what is shown: that fewer evaluations do, or that no difference is shown.

  Args:
    one: a saving.
    baseline: how to name the sampler that is to be saved.
  """
  what = (
    f'With {one.evaluations} evaluations "{one.name}" has GenPPL '
    f"{generative.plus_minus(one.genppl, one.genppl_se)} at an entropy of {one.entropy:.2f} nats"
  )
  if not one.shown:
    known = f"{one.times:.1f} times fewer {_bounds(one)}"
    known = "it is worse than with the fewest measured" if math.isnan(one.times) else known
    return f"{what}; beside {baseline} no saving is shown: {known}."
  needed = f"{one.times * one.evaluations:.0f}"
  if one.limited:
    needed += ", the last of its curve" if math.isfinite(one.high) else " or more"
  times = f"{one.times:.1f} times fewer evaluations {_bounds(one)}"
  return f"{what}, for which {baseline} needs {needed}: {times}."


def _times(one: Saving) -> str:
  if math.isnan(one.times):
    return "fewer than the baseline's first"
  return f"{one.times:.1f} {_bounds(one)}"


def _bounds(one: Saving) -> str:
  bounds = [f"{x:.1f}" if math.isfinite(x) else "?" for x in (one.low, one.high)]
  ended = one.limited and math.isfinite(one.high)
  return f"({' … '.join(bounds)}{', its limit' if ended else ''})"


def _saving(row, curve, last) -> Saving:
  """Compare; where the baseline's last point lies at other entropies, the upper end is open."""
  n, value = row["evaluations"], math.log(row["genppl"])
  _, _, error_there, slope = min(curve, key=lambda point: abs(point[1] - value))
  error_here = matched.error(row, slope)  # an interpolated row has no error of its entropy
  error = math.hypot(error_here, error_there)  # of the difference
  times, low, high = (_crossing(curve, value + shift * error) / n for shift in (0, 2, -2))
  if curve[-1][0] < last and value - 2 * error <= curve[-1][1]:
    high = math.inf
  return Saving(
    name=row["name"],
    evaluations=n,
    entropy=row["entropy"],
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
  for (m0, a, *_), (m1, b, *_) in itertools.pairwise(curve):
    if a >= value > b:
      return math.exp(math.log(m0) + (a - value) / (a - b) * math.log(m1 / m0))
  return float(curve[-1][0])
