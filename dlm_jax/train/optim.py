# SPDX-License-Identifier: Apache-2.0
"""Optimisers and learning-rate schedules from options."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import optax

from dlm_jax.errors import InputError, check_choice, hint
from dlm_jax.fields import Number, Whole, make

_MATRICES = ("kernel", "embedding", "gate", "up", "down")  # the latter three: of experts
SCHEDULES = ("constant", "cosine", "linear")
_RANGES = {
  "lr": "(0, ∞)",
  "final": "[0, 1]",
  "b1": "[0, 1)",
  "b2": "[0, 1)",
  "eps": "(0, ∞)",
  "weight_decay": "[0, ∞)",
  "clip": "[0, ∞)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """AdamW with warm-up.

  Attributes:
    lr: peak learning rate.
    warmup: updates of linear warm-up from 0; the first update has rate 0, as in the papers.
    schedule: after warm-up: "constant", or "cosine"/"linear" decay to `final` × lr.
    final: last learning rate over the peak.
    b1, b2, eps, weight_decay: of AdamW. Decay acts on matrices only.
    clip: largest global gradient norm; 0 clips nothing.

  Raises:
    InputError: a field of another type, a number out of range or an unknown schedule.
  """

  lr: float = 3e-4
  warmup: int = 2500
  schedule: str = "constant"
  final: float = 0.1
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float = 0.0

  def __post_init__(self):
    _check("optim", dataclasses.asdict(self))


def _check(group: str, values: dict[str, Any]) -> None:
  for name, value in values.items():
    if name in _RANGES:
      Number(_RANGES[name]).check(f"{group}.{name}", value)
    elif name == "warmup":
      Whole(0).check(f"{group}.warmup", value)
    elif name == "schedule":
      check_choice(f"{group}.schedule", value, SCHEDULES)


def per_tree(fields: dict[str, Any], trees: Iterable[str]) -> dict[str, OptimConfig]:
  """Return options per trained tree: the given ones, changed by the group of that tree's name.

  What a group leaves at None is as for all trees.

  Raises:
    InputError: a group names no tree, or holds what is no option.
  """
  groups = {name: value for name, value in fields.items() if isinstance(value, dict)}
  fields = {name: value for name, value in fields.items() if name not in groups}
  for name, changes in groups.items():
    if name not in trees:
      raise InputError(
        f"optim.{name} names no trained tree{hint(name, trees)}; there are {', '.join(trees)}."
      )
    if unknown := sorted(set(changes) - set(fields)):
      raise InputError(f"optim.{name}.{unknown[0]} is no field of optim{hint(unknown[0], fields)}.")
  own = {tree: {k: v for k, v in groups.get(tree, {}).items() if v is not None} for tree in trees}
  for tree, changes in own.items():
    _check(f"optim.{tree}", changes)
  given = {tree: {**fields, **own[tree]} for tree in trees}
  return {tree: make(OptimConfig, fields, "optim.") for tree, fields in given.items()}


def for_trees(
  fields: dict[str, Any], trees: Iterable[str], steps: int
) -> dict[str, optax.GradientTransformation]:
  """Build an optimiser per trained tree; arguments as for `per_tree` and `adamw`."""
  return {tree: adamw(config, steps) for tree, config in per_tree(fields, trees).items()}


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
  """Return the rate at each update, for a run of `steps` updates."""
  after = max(steps - config.warmup, 1)
  if config.schedule == "constant":
    main = optax.constant_schedule(config.lr)
  elif config.schedule == "cosine":
    main = optax.cosine_decay_schedule(config.lr, after, alpha=config.final)
  else:
    main = optax.linear_schedule(config.lr, config.lr * config.final, after)
  if config.warmup == 0:
    return main
  ramp = optax.linear_schedule(0.0, config.lr, config.warmup)
  return optax.join_schedules([ramp, main], [config.warmup])


def adamw(config: OptimConfig, steps: int) -> optax.GradientTransformation:
  """Build the optimiser of one tree, for a run of `steps` updates."""

  def matrices(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)

  main = optax.adamw(
    learning_rate(config, steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=matrices,
  )
  return optax.chain(optax.clip_by_global_norm(config.clip), main) if config.clip else main
