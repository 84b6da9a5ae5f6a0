# SPDX-License-Identifier: Apache-2.0
"""Frontiers that were measured apart, as one: teachers over more evaluations than students, say."""

import math
from collections.abc import Sequence

from etils import epath

from dlm_jax import json_file
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier, matched
from dlm_jax.fields import SEED, Items, Kind, Number, Object, Optional, Text, Whole, build, read

_MEASURED = Optional(Number())  # JSON has no NaN
_BEFORE = {"correlation": 0.0, "distinct_4": None}  # of sweeps that have none yet
_KINDS: dict[str, Kind] = {
  "name": Text(),
  "nfe": Whole(1),
  "evaluations": Whole(1),
  "genppl": _MEASURED,
  "genppl_se": _MEASURED,
  "entropy": _MEASURED,
  "entropy_se": _MEASURED,
  "correlation": _MEASURED,
  "distinct_4": _MEASURED,
  "samples": Whole(1),
  "tokens": Whole(),
  "seconds": Number("[0, ∞)"),
  "seed": SEED,
  "options": Object(),
  "context": Object(),
}


SWEPT = "temperatures.json"  # of a sweep over temperatures: its rows


def join(
  directories: Sequence[epath.PathLike], file: str = "frontier.json"
) -> tuple[list[frontier.Row], frontier.Reference | None]:
  """Return the rows of finished sweeps, model by model, and the first score of real text.

  A row that two of them have is taken once.

  Args:
    directories: of sweeps.
    file: in each, as `frontier.write_json` writes it; `SWEPT`: of all temperatures.

  Raises:
    InputError: a file is missing or damaged, or they do not belong together: other judges, or one
      name for different networks, sampler options or measurements.
  """
  rows, references, of_name, at = [], [], {}, {}
  for directory in directories:
    found, reference = _read(directory, file)
    references += [] if reference is None else [reference]
    for row in found:
      _check_same(directory, of_name, "the judge", row["context"].get("judge"))
      _check_same(directory, of_name, f"the model {row['name']}", _model(row))
      place = row["name"], row["nfe"], row["options"].get("temperature")
      if place not in at:
        at[place] = row
        rows.append(row)
      elif str(at[place]) != str(row):  # NaN is not itself
        raise InputError(
          f"{directory}: {row['name']} at {row['nfe']} NFE was measured before, otherwise; join "
          "sweeps of other models or NFEs."
        )
  order = list(dict.fromkeys(row["name"] for row in rows))
  rows.sort(key=lambda row: (order.index(row["name"]), row["nfe"]))
  return rows, next(iter(references), None)


def _read(directory, file) -> tuple[list[frontier.Row], frontier.Reference | None]:
  path = epath.Path(directory) / file
  try:
    content = read("", json_file.read_object(path), {"rows": Items(), "reference": Kind()})
    rows = [read("", row, _KINDS, _BEFORE) for row in content["rows"]]
    real = content["reference"]
    reference = None if real is None else build(frontier.Reference, "", real)
  except (OSError, ValueError) as error:
    told = (getattr(error, "strerror", None) or str(error)).rstrip(".")
    which = " with --temperatures" if file == SWEPT else ""
    raise InputError(
      f"{path} cannot be joined: {told}; name workdirs of finished `dlm-jax frontier` runs{which}."
    ) from None
  return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows], reference


def _model(row) -> tuple:
  """Return what makes a model the same: its sampler's options and, if recorded, its weights.

  It may have been measured at several temperatures.
  """
  weights = row["context"].get("weights")
  options = matched.without_temperature(row["options"])
  return options, weights.get(row["name"]) if isinstance(weights, dict) else None


def _check_same(directory, seen, what, value) -> None:
  if seen.setdefault(what, value) != value:
    raise InputError(
      f"{directory}: {what} is another than before; join sweeps of one judge, in which a name "
      "means one network with the same options."
    )
