# SPDX-License-Identifier: Apache-2.0
"""What is timed: trunk, attention, sampling, training and the loader; each a list of rows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dlm_jax import mesh, models, sample
from dlm_jax.bench import limits, measure
from dlm_jax.bench.limits import Limits
from dlm_jax.convert import families
from dlm_jax.data import loader
from dlm_jax.errors import InputError
from dlm_jax.experiment import build
from dlm_jax.experiment.plan import Plan
from dlm_jax.experiment.run import open_data
from dlm_jax.models import attention
from dlm_jax.train import loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One timed program.

  Attributes:
    name: what ran.
    batch: sequences.
    timing: of one call.
    rate: tokens per second; of attention and trunk: operations per second.
    unit: of the rate.
    limit: what `ratio` compares with.
    ratio: measured over limit: of rates (at most 1) or of times (at least 1), see `limit`.
  """

  name: str
  batch: int
  timing: measure.Timing
  rate: float
  unit: str
  limit: str = ""
  ratio: float | None = None


def bench_trunk(
  read: Plan, vocab_size: int, batches: Sequence[int], ceiling: Limits, repeats: int
) -> list[Row]:
  """Time the trunk's forward pass; its rate against the machine's matrix products."""
  denoiser, _ = _denoiser(read, vocab_size)
  rows = []
  for batch in batches:
    timing = _trunk(denoiser, batch, repeats)
    count = limits.trunk_operations(denoiser.model.config, batch)
    rows.append(_products("trunk forward", batch, timing, count, ceiling))
  return rows


