# SPDX-License-Identifier: Apache-2.0
"""Comparison at matched entropy: interpolation by hand, no extrapolation, bad input."""

import json
import math

import numpy as np
import pytest

from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier, matched


def _row(name, nfe, temperature, genppl, entropy, genppl_se=0.0, correlation=0.0):
  return {
    "name": name,
    "nfe": nfe,
    "evaluations": nfe,
    "genppl": genppl,
    "genppl_se": genppl_se,
    "entropy": entropy,
    "entropy_se": 0.02,
    "correlation": correlation,
    "distinct_4": 0.9,
    "samples": 8,
    "tokens": 64,
    "seconds": 2.0,
    "seed": 0,
    "options": {"temperature": temperature},
    "context": {},
  }


ROWS = [
  _row("a", 4, 0.8, 50.0, 4.0, 5.0),
  _row("a", 4, 1.0, 200.0, 5.0, 20.0),
  _row("b", 4, 1.0, 90.0, 4.8),
  _row("b", 4, 0.8, 60.0, 4.2),
  _row("b", 4, 0.6, 30.0, 3.0),
]


def test_interpolation_by_hand():
  """Half-way in entropy: the geometric mean, and half-way in temperature."""
  a, b = matched.match(ROWS, 4.5)
  np.testing.assert_allclose([a["genppl"], a["options"]["temperature"]], [100.0, 0.9])
  slope = math.log(200 / 50) / (5 - 4)
  error = math.hypot(0.1, slope * 0.02)  # of either end: its GenPPL's, and its entropy's
  np.testing.assert_allclose(a["genppl_se"], 100 * math.hypot(error / 2, error / 2))
  np.testing.assert_allclose(b["genppl"], math.sqrt(60 * 90))
  assert tuple(a) == frontier.COLUMNS and a["entropy"] == 4.5


@pytest.mark.parametrize("together", [0.0, 0.8])
def test_errors_that_vary_together(together):
  """The stated error is the spread of what is stated, over draws of both ends."""
  ends = ((0.8, 50.0, 4.0), (1.0, 100.0, 5.0))
  slope, spread = math.log(2), 0.06

  def row(temperature, genppl, entropy, noise=(0.0, 0.0)):
    drawn = genppl * math.exp(spread * noise[0]), entropy + spread / slope * noise[1]
    made = _row("a", 4, temperature, *drawn, spread * drawn[0], together)
    return made | {"entropy_se": spread / slope}

  (stated,) = matched.match([row(*end) for end in ends], 4.5)
  shape = [[1.0, together], [together, 1.0]]
  noise = np.random.default_rng(0).multivariate_normal([0, 0], shape, (3000, 2))
  found = [
    matched.match([row(*end, pair) for end, pair in zip(ends, pairs, strict=True)], 4.5)[0]
    for pairs in noise
  ]
  assert np.std([row["genppl"] for row in found]) == pytest.approx(stated["genppl_se"], rel=0.06)


def test_nothing_is_extrapolated():
  a, b = matched.match(ROWS, 3.5)
  assert math.isnan(a["genppl"]) and 30 < b["genppl"] < 60


def test_every_nfe_has_an_entropy_of_its_own():
  rows = [*ROWS, _row("a", 8, 0.8, 20.0, 6.0), _row("a", 8, 1.0, 40.0, 7.0)]
  assert [row["entropy"] for row in matched.match(rows)] == [4.4, 4.4, 6.5]


def test_rows_without_a_match_are_written(tmp_path):
  paths = frontier.write(matched.match(ROWS, 3.5), tmp_path, stem="matched")
  content = json.loads(paths["json"].read_text())["rows"]
  assert content[0]["genppl"] is None and content[0]["options"]["temperature"] is None


def test_the_entropy_that_all_reach():
  assert matched.common_entropy(ROWS) == pytest.approx((4.0 + 4.8) / 2)
  assert math.isnan(matched.common_entropy([*ROWS, _row("c", 4, 1.0, 9.0, 6.0)]))


@pytest.mark.parametrize("temperatures", [[], [1.0], [1.0, 1.0], [-0.1, 1.0]])
def test_temperatures_are_checked(temperatures):
  matched.check_temperatures([0.0, 1.0])
  with pytest.raises(InputError, match="at least two, 0 or more"):
    matched.sweep({}, [4], temperatures or [1.0])


def test_entropies_lie_where_most_can_be_compared():
  """Rows of one evaluation reach none that the others have; every model must be there."""
  rows = [*ROWS, _row("a", 1, 0.8, 900.0, 6.0), _row("a", 1, 1.0, 950.0, 6.5)]
  assert matched.entropies(ROWS) == pytest.approx([4 + 1 / 6 * 0.8, 4.4, 4 + 5 / 6 * 0.8])
  assert matched.entropies(rows) == matched.entropies(ROWS)
  assert matched.entropies(ROWS, 1) == pytest.approx([4.4])
  apart = [row | {"entropy": row["entropy"] - 2 * (row["name"] == "b")} for row in ROWS]
  assert matched.entropies(apart) == []


def test_table_at_common_entropies():
  """Evaluations are those made; a row that does not reach an entropy has a dash."""
  rows = [row | {"evaluations": row["nfe"] + 1} for row in ROWS]
  lines = matched.table(rows, [3.5, 4.5]).splitlines()
  assert "GenPPL at 3.50 nats" in lines[0] and "evaluations" in lines[0]
  a = [cell.strip() for cell in lines[2].split("|")[1:-1]]
  assert a[:3] == ["a", "5", "–"] and a[3].startswith("100.0 ± ")
  assert len(lines) == 4 and "–" not in lines[3]


def test_orders_of_one_name_are_not_mixed():
  """Only rows that differ in nothing but their temperature are interpolated."""
  other = [row | {"options": {**row["options"], "order": "spaced"}} for row in ROWS[:2]]
  found = matched.match([*ROWS[:2], *other], 4.5)
  assert len(found) == 2 and found[1]["options"]["order"] == "spaced"
