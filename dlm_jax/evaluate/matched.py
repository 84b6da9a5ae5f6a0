# SPDX-License-Identifier: Apache-2.0
"""GenPPL at one entropy: what is left of a gain that a lower temperature would bring as well.

A model can lower its GenPPL by narrowing its samples. Here every model is sampled at several
temperatures and log GenPPL is interpolated at a common entropy, per number of evaluations.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier


def sweep(
  samplers: Mapping[str, frontier.Sampler],
  nfes: Sequence[int],
  temperatures: Sequence[float],
  **options,
) -> list[frontier.Row]:
  """Measure every sampler at every temperature; rows of `frontier.sweep`, temperature in options.

  Args:
    samplers: by name; their own temperature is replaced.
    nfes: numbers of network evaluations.
    temperatures: 0 or more, at least two.
    **options: of `frontier.sweep`.

  Raises:
    InputError: fewer than two temperatures, or a negative one.
  """
  check_temperatures(temperatures)
  rows = []
  for temperature in dict.fromkeys(temperatures):
    at = {
      name: dataclasses.replace(s, options={**s.options, "temperature": temperature})
      for name, s in samplers.items()
    }
    rows += frontier.sweep(at, nfes, **options)
  return rows


def check_temperatures(temperatures: Sequence[float]) -> None:
  """Raise InputError unless there are two temperatures, and none is negative."""
  if len(set(temperatures)) < 2 or min(temperatures) < 0:
    raise InputError(
      f"temperatures={list(temperatures)}: give at least two, 0 or more, e.g. 0.8,0.9,1.0,1.1."
    )


def match(rows: Sequence[frontier.Row], entropy: float | None = None) -> list[frontier.Row]:
  """Interpolate rows of several temperatures at one entropy, in log GenPPL, linearly.

  Args:
    rows: of `sweep`.
    entropy: nats; None: at every NFE the `common_entropy` of its models.

  Returns:
    A row per model and NFE with the keys of `frontier.COLUMNS`; its options hold the interpolated
    temperature. GenPPL is NaN where no two temperatures enclose the entropy: nothing is
    extrapolated. Its standard error counts those of both GenPPLs and of both entropies, and that
    they vary together.
  """
  key = lambda row: (row["name"], row["nfe"])  # noqa: E731
  found = []
  for name, nfe in dict.fromkeys(map(key, rows)):
    group = [row for row in rows if key(row) == (name, nfe)]
    group.sort(key=lambda row: row["options"]["temperature"])
    same = [row for row in rows if row["nfe"] == nfe]
    found.append(_between(group, common_entropy(same) if entropy is None else entropy))
  return found


def common_range(rows: Sequence[frontier.Row]) -> tuple[float, float]:
  """Return the ends of the entropies that all models reach with all NFEs; NaN if there are none."""
  groups: dict = {}
  for row in rows:
    groups.setdefault((row["name"], row["nfe"]), []).append(row["entropy"])
  low, high = max(map(min, groups.values())), min(map(max, groups.values()))
  return (low, high) if low <= high else (math.nan, math.nan)


def common_entropy(rows: Sequence[frontier.Row]) -> float:
  """Return the middle of the entropies that every model reaches; NaN if there are none."""
  return sum(common_range(rows)) / 2


def _error(row, slope: float) -> float:
  """Return the standard error of log GenPPL, had the row's entropy been another one, exactly.

  GenPPL and entropy of samples rise together, so what the slope takes away it takes from both.
  """
  of_genppl, of_entropy = row["genppl_se"] / row["genppl"], slope * row["entropy_se"]
  both = row["correlation"] * of_genppl * of_entropy
  return math.sqrt(of_genppl**2 + of_entropy**2 - 2 * both)


def _between(group, entropy):
  temperatures = [row["options"]["temperature"] for row in group]
  result = {**group[0], "entropy": entropy, "entropy_se": 0.0, "genppl": math.nan}
  result |= {"genppl_se": math.nan, "options": {**group[0]["options"], "temperature": math.nan}}
  result["distinct_4"] = math.nan
  result["seconds"] = float(np.mean([row["seconds"] for row in group]))
  for (a, b), (cold, warm) in zip(
    itertools.pairwise(group), itertools.pairwise(temperatures), strict=True
  ):
    low, high = sorted((a["entropy"], b["entropy"]))
    if low <= entropy <= high and low < high:
      share = (entropy - a["entropy"]) / (b["entropy"] - a["entropy"])
      mix = lambda x, y, w=share: (1 - w) * x + w * y  # noqa: E731
      slope = math.log(b["genppl"] / a["genppl"]) / (b["entropy"] - a["entropy"])
      errors = [_error(row, slope) for row in (a, b)]
      result["genppl"] = math.exp(mix(math.log(a["genppl"]), math.log(b["genppl"])))
      result["genppl_se"] = result["genppl"] * math.hypot(
        (1 - share) * errors[0], share * errors[1]
      )
      result["distinct_4"] = mix(a["distinct_4"], b["distinct_4"])
      result["options"]["temperature"] = mix(cold, warm)
      break
  return result
