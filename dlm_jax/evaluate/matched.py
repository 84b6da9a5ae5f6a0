# SPDX-License-Identifier: Apache-2.0
"""GenPPL at one entropy: what is left of a gain that a lower temperature would bring as well.

A model can lower its GenPPL by narrowing its samples. Here every model is sampled at several
temperatures and log GenPPL is interpolated at a common entropy, per number of evaluations.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier, generative, tables


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
    rows += sweep_at(samplers, nfes, temperature, **options)
  return rows


def sweep_at(
  samplers: Mapping[str, frontier.Sampler],
  nfes: Sequence[int],
  temperature: float,
  **options,
) -> list[frontier.Row]:
  """Measure every sampler at one temperature, whatever it had; see `sweep`.

  What `frontier.sweep` has measured without a temperature is not measured again for 1.
  """
  warmth = {} if temperature == 1 else {"temperature": temperature}
  changed = {}
  for name, sampler in samplers.items():
    own = without_temperature(sampler.options)
    changed[name] = dataclasses.replace(sampler, options=own | warmth)
  rows = frontier.sweep(changed, nfes, **options)
  return [row | {"options": {**row["options"], "temperature": temperature}} for row in rows]


def without_temperature(options: Mapping[str, Any]) -> dict[str, Any]:
  """Return the options of a sampler that it has at every temperature."""
  return {name: value for name, value in options.items() if name != "temperature"}


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
    A row per model, its options and NFE with the keys of `frontier.COLUMNS`; its options hold the
    interpolated temperature. GenPPL is NaN where no two temperatures enclose the entropy: nothing
    is extrapolated. Its standard error counts those of both GenPPLs and of both entropies, and
    that they vary together.
  """
  found = []
  for group in groups(rows):
    same = [row for row in rows if row["nfe"] == group[0]["nfe"]]
    found.append(_between(group, common_entropy(same) if entropy is None else entropy))
  return found


def groups(rows: Sequence[frontier.Row]) -> list[list[frontier.Row]]:
  """Return the rows that differ in their temperature only, together, the coldest first."""
  found: dict = {}
  for row in rows:
    others = without_temperature(row["options"])
    found.setdefault((row["name"], row["nfe"], repr(sorted(others.items()))), []).append(row)
  return [sorted(group, key=lambda row: row["options"]["temperature"]) for group in found.values()]


def common_range(rows: Sequence[frontier.Row]) -> tuple[float, float]:
  """Return the ends of the entropies that all models reach with all NFEs; NaN if there are none."""
  ends = _ends(rows)
  low, high = max(low for _, low, _ in ends), min(high for _, _, high in ends)
  return (low, high) if low <= high else (math.nan, math.nan)


def _ends(rows) -> list[tuple[str, float, float]]:
  """Return name, least and largest entropy of every group."""
  found = []
  for group in groups(rows):
    reached = [row["entropy"] for row in group]
    found.append((group[0]["name"], min(reached), max(reached)))
  return found


def common_entropy(rows: Sequence[frontier.Row]) -> float:
  """Return the middle of the entropies that every model reaches; NaN if there are none."""
  return sum(common_range(rows)) / 2


def entropies(rows: Sequence[frontier.Row], count: int = 3) -> list[float]:
  """Return entropies that every model reaches, evenly apart; with every NFE, if there are such.

  Otherwise they lie where as many rows as possible, and some of every model, can be compared.

  Args:
    rows: of `sweep`.
    count: how many; none are returned if the models have no entropy in common.
  """
  ends = _ends(rows)
  places = sorted({end for _, *both in ends for end in both})
  best = (0, 0.0, 0.0)
  for low, high in itertools.pairwise(places):
    there = [name for name, least, most in ends if least <= low and high <= most]
    if set(there) == {name for name, *_ in ends}:
      best = max(best, (len(there), high - low, low))
  _, width, low = best
  return [low + (i + 0.5) / count * width for i in range(count)] if width else []


def table(rows: Sequence[frontier.Row], nats: Sequence[float]) -> str:
  """Return GenPPL at some entropies as a Markdown table; "–" where a model does not reach one.

  Args:
    rows: of `sweep`.
    nats: entropies.
  """
  columns = [match(rows, entropy) for entropy in nats]
  cells = [
    (same[0]["name"], str(same[0]["evaluations"]), *(_shown(row) for row in same))
    for same in zip(*columns, strict=True)
  ]
  titles = (f"GenPPL at {entropy:.2f} nats" for entropy in nats)
  return tables.markdown(("model", "evaluations", *titles), cells)


def _shown(row) -> str:
  finite = math.isfinite(row["genppl"])
  return generative.plus_minus(row["genppl"], row["genppl_se"]) if finite else "–"


def error(row: frontier.Row, slope: float) -> float:
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
      errors = [error(row, slope) for row in (a, b)]
      result["genppl"] = math.exp(mix(math.log(a["genppl"]), math.log(b["genppl"])))
      result["genppl_se"] = result["genppl"] * math.hypot(
        (1 - share) * errors[0], share * errors[1]
      )
      result["distinct_4"] = mix(a["distinct_4"], b["distinct_4"])
      result["options"]["temperature"] = mix(cold, warm)
      break
  return result
