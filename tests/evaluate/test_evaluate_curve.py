# SPDX-License-Identifier: Apache-2.0
"""A student's score against the teacher's temperatures: by hand, and its standard error."""

import math

import numpy as np
import pytest

from dlm_jax.evaluate import curve
from dlm_jax.evaluate.generative import Quality

RHO = 0.6


def _quality(genppl, entropy, genppl_se=0.0, entropy_se=0.0):
  sizes = {"samples": 64, "tokens": 640, "correlation": RHO}
  return Quality(
    genppl=genppl, genppl_se=genppl_se, entropy=entropy, entropy_se=entropy_se, **sizes
  )


# log GenPPL 4, 5 and 7 at entropies 3, 4 and 5; out of order, as they may be measured
CURVE = [
  curve.row(t, _quality(math.exp(nll), entropy))
  for t, nll, entropy in ((1.0, 5, 4.0), (0.8, 4, 3.0), (1.2, 7, 5.0))
]


@pytest.mark.parametrize(
  "entropy, nll, score",
  [
    (4.0, 5.0, 0.0),
    (3.5, 4.5, 0.0),
    (3.0, 3.5, -0.5),
    (4.5, 6.3, 0.3),
    (5.0, 6.9, -0.1),
    (2.9, 1.0, math.nan),
    (5.1, 1.0, math.nan),
  ],
)
def test_by_hand(entropy, nll, score):
  """Narrowing alone, along the curve, is worth nothing; beyond its ends nothing is said."""
  found, error = curve.above(CURVE, _quality(math.exp(nll), entropy))
  np.testing.assert_allclose(found, score, atol=1e-6)
  assert math.isnan(error) if math.isnan(score) else error == 0


def test_samples_without_a_token_have_no_score():
  assert math.isnan(curve.above(CURVE, _quality(math.nan, 4.0))[0])


@pytest.mark.parametrize("entropy, slope", [(3.25, 1.0), (4.75, 2.0)])
def test_the_error_is_that_of_simulated_runs(entropy, slope):
  """Both sides are drawn with errors, which rise together, and scored."""
  rng, sd, count = np.random.default_rng(0), np.array([0.02, 0.015]), 4000
  cov = np.outer(sd, sd) * np.array([[1, RHO], [RHO, 1]])

  def drawn(nll, entropy):
    nll, entropy = rng.multivariate_normal([nll, entropy], cov)
    return _quality(math.exp(nll), entropy, sd[0] * math.exp(nll), sd[1])

  scores, errors = [], []
  for _ in range(count):
    points = ((0.8, 4, 3.0), (1.0, 5, 4.0), (1.2, 7, 5.0))
    noisy = [curve.row(t, drawn(nll, mean)) for t, nll, mean in points]
    score, error = curve.above(noisy, drawn(4.0 if slope == 1 else 6.4, entropy))
    scores.append(score)
    errors.append(error)
  np.testing.assert_allclose(np.mean(errors), np.std(scores), rtol=0.06)
