# SPDX-License-Identifier: Apache-2.0
"""Savings at one entropy: constructed curves, and nothing where there is nothing."""

import math

import numpy as np
import pytest

from dlm_jax import process
from dlm_jax.evaluate import frontier, saving


def _row(name, nfe, temperature, genppl, entropy, *, error=0.01, evaluations=None):
  return {
    "name": name,
    "nfe": nfe,
    "evaluations": evaluations or nfe,
    "genppl": genppl,
    "genppl_se": error * genppl,
    "entropy": entropy,
    "entropy_se": 0.0,
    "correlation": 0.0,
    "distinct_4": 0.9,
    "samples": 512,
    "seconds": 1.0,
    "options": {"temperature": temperature},
  }


def _rows(name, nfes, genppl, **options):
  """GenPPL falls as a power of evaluations, and by e^(entropy) with the temperature."""
  return [
    _row(name, nfe, t, genppl(nfe) * math.exp(4 * (t - 1)), 4.8 + (t - 1), **options)
    for nfe in nfes
    for t in (0.9, 1.0)
  ]


TEACHER = _rows("teacher", (4, 8, 16, 32, 64, 256), lambda n: 100 * (1 + 8 / n))


@pytest.mark.parametrize("entropy", [4.7, 4.75, 4.8])
def test_a_sampler_with_half_the_evaluations_saves_two(entropy):
  half = _rows("half", (4, 8, 16), lambda n: 100 * (1 + 8 / (2 * n)))
  for found in saving.savings(TEACHER + half, "teacher", entropy):
    assert found.times == pytest.approx(2, rel=0.02) and found.low < 2 < found.high
    assert found.entropy == entropy and not found.limited


def test_the_teacher_itself_saves_nothing():
  for found in saving.savings(
    TEACHER + _rows("same", (4, 16), lambda n: 100 * (1 + 8 / n)), "teacher", 4.75
  ):
    assert found.times == pytest.approx(1) and (found.low < 1 or math.isnan(found.low))


def test_lower_temperatures_save_nothing():
  """They move along the curve: at one entropy they are the same model."""
  cold = [
    _row("cold", n, t, 100 * (1 + 8 / n) * math.exp(4 * (t - 1)), 4.8 + (t - 1))
    for n in (8, 16)
    for t in (0.85, 0.95, 0.98)
  ]
  for found in saving.savings(TEACHER + cold, "teacher", 4.74):
    assert found.times == pytest.approx(1, rel=0.01)


def test_no_more_is_saved_than_the_exact_limit_has():
  best = _rows("best", (4,), lambda n: 50.0)
  (found,) = saving.savings(TEACHER + best, "teacher", 4.75)
  assert found.limited and found.times == found.high == 64
  (found,) = saving.savings(TEACHER + best, "teacher", 4.75, most=64)
  assert found.times == 16
  worse = _rows("worse", (4,), lambda n: 100 * (1 + 8 / 256) * 1.005)
  (found,) = saving.savings(TEACHER + worse, "teacher", 4.75)
  assert found.limited and found.low < found.times < 64


def test_nothing_is_extrapolated():
  assert saving.savings(TEACHER + _rows("x", (4,), lambda n: 100.0), "teacher", 4.9) == []
  (found,) = saving.savings(TEACHER + _rows("x", (4,), lambda n: 900.0), "teacher", 4.75)
  assert math.isnan(found.times)


def test_errors_of_a_saving_hold():
  """Of 400 noisy samplers that save two, about 95 of 100 have two within their bounds."""
  rng, inside = np.random.default_rng(0), 0
  for _ in range(400):
    noisy = [
      {
        **row,
        "genppl": row["genppl"] * math.exp(0.03 * rng.normal()),
        "genppl_se": 0.03 * row["genppl"],
      }
      for row in _rows("half", (8,), lambda n: 100 * (1 + 8 / (2 * n)))
    ]
    (found,) = saving.savings(TEACHER + noisy, "teacher", 4.8)
    inside += found.low <= 2 <= found.high
  assert 0.92 < inside / 400 <= 0.99


def test_table():
  rows = TEACHER + _rows("half", (4, 8), lambda n: 100 * (1 + 8 / (2 * n)))
  text = saving.table(rows, "teacher")
  assert text.count("| half ") == 6 and "| 2.0 (" in text and "4.72" in text and "4.78" in text
  assert saving.table(rows, "teacher", 4.75).count("| half ") == 2
  apart = TEACHER + [
    {**row, "entropy": row["entropy"] - 1} for row in rows if row["name"] == "half"
  ]
  assert saving.table(apart, "teacher").startswith("no entropy that all reach")


def test_the_exact_limit_ends_the_curve_of_the_baseline():
  """It has a name of its own, and a place beside nominal steps that are as many."""
  curve = [row for row in TEACHER if row["nfe"] < 256]
  nominal = _rows("teacher", (256, 1024), lambda n: 110.0, evaluations=256)
  exact = _rows(saving.limit_name("teacher"), (256,), lambda n: 100 * (1 + 8 / 256))
  best = _rows("best", (4,), lambda n: 50.0)
  for others in (exact, nominal + exact):
    (found,) = saving.savings(curve + others + best, "teacher", 4.75)
    assert found.limited and found.times == found.high == 64, "never 1024 / 4"
  assert saving.limit_name("teacher") not in saving.table(curve + exact + best, "teacher")


