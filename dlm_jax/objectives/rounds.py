# SPDX-License-Identifier: Apache-2.0
"""Distillation in rounds: a student becomes its own teacher; how far two predictions differ."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dlm_jax.errors import InputError
from dlm_jax.objectives.state import TrainState

DIVERGENCES = ("kl-bwd", "kl-fwd", "mse", "tvd")


def divergence(
  log_student: Float[Array, "*rows V"], log_teacher: Float[Array, "*rows V"], kind: str
) -> Float[Array, "*rows"]:
  """Return how far a student's log-probabilities are from its teacher's, per row.

  Args:
    log_student, log_teacher: log-probabilities; impossible tokens hold about −1e6.
    kind: "kl-bwd" is KL(student ‖ teacher) and "kl-fwd" KL(teacher ‖ student), in nats; "mse" and
      "tvd" are the mean square and the sum of absolute differences of log-probabilities over the
      vocabulary, impossible tokens included, under the names that the SDTT code gives them.
  """
  difference = log_student - log_teacher
  if kind == "kl-bwd":
    return jnp.sum(jnp.exp(log_student) * difference, axis=-1)
  if kind == "kl-fwd":
    return -jnp.sum(jnp.exp(log_teacher) * difference, axis=-1)
  if kind == "mse":
    return jnp.mean(difference**2, axis=-1)
  # Not jnp.abs: its derivative at 0 is 1, and a student starts there, equal to its teacher.
  return jnp.sum(jax.lax.stop_gradient(jnp.sign(difference)) * difference, axis=-1)


def check_divergence(kind: str, allowed: tuple[str, ...]) -> None:
  """Check a name from a config.

  Raises:
    InputError: it is not among the allowed ones.
  """
  if kind not in allowed:
    raise InputError(f"objective.divergence={kind!r} is unknown; use one of {', '.join(allowed)}.")


def check_round(update_teacher_every: int) -> None:
  """Check the length of a round.

  Raises:
    InputError: it is below 1.
  """
  if update_teacher_every < 1:
    raise InputError(f"objective.update_teacher_every={update_teacher_every} must be at least 1.")


def doubled(step: Int[Array, ""], every: int, most: float | int) -> Float[Array, ""]:
  """Return 2ⁿ in round n = ⌊step/every⌋, never more than `most`."""
  rounds = jnp.asarray(step // every, jnp.float32)
  return jnp.minimum(jnp.exp2(jnp.minimum(rounds, 64.0)), most)


def refresh_teacher(state: TrainState, every: int) -> TrainState:
  """Copy the student's raw parameters, not their average, to the teacher at a round's first step.

  The optimiser's state stays.
  """
  due = state.step % every == 0
  teacher = jax.tree.map(
    lambda new, old: jnp.where(due, new, old), state.trees["student"], state.trees["teacher"]
  )
  return state.replace(trees={**state.trees, "teacher": teacher})
