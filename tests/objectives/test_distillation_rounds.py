# SPDX-License-Identifier: Apache-2.0
"""Distillation in rounds, whatever the method: who becomes the teacher, micro-batches."""

import functools

import jax
import numpy as np
import pytest
import tiny
from compiled import at_most

from dlm_jax.objectives import dcd, sdtt

every_method = pytest.mark.parametrize(
  "method", [pytest.param(dcd, marks=pytest.mark.slow), sdtt], ids=["dcd", "sdtt"]
)


@every_method
def test_the_raw_student_becomes_the_teacher(method):
  objective, state = tiny.distillation(method, update_teacher_every=2)
  step, states = jax.jit(at_most(objective.step)), [state]  # a new round compiles nothing
  for n in range(5):
    states.append(step(states[-1], tiny.batch(n))[0])
  students, teachers = ([s.trees[k] for s in states] for k in ("student", "teacher"))
  for n, source in enumerate([0, 0, 0, 2, 2, 4]):  # state n is the one after n steps
    assert tiny.equal(teachers[n], students[source]), n
  assert not tiny.equal(students[2], students[0])
  assert not tiny.equal(teachers[3], states[2].ema["student"])


@pytest.mark.slow  # shorter in the contract tests
@every_method
def test_micro_batches_change_nothing(method):
  """Even though, with masks, they hold different numbers of scored positions."""
  ends = []
  for count in (1, 4):
    objective, state = tiny.distillation(method, accumulate=count, update_teacher_every=1)
    step = jax.jit(objective.step)
    for n in range(2):
      state, _ = step(state, tiny.batch(n))
    ends.append(state.trees)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *ends)
