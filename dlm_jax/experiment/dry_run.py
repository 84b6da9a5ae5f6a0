# SPDX-License-Identifier: Apache-2.0
"""`--dry_run`: what a training run would be, without data, parameters or training."""

import math

import jax

from dlm_jax import mesh
from dlm_jax.data import dataset
from dlm_jax.experiment import build
from dlm_jax.experiment.plan import Plan
from dlm_jax.train import loop


def describe(plan: Plan, vocab_size: int) -> str:
  """Return shapes, parameters, shardings and a per-device memory estimate as text.

  Args:
    plan: of the run.
    vocab_size: tokens of the data, the mask not included.
  """
  built = build.experiment(plan, vocab_size)
  lines = [
    f"devices: {built.mesh.size} {jax.default_backend()}, mesh "
    + " × ".join(f"{axis}={size}" for axis, size in built.mesh.shape.items()),
    f"objective: {plan.objective.name}, trees: {', '.join(sorted(built.shapes.trees))}, "
    f"batches per step: {built.objective.batches} × {plan.batch_size} × "
    f"{plan.data.length} tokens",
    "",
    *_parameters(built),
    "",
    *_memory(built, plan),
  ]
  return "\n".join(lines)


def _parameters(built) -> list[str]:
  """Return one line per parameter of one tree."""
  tree = built.shapes.trees[built.objective.output]
  placed = built.shardings.trees[built.objective.output]
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  rows = [("parameter", "shape", "sharding")]
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placed), strict=True):
    name = "/".join(entry.key for entry in path)
    axes = ", ".join("-" if axis is None else str(axis) for axis in sharding.spec)
    rows.append((name, " × ".join(map(str, leaf.shape)), axes or "replicated"))
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  text = [
    "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows
  ]
  total = sum(math.prod(leaf.shape) for _, leaf in leaves)
  return [*text, f"{total:,} parameters per tree"]


def _memory(built, plan) -> list[str]:
  """Compile the step on shapes alone and ask the compiler what it needs."""
  step = loop.jit_step(built.objective, built.mesh, built.shardings, plan.seed)
  size = (built.objective.batches, plan.batch_size, plan.data.length)
  placed, data = mesh.batch_sharding(built.mesh, leading=1), plan.data
  records = {
    name: jax.ShapeDtypeStruct(size, dataset.FEATURES[name], sharding=placed)
    for name in dataset.features_of(data.packing, data.block_length)
  }
  analysis = step.lower(built.shapes, records).compile().memory_analysis()
  state = analysis.argument_size_in_bytes / 2**30
  work = analysis.temp_size_in_bytes / 2**30
  return [
    f"memory per device: {state:.2f} GiB state and batch + {work:.2f} GiB working = "
    f"{state + work:.2f} GiB (compiler's estimate on this back end)"
  ]
