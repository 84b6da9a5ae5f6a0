# SPDX-License-Identifier: Apache-2.0
"""What every training method shares: the state, one `update`, the batch with its keys and times.

A method is an `Objective`: two pure functions and two facts about them. Its `step` is two or three
calls of `update` in plain sight.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dlm_jax.arrays import Metrics, Params, RngKey
from dlm_jax.errors import InputError
from dlm_jax.objectives.batch import Batch
from dlm_jax.objectives.options import MethodOptions

Loss = Callable[[Params, Batch], tuple[Array, tuple[Metrics, Any]]]
Optimizers = dict[str, optax.GradientTransformation]  # by trained tree


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes. No key inside: keys are folded from the seed and the step.

  Attributes:
    step: int32, completed steps.
    trees: parameter trees by name, float32; frozen ones too.
    opt: optimiser state per trained tree.
    ema: exponential moving average per averaged tree.
    aux: non-trained collections by name.
  """

  # Any: in trees of shapes or shardings, and for Orbax where empty, they hold something else.
  step: Any
  trees: dict[str, Params]
  opt: Any
  ema: Any
  aux: Any = flax.struct.field(default_factory=dict)


def _export_nothing(state: TrainState) -> dict[str, Any]:
  del state
  return {}


class Objective(NamedTuple):
  """A training method.

  Attributes:
    init: (rng, teacher_params or None) -> TrainState; every tree is its own copy.
    step: (state, batch) -> (state, metrics), pure. With `batches` > 1 it takes a tuple of batches.
    output: the tree that is sampled from and exported.
    batches: fresh global batches that one step consumes.
    check: raises InputError if a state at step 0 is not a start; called with real arrays.
    axes: trees of logical axis names of networks other than the model, see `Network.axes`.
    export: returns what belongs to the exported network besides its parameters, as arguments of
      `convert.save`: {"beside": {"discriminator": critic}, "block_length": 4, "extra": facts}.
  """

  init: Callable[..., TrainState]
  step: Callable[..., tuple[TrainState, Metrics]]
  output: str = "model"
  batches: int = 1
  check: Callable[[TrainState], None] | None = None
  axes: tuple[Any, ...] = ()
  export: Callable[[TrainState], dict[str, Any]] = _export_nothing


def make_state(
  trees: dict[str, Params],
  optimizers: Optimizers,
  averaged: tuple[str, ...] = (),
) -> TrainState:
  """Build the state at step 0.

  Every tree is copied: a buffer that appears twice cannot be donated twice.
  """
  copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
  trees = {name: copy(tree) for name, tree in trees.items()}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trees=trees,
    opt={name: tx.init(trees[name]) for name, tx in optimizers.items()},
    ema={name: copy(trees[name]) for name in averaged},
  )


def init_alone(
  model: Any, tx: optax.GradientTransformation, options: MethodOptions, *, timed: bool = True
) -> Callable[..., TrainState]:
  """Return the `init` of a method with one tree, "model": parameters that are given, or fresh ones.

  Args:
    model: the network.
    tx: its optimiser.
    options: say whether there is an average.
    timed: whether the network is told the time.
  """

  def init(rng, teacher_params=None):
    params = teacher_params
    if params is None:
      tokens = jnp.zeros((1, model.config.length), jnp.int32)
      sigma = (jnp.zeros((1,)),) if timed else ()
      params = model.init(rng, tokens, *sigma)["params"]
    return make_state({"model": params}, {"model": tx}, options.averaged("model"))

  return init


def init_from_teacher(
  method: str,
  copies: tuple[str, ...],
  optimizers: Optimizers,
  options: MethodOptions,
  change: Callable[[dict[str, Params], RngKey], dict[str, Params]] | None = None,
) -> Callable[..., TrainState]:
  """Return the `init` of a method that starts from a teacher.

  Args:
    method: its name, for the error where there is no teacher.
    copies: trees besides "teacher" that start as its copies.
    optimizers: by trained tree.
    options: say whether there are averages of the copies.
    change: (trees, rng) -> trees, where a copy starts with more than the teacher has.
  """

  def init(rng, teacher_params=None):
    trees = dict.fromkeys(("teacher", *copies), check_teacher(method, teacher_params))
    trees = change(trees, rng) if change else trees
    return make_state(trees, optimizers, options.averaged(*copies))

  return init


def check_teacher(method: str, teacher_params: Params | None) -> Params:
  """Return the teacher's parameters; raise InputError where there are none."""
  if teacher_params is None:
    raise InputError(f"{method} starts from a teacher; give teacher_params (config: teacher.path).")
  return teacher_params