def bench_attention(
  read: Plan, vocab_size: int, batches: Sequence[int], ceiling: Limits, repeats: int
) -> list[Row]:
  """Time attention, forward and with its gradient, on every back end of this platform."""
  cfg = build.make_model(read, vocab_size).config
  backends = {"xla", attention.choose("auto", jnp.dtype(cfg.dtype), cfg.length)}
  rows = []
  for batch in batches:
    shape = (3, batch, cfg.length, cfg.heads, cfg.dim // cfg.heads)
    q, k, v = jax.random.normal(jax.random.key(0), shape, jnp.dtype(cfg.dtype))
    count = limits.attention_operations(*shape[1:])
    for backend in sorted(backends):
      run = functools.partial(attention.attend, implementation=backend)
      total = lambda q, k, v, run=run: run(q, k, v).astype(jnp.float32).sum()  # noqa: E731
      whole = jax.grad(total, argnums=(0, 1, 2))
      for name, program, factor in (("forward", run, 1.0), ("with gradient", whole, 3.5)):
        timing = measure.timed(program, q, k, v, repeats=repeats)
        title = f"attention {name}, {backend}"
        rows.append(_products(title, batch, timing, factor * count, ceiling))
  return rows


def bench_sample(
  read: Plan,
  vocab_size: int,
  batches: Sequence[int],
  ceiling: Limits,
  repeats: int,
  *,
  steps: int = 16,
  options: dict[str, Any] | None = None,
) -> list[Row]:
  """Time whole samples in one compiled call, over all devices, against so many trunk forwards."""
  del ceiling
  options = dict(options or {})
  denoiser, proc = _denoiser(read, vocab_size)
  if proc is None:
    raise InputError(
      f"model.name={read.model.name!r} is not sampled; choose the config of a denoiser."
    )
  devices = mesh.make(**read.mesh)
  name = f"{options.get('sampler', 'ancestral')} sampling, {steps} steps"
  rows = []
  for batch in batches:
    mesh.check_batch(devices, batch)
    length = denoiser.model.config.length

    def run(denoiser, rng, batch=batch, length=length):
      return sample.generate(
        denoiser, proc, rng, batch=batch, length=length, steps=steps, **options
      )

    arguments = jax.device_put((denoiser, jax.random.key(1)), mesh.replicated(devices))
    timing = measure.timed(
      mesh.over(devices, run),
      *arguments,
      repeats=repeats,
      out_shardings=mesh.batch_sharding(devices),
    )
    trunk = _trunk(arguments[0], batch, repeats, devices)
    limit, ratio = f"{steps} trunk forwards", timing.seconds / (steps * trunk.seconds)
    rate = batch * length / timing.seconds
    row = Row(
      name=name, batch=batch, timing=timing, rate=rate, unit="token/s", limit=limit, ratio=ratio
    )
    rows.append(row)
  return rows


def bench_train(
  read: Plan, vocab_size: int, batches: Sequence[int], ceiling: Limits, repeats: int
) -> list[Row]:
  """Time a plan's training step: whole, and against the passes that the method must do.

  Model FLOPs utilisation counts the `PASSES` of the method's module, a backward as two
  forwards, nothing recomputed. For methods of several networks there is a second row: the time over
  that of their passes alone, each measured here.
  """
  rows = []
  for batch in batches:
    built = build.experiment(dataclasses.replace(read, batch_size=batch), vocab_size)
    timing = _step(built, batch, repeats)
    cfg, name = built.model.config, read.objective.name
    tokens = batch * cfg.length * built.objective.batches
    row = functools.partial(
      Row, batch=batch, timing=timing, rate=tokens / timing.seconds, unit="token/s"
    )
    passes = getattr(read.objective.module, "PASSES", None)
    if passes is None or "grid" not in families.of(built.model).writes:
      rows.append(row(name=f"{name} step"))
      continue
    forwards, backwards = passes
    count = (forwards + 2 * backwards) * limits.forward_operations(cfg, batch)
    used = count / timing.seconds / ceiling.matmul / built.mesh.size
    rows.append(row(name=f"{name} step", limit="matmul rate (MFU)", ratio=used))
    if (forwards, backwards) != (1, 1):
      forward, both = _passes(built.model, batch, repeats)
      needed = forwards * forward.seconds + backwards * (both.seconds - forward.seconds)
      limit = f"{forwards} forwards + {backwards} backwards"
      rows.append(row(name=f"{name} step", limit=limit, ratio=timing.seconds / needed))
  return rows


def bench_loader(
  read: Plan, vocab_size: int, batches: Sequence[int], ceiling: Limits, repeats: int
) -> list[Row]:
  """Time batches of a prepared dataset, read for the first time, on the host."""
  del vocab_size, ceiling
  dataset, rows = open_data(read.data), []
  for batch in batches:
    stream = loader.make(dataset, "train", batch_size=batch, seed=read.seed)
    timing = measure.repeat(lambda stream=stream: next(stream), repeats, None, 0.0)
    rate = batch * read.data.length / timing.seconds
    rows.append(Row(name="loader", batch=batch, timing=timing, rate=rate, unit="token/s"))
  return rows


BENCHES: dict[str, Callable[..., list[Row]]] = {
  "trunk": bench_trunk,
  "attention": bench_attention,
  "sample": bench_sample,
  "train": bench_train,
  "loader": bench_loader,
}


def _products(name, batch, timing, count, ceiling):
  """Return a row that compares operations per second with the machine's matrix products."""
  rate = count / timing.seconds
  return Row(
    name=name,
    batch=batch,
    timing=timing,
    rate=rate,
    unit="FLOP/s",
    limit="matmul rate",
    ratio=rate / ceiling.matmul,
  )


def _denoiser(read, vocab_size):
  """Return a network with random parameters, cast as for sampling, and its process."""
  model = build.make_model(read, vocab_size).rolled()
  proc = build.make_process(read, model)
  # A head of zeros makes every prediction uniform: draws and truncation would be timed on ties.
  params = jax.tree.map(
    lambda x: x if x.any() else 0.02 * jax.random.normal(jax.random.key(2), x.shape),
    _parameters(model),
  )
  return models.Denoiser(model, params).cast(jnp.dtype(model.config.dtype)), proc


def _parameters(model):
  inputs = build.model_inputs(model)
  return jax.jit(lambda rng: model.init(rng, *inputs)["params"])(jax.random.key(0))


def _tokens(cfg, batch, *leading):
  return jax.random.randint(jax.random.key(3), (*leading, batch, cfg.length), 0, cfg.vocab_size - 1)


def _trunk(denoiser, batch, repeats, devices=None):
  if "grid" not in families.of(denoiser.model).writes:
    raise InputError("there is no denoiser's trunk in this config's model; choose another config.")
  tokens_BL, sigma_B = _tokens(denoiser.model.config, batch), jnp.ones(batch)
  if devices is not None:
    rows = mesh.batch_sharding(devices)
    tokens_BL, sigma_B = jax.device_put(tokens_BL, rows), jax.device_put(sigma_B, rows)
  run = lambda denoiser, tokens_BL, sigma_B: denoiser.trunk(tokens_BL, sigma_B)  # noqa: E731
  return measure.timed(run, denoiser, tokens_BL, sigma_B, repeats=repeats)


def _step(built, batch, repeats):
  """Time a training step; the state is donated and carried on."""
  model, objective = built.model, built.objective
  teacher = _parameters(model) if "teacher" in built.shapes.trees else None
  initialise = jax.jit(objective.init, out_shardings=built.shardings)
  state = initialise(jax.random.key(0), teacher)
  del teacher
  # The mask, if there is one, is the last id: data has none.
  tokens_UBL = _tokens(model.config, batch, objective.batches)
  records = {"tokens": jax.device_put(tokens_UBL, mesh.batch_sharding(built.mesh, leading=1))}
  step = loop.jit_step(objective, built.mesh, built.shardings, 0)
  program, seconds = measure.compiled(step, state, records)
  held = [state]
  del state

  def call():
    held[0], metrics = program(held[0], records)
    return metrics

  return measure.repeat(call, repeats, measure.memory(program), seconds)


def _passes(model, batch, repeats):
  """Time a forward pass, and a forward and backward pass, of the plainest loss on one device."""
  tokens_BL, sigma_B = _tokens(model.config, batch), jnp.ones(batch)

  def loss(params, tokens_BL, sigma_B):
    logits_BLV = model.apply({"params": params}, tokens_BL, sigma_B)
    one_hot_BLV = jax.nn.one_hot(tokens_BL, logits_BLV.shape[-1])
    top_BL = jax.nn.logsumexp(logits_BLV, -1)
    return jnp.mean(top_BL - jnp.sum(one_hot_BLV * logits_BLV, -1))

  arguments = (_parameters(model), tokens_BL, sigma_B)
  forward = measure.timed(loss, *arguments, repeats=repeats)
  return forward, measure.timed(jax.value_and_grad(loss), *arguments, repeats=repeats)