def test_a_row_is_compared_at_its_own_entropy():
  """Then it needs one temperature; those that the baseline does not enclose are left out."""
  half = _rows("half", (4, 8), lambda n: 100 * (1 + 8 / (2 * n)))
  alone = [row for row in half if row["options"]["temperature"] == 1.0]
  found = saving.savings(TEACHER + alone, "teacher")
  assert [one.entropy for one in found] == [4.8, 4.8]
  assert all(one.times == pytest.approx(2, rel=0.02) for one in found)
  assert saving.savings([*TEACHER, {**alone[0], "entropy": 4.81}], "teacher") == []
  vague = [{**alone[0], "entropy_se": 0.1}]  # GenPPL goes as e^(4 entropy): 40 %
  (wide,) = saving.savings(TEACHER + vague, "teacher")
  assert wide.high > 2 * found[0].high and not wide.low > 1


def test_what_is_said_needs_two_errors():
  def told(times, error):
    rows = _rows("x", (8,), lambda n: 100 * (1 + 8 / (times * n)), error=error)
    (one,) = saving.savings(TEACHER + rows, "teacher", 4.8)
    return one.shown, saving.told(one, "the teacher")

  shown, text = told(2, 0.01)
  assert shown and text == (
    'With 8 evaluations "x" has GenPPL 150.0 ± 1.5 at an entropy of 4.80 nats, for which the '
    "teacher needs 16: 2.0 times fewer evaluations (1.9 … 2.2)."
  )
  shown, text = told(2, 0.2)
  assert not shown and "no saving is shown: 2.0 times fewer (" in text and "needs" not in text
  shown, text = told(1, 0.01)
  assert not shown and "no saving is shown" in text
  shown, text = told(0.5, 0.01)
  assert not shown and "needs" not in text
  worse = _rows("x", (4,), lambda n: 900.0)
  (one,) = saving.savings(TEACHER + worse, "teacher", 4.8)
  assert not one.shown and "it is worse than with the fewest measured" in saving.told(one, "it")


def test_a_sampler_like_the_baseline_is_seldom_said_to_save():
  """Of a number of evaluations that was chosen before, as reports do: one of 40, by two errors."""
  rng, said, runs = np.random.default_rng(0), 0, 400
  law = lambda n: 100 * (1 + 8 / n)  # noqa: E731
  for _ in range(runs):
    rows = TEACHER + _rows("same", (4, 8, 16), law)
    noisy = [
      {**row, "genppl": row["genppl"] * math.exp(0.05 * rng.normal())}
      | {"genppl_se": 0.05 * row["genppl"]}
      for row in rows
    ]
    at_one = [row for row in noisy if row["name"] != "same" or row["nfe"] == 8]
    said += any(one.shown for one in saving.savings(at_one, "teacher", 4.75))
  assert 0 < said / runs <= 0.05


def test_the_exact_limit_of_a_sampler():
  shared = {"denoiser": None, "length": 8}
  masks = process.Absorbing(vocab_size=5, mask_id=4)
  options = {"order": "spaced", "temperature": 0.9, "nucleus": 0.5, "noise_removal": "greedy"}
  exact = saving.limit(frontier.Sampler(process=masks, options=options, **shared))
  assert exact.options == {"temperature": 0.9, "nucleus": 0.5, "sampler": "first_hitting"}
  assert exact.nfes([4, 1024]) == [8] and exact.evaluations(8) == 8
  uniform = frontier.Sampler(process=process.Uniform(vocab_size=5), **shared)
  assert saving.limit(uniform) is None
  templates = frontier.TemplateSampler(process=masks, templates=lambda *_: None, **shared)
  assert saving.limit(templates) is None


def test_a_curve_that_ends_early_bounds_nothing_from_above():
  """The last point lies at lower entropies: here the baseline may need any number."""
  narrow = [row | {"entropy": row["entropy"] - (row["nfe"] == 256)} for row in TEACHER]
  (found,) = saving.savings(narrow + _rows("x", (8,), lambda n: 90.0), "teacher", 4.75)
  assert found.low == found.times == 8 and found.high == math.inf
  assert "needs 64 or more" in saving.told(found, "it")
  assert "8.0 times fewer evaluations (8.0 … ?)" in saving.told(found, "it")
  (inside,) = saving.savings(narrow + _rows("x", (8,), lambda n: 140.0), "teacher", 4.75)
  assert inside.high < 8 and not inside.limited


def test_nearest_takes_the_temperature_at_which_most_can_be_compared():
  """Whatever its GenPPL: of the two the colder lies beside all but one point of the baseline."""
  wide = _rows("teacher", (4, 8, 16), lambda n: 100 * (1 + 8 / n))
  exact = [
    row | {"entropy": row["entropy"] - 0.02}
    for row in _rows(saving.limit_name("teacher"), (64,), lambda n: 112.5)
  ]
  x = [_row("x", 4, t, genppl, h) for t, genppl, h in ((0.9, 90.0, 4.69), (1.0, 150.0, 4.74))]
  assert [one.entropy for one in saving.nearest(wide + exact + x, "teacher")] == [4.74]
  assert saving.nearest(wide[:1] + x, "teacher") == [], "one temperature compares nothing"