def check_class(field: str, given: Any, allowed: tuple[type, ...], why: str) -> None:
  """Raise InputError unless a network or a process is of an allowed class.

  Args:
    field: of the config, which chooses it.
    given: the network or process.
    allowed: classes.
    why: a method needs one of them.
  """
  if not isinstance(given, allowed):
    snake = lambda name: re.sub("(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()  # noqa: E731
    names = " or ".join(snake(kind.__name__) for kind in allowed)
    raise InputError(f"{field} must be {names}: {why}.")


def output_params(state: TrainState, objective: Objective) -> Params:
  """Return the parameters to sample from: the output tree's average if there is one."""
  return state.ema.get(objective.output, state.trees[objective.output])


def update(
  state: TrainState,
  tree: str,
  loss: Loss,
  batch: Batch,
  tx: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  decay: float | None = None,
) -> tuple[TrainState, Metrics, Any]:
  """Take one optimiser step on one tree; all others are constants.

  Args:
    state: the state; only `trees[tree]`, `opt[tree]` and `ema[tree]` change.
    tree: name of the tree to differentiate and update.
    loss: (params, batch) -> (scalar, (metrics, extra)), a mean over the batch's sequences.
    batch: arrays with the batch as leading axis.
    tx: its optimiser.
    accumulate: number of micro-batches; gradients are averaged over them. Micro-batch j holds the
      sequences j, j + accumulate, …, so that a batch that is sharded over devices stays in place.
    decay: of the moving average, ramped up as min(decay, (1 + n)/(10 + n)) at update n.

  Returns:
    The new state, metrics named "tree/name" (loss, gradient norm and the loss's own) and the
    loss's extra output (from the last micro-batch).
  """
  params = state.trees[tree]
  grad = jax.value_and_grad(loss, has_aux=True)
  if accumulate == 1:
    (value, (metrics, extra)), grads = grad(params, batch)
  else:
    (value, (metrics, extra)), grads = _accumulate(grad, params, batch, accumulate)
  metrics = {"loss": value, **metrics}
  state, metrics = apply_gradients(state, tree, grads, tx, decay=decay, metrics=metrics)
  return state, metrics, extra


def apply_gradients(
  state: TrainState,
  tree: str,
  grads: Params,
  tx: optax.GradientTransformation,
  *,
  decay: float | None,
  metrics: Metrics,
) -> tuple[TrainState, Metrics]:
  """Take the optimiser step of `update` with given gradients; name the metrics, add their norm."""
  params = state.trees[tree]
  updates, opt = tx.update(grads, state.opt[tree], params)
  params = optax.apply_updates(params, updates)
  ema = dict(state.ema)
  if decay is not None:
    n = (state.step + 1).astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + n) / (10 + n))
    ema[tree] = jax.tree.map(lambda a, p: rate * a + (1 - rate) * p, ema[tree], params)
  metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
  state = state.replace(trees={**state.trees, tree: params}, opt={**state.opt, tree: opt}, ema=ema)
  return state, {f"{tree}/{name}": value for name, value in metrics.items()}


def _accumulate(grad, params, batch, count):
  """Average values, metrics and gradients over strided micro-batches under `lax.scan`."""
  micro = jax.tree.map(lambda x: _cut(x, count), batch)
  first = jax.tree.map(lambda x: x[0], micro)
  shapes = jax.eval_shape(grad, params, first)
  (value, (metrics, extra)), grads = shapes
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (value, metrics, grads))

  def add(total, batch):
    (value, (metrics, extra)), grads = grad(params, batch)
    share = jax.tree.map(lambda x: x / count, (value, metrics, grads))
    return jax.tree.map(jnp.add, total, share), extra

  (value, metrics, grads), extra = jax.lax.scan(add, zeros, micro)
  return (value, (metrics, jax.tree.map(lambda x: x[-1], extra))), grads


def _cut(x, count):
  """Return [count, B / count, …]: micro-batch j holds the rows j, j + count, …"""
  return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)


def over_micro_batches(function: Callable[[Batch], Any], batch: Batch, count: int) -> Any:
  """Map a function of a batch over its micro-batches, those of `update`; keep the order of rows.

  Args:
    function: batch -> tree of arrays whose leading axis is the batch.
    batch: arrays with the batch as leading axis.
    count: number of micro-batches.
  """
  if count == 1:
    return function(batch)
  pieces = jax.lax.map(function, jax.tree.map(lambda x: _cut(x, count), batch))
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), pieces)
