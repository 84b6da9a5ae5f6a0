# SPDX-License-Identifier: Apache-2.0
"""Schedules: golden vectors, derivatives, inverses, the NELBO weight."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Methods
from given_schedule import Given

from dlm_jax import schedules

EPS = 1e-3


def _given(t):
  """A user's own α: convex, from 1 to about 1e-3, in plain jnp."""
  return (jnp.exp(-3.0 * t) - math.exp(-3.0)) / (1 - math.exp(-3.0)) * (1 - EPS) + EPS


ALL = {
  "log_linear": schedules.LogLinear(),
  "log_linear_eps": schedules.LogLinear(eps=0.05),
  "cosine": schedules.Cosine(),
  "polynomial_half": schedules.Polynomial(power=0.5),
  "polynomial_2": schedules.Polynomial(power=2.0),
  "polynomial_3": schedules.Polynomial(power=3.0, eps=0.01),
  "given": Given(function=_given),
}
every_schedule = pytest.mark.parametrize("schedule", list(ALL.values()), ids=list(ALL))


@contextlib.contextmanager
def _precision(dtype):
  with jax.enable_x64(dtype == np.float64):
    yield (lambda x: jnp.asarray(x, dtype))


# --- golden vectors --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,rtol", [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_golden_log_linear_sigma(golden, dtype, rtol):
  vectors, config = golden("noise_mdlm__a")
  schedule = schedules.LogLinear(eps=config["eps"])
  suffix = "_f64" if dtype == np.float64 else ""
  with _precision(dtype) as cast:
    t = cast(vectors["t"])
    sigma = schedule.sigma(t)
    assert sigma.dtype == dtype
    np.testing.assert_allclose(sigma, vectors["total_noise" + suffix], rtol=rtol, atol=1e-9)
    # dσ/dt = −α'/α, the reference's rate. Near t = 1 float32 α carries 6e-8/1e-3 relative error.
    rate = -schedule.dalpha(t) / schedule.alpha(t)
    loose = 1e-4 if dtype == np.float32 else rtol
    np.testing.assert_allclose(rate, vectors["rate_noise" + suffix], rtol=loose)


@pytest.mark.parametrize("dtype,rtol", [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize("name", ["loglinear", "cosine"])
def test_golden_alpha_and_its_derivative(golden, name, dtype, rtol):
  vectors, config = golden("noise_duo__a")
  eps = config["eps"]
  schedule = {"loglinear": schedules.LogLinear, "cosine": schedules.Cosine}[name](eps=eps)
  suffix = "_f64" if dtype == np.float64 else ""
  # The reference's cosine derivative lacks the factor 1 − ε of the chain rule; ours has it.
  factor = 1 - eps if name == "cosine" else 1.0
  with _precision(dtype) as cast:
    t = cast(vectors["t"])
    alpha, dalpha = schedule.alpha(t), schedule.dalpha(t)
    assert alpha.dtype == dalpha.dtype == dtype
    # α is a difference of O(1) numbers: its float32 error is absolute, about one unit of 2⁻²⁴.
    atol = 1e-12 if dtype == np.float64 else 2e-7
    np.testing.assert_allclose(alpha, vectors[f"{name}/alpha{suffix}"], rtol=rtol, atol=atol)
    recorded = vectors[f"{name}/dalpha{suffix}"] * factor
    np.testing.assert_allclose(dalpha, recorded, rtol=rtol, atol=atol)
    if dtype == np.float64:
      recorded = vectors[f"{name}/sigma_f64"]
      np.testing.assert_allclose(schedule.sigma(t), recorded, rtol=1e-9, atol=1e-12)


def test_the_cosine_factor_is_visible(golden):
  """Guard the test above: without the factor the float64 comparison would fail."""
  vectors, config = golden("noise_duo__a")
  with jax.enable_x64(True):
    ours = np.asarray(schedules.Cosine(eps=config["eps"]).dalpha(jnp.asarray(vectors["t"], float)))
  assert np.max(np.abs(ours / vectors["cosine/dalpha_f64"] - 1)) > 5e-4


# --- properties of every schedule -------------------------------------------------------------


@every_schedule
def test_ends_and_monotonicity(schedule):
  schedule = Methods(schedule)
  t = jnp.linspace(0.0, 1.0, 257)
  alpha = np.asarray(schedule.alpha(t))
  np.testing.assert_allclose(alpha[0], 1.0, atol=2e-3)  # cosine starts at 1 − cos(π/2) = 1
  assert 0 < alpha[-1] < 0.06
  assert np.all(np.diff(alpha) < 0)
  inner = np.asarray(schedule.dalpha(t[1:]))
  assert np.all(inner < 0)


@every_schedule
def test_dalpha_is_the_derivative(schedule):
  schedule = Methods(schedule)
  with jax.enable_x64(True):
    t = jnp.linspace(0.02, 0.98, 97)
    step = 1e-6
    difference = (schedule.alpha(t + step) - schedule.alpha(t - step)) / (2 * step)
    np.testing.assert_allclose(schedule.dalpha(t), difference, rtol=1e-6, atol=1e-8)
    gradient = jax.jit(jax.vmap(jax.grad(lambda u: schedule.alpha(u))))(t)
    np.testing.assert_allclose(schedule.dalpha(t), gradient, rtol=1e-10, atol=1e-12)


@every_schedule
def test_weight_and_sigma_follow_from_alpha(schedule):
  schedule = Methods(schedule)
  with jax.enable_x64(True):
    t = jnp.linspace(0.01, 1.0, 100)
    expected = -schedule.dalpha(t) / (1 - schedule.alpha(t))
    np.testing.assert_allclose(schedule.weight(t), expected, rtol=1e-9)
    np.testing.assert_allclose(schedule.sigma(t), -jnp.log(schedule.alpha(t)), rtol=1e-9)


@every_schedule
def test_inverse_undoes_alpha(schedule):
  schedule = Methods(schedule)
  with jax.enable_x64(True):
    t = jnp.linspace(0.01, 1.0, 100)
    np.testing.assert_allclose(schedule.inverse(schedule.alpha(t)), t, atol=2e-9, rtol=0)
  t = jnp.linspace(0.05, 0.95, 91, dtype=jnp.float32)
  # α changes by |α'| dt, so a float32 rounding of α moves t by about 6e-8/|α'|.
  slack = 4e-7 * (1 + 1 / np.abs(np.asarray(schedule.dalpha(t))))
  assert np.all(np.abs(np.asarray(schedule.inverse(schedule.alpha(t)) - t)) < slack)


def test_log_linear_weight_is_exactly_one_over_t():
  t = jnp.array([1e-5, 1e-3, 0.25, 1.0], jnp.float32)
  np.testing.assert_array_equal(schedules.LogLinear().weight(t), np.float32(1) / np.asarray(t))


def test_polynomial_of_power_one_is_log_linear():
  t = jnp.linspace(0.01, 1.0, 50)
  one, line = schedules.Polynomial(power=1.0), schedules.LogLinear()
  for name in ("alpha", "dalpha", "weight"):
    np.testing.assert_allclose(getattr(one, name)(t), getattr(line, name)(t), rtol=1e-6)


@every_schedule
def test_scalars_python_floats_and_transformations(schedule):
  for name in ("alpha", "dalpha", "weight", "sigma"):
    function = getattr(schedule, name)
    eager = function(0.3)
    assert jnp.shape(eager) == ()
    np.testing.assert_allclose(jax.jit(function)(jnp.float32(0.3)), eager, rtol=1e-6)
    t = jnp.array([[0.2, 0.3], [0.4, 0.5]])
    assert function(t).shape == (2, 2)
    np.testing.assert_allclose(jax.vmap(jax.vmap(function))(t), function(t), rtol=1e-6)


@every_schedule
def test_schedules_are_frozen_and_hashable(schedule):
  assert hash(schedule) == hash(dataclasses.replace(schedule))
  assert schedule == dataclasses.replace(schedule)
  field = dataclasses.fields(schedule)[0].name
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(schedule, field, 1)


def test_make_builds_by_name_and_names_the_choices():
  assert schedules.make("cosine", eps=0.1) == schedules.Cosine(eps=0.1)
  assert schedules.make() == schedules.LogLinear()
  with pytest.raises(ValueError, match="log_linear") as error:
    schedules.make("log-linear")
  assert "\n" not in str(error.value)
