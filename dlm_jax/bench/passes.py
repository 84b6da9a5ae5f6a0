# SPDX-License-Identifier: Apache-2.0
"""The time of one pass of a decoder at batch 1, beside the time that reading its weights takes.

A pass is `extend` after a cache, and the head at every position of the call. Passes are timed as
decoding runs them: many in one compiled loop, each on what the one before it found.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dlm_jax import models
from dlm_jax.bench import measure, speedup, weights
from dlm_jax.errors import InputError, hint
from dlm_jax.evaluate import tables
from dlm_jax.models.protocols import Cached

# How the layers run: (storage of parameters, layers per turn of the scan, 0 for all).
VARIANTS = {
  "scan": ("stacked", 1),
  "unrolled": ("stacked", 0),
  "layers": ("layers", 1),
  "fused": ("fused", 1),
}
ACCEPTANCES = (0.8, 0.9, 0.95)
_TOGETHER = 8  # passes per call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
  """One timed pass.

  Attributes:
    network: "target" or "draft".
    variant: a key of VARIANTS.
    queries: tokens of the call.
    seconds: median.
    spread: (slowest − fastest) / median.
    weight_bytes: read by the pass, the embedding table excluded.
    cache_bytes: of the keys and values before it.
    limit: seconds: weight_bytes over half the copy rate, which counts bytes read and written.
    read_limit: seconds: weight_bytes over the rate at which a large array is read.
    memory: bytes that the compiled program reserves.
    compile_seconds: of it.
  """

  network: str
  variant: str
  queries: int
  seconds: float
  spread: float
  weight_bytes: int
  cache_bytes: int
  limit: float
  read_limit: float
  memory: int | None
  compile_seconds: float

  @property
  def ratio(self) -> float:
    """Measured over limit."""
    return self.seconds / self.limit

  @property
  def read_ratio(self) -> float:
    """Measured over read_limit: 1 is a pass that does nothing but read."""
    return self.seconds / self.read_limit


def read_rate(dtype: str, repeats: int) -> float:
  """Return bytes per second at which a large array is read by a product with one vector.

  That is a pass's own kind of reading; nothing but a few numbers is written.
  """
  rows, columns = (2048, 4096) if jax.default_backend() == "cpu" else (2**15, 2**15)
  matrix = weights.uniform(jax.random.key(0, impl="rbg"), (rows, columns), jnp.dtype(dtype), 1.0)
  total = lambda matrix: jnp.sum(matrix, axis=1, dtype=jnp.float32)  # noqa: E731
  return matrix.nbytes / measure.timed(total, matrix, repeats=repeats).seconds


def bench_passes(
  networks: dict[str, Cached],
  *,
  queries: Sequence[int],
  cache_length: int,
  variants: Sequence[str],
  copy: float,
  read: float,
  repeats: int,
) -> list[Pass]:
  """Time passes of networks with random weights, made on the device in the type of their products.

  Args:
    networks: "target", and perhaps "draft".
    queries: tokens per call, each timed.
    cache_length: committed tokens before them.
    variants: how the layers run, each timed.
    copy: bytes per second of a copy, read and written, see `limits.measure`.
    read: see `read_rate`.
    repeats: measurements, of which the median counts.

  Raises:
    InputError: a variant is unknown, or a number is not positive.
  """
  for name in variants:
    if name not in VARIANTS:
      raise InputError(
        f"variant {name!r} is unknown{hint(name, VARIANTS)}; use {', '.join(VARIANTS)}."
      )
  if min(queries, default=0) < 1 or cache_length < 0:
    raise InputError(
      f"queries={list(queries)} must be at least 1 each, and cache_length={cache_length} 0 or more."
    )
  rows = []
  for network, model in networks.items():
    params, held = None, None
    for variant in variants:
      model_ = _variant(model, variant)
      if held != model_.config.storage:
        del params
        params, held = weights.random_params(model_, model_.config.dtype), model_.config.storage
      for count in queries:
        timing = _time(model_, params, count, cache_length, repeats)
        read_bytes = weights.weight_bytes(model_.config, params, count)
        rows.append(
          Pass(
            network=network,
            variant=variant,
            queries=count,
            seconds=timing.seconds / _TOGETHER,
            spread=timing.spread,
            weight_bytes=read_bytes,
            cache_bytes=weights.cache_bytes(model_.config, cache_length),
            limit=read_bytes / (copy / 2),
            read_limit=read_bytes / read,
            memory=timing.memory,
            compile_seconds=timing.compile_seconds,
          )
        )
    del params
  return rows


def _variant(model, name):
  storage, unroll = VARIANTS[name]
  config = dataclasses.replace(
    model.config, storage=storage, unroll=unroll or model.config.layers, remat="none"
  )
  return model.clone(config=config)


def _time(model, params, queries, cache_length, repeats):
  """Time `_TOGETHER` passes, each on the tokens that the one before found most probable."""
  cache = models.Cache.make(model.config, 1, max(cache_length, 1))
  cache = cache.replace(length_B=jnp.full(1, cache_length, jnp.int32))

  def one(_, carry):
    tokens_1Q, cache, params = carry
    hidden, _ = model.apply({"params": params}, tokens_1Q, None, None, cache, method="extend")
    logits = model.apply({"params": params}, hidden, method="head")
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache, params

  def run(params, cache, tokens_1Q):
    return jax.lax.fori_loop(0, _TOGETHER, one, (tokens_1Q, cache, params))[0]

  tokens_1Q = jnp.arange(queries, dtype=jnp.int32)[None] % model.config.vocab_size
  return measure.timed(run, params, cache, tokens_1Q, repeats=repeats)


def speedups(
  rows: Sequence[Pass], block_lengths: Sequence[int], acceptances: Sequence[float] = ACCEPTANCES
) -> list[speedup.Speedup]:
  """Return what the fastest measured passes of target and draft mean for whole decodes.

  A block of n tokens takes passes of n, a SimSD verification of up to 3 n: the block before it,
  what was drafted, and masks. The smallest number of queries measured that is no smaller counts;
  lengths beyond what was measured are left out. Without a draft there is nothing to return.
  """
  found = []
  for size in block_lengths:
    target, verify = (_fastest(rows, "target", count) for count in (size, 3 * size))
    draft = _fastest(rows, "draft", size)
    if None in (target, verify, draft):
      continue
    for acceptance in acceptances:
      for folded in (True, False):
        found.append(
          speedup.predict(
            acceptance, size, target=target, verify=verify, draft=draft, folded=folded
          )
        )
  return found


def _fastest(rows, network, queries):
  mine = [row for row in rows if row.network == network and row.queries >= queries]
  least = min((row.queries for row in mine), default=0)
  return min((row.seconds for row in mine if row.queries == least), default=None)


def table(rows: Sequence[Pass]) -> str:
  """Return the passes as a table."""
  header = (
    "network",
    "layers run",
    "tokens",
    "ms",
    "±",
    "GB of weights",
    "GB of cache",
    "limit ms",
    "ratio",
    "of read rate",
    "GiB",
    "compile s",
  )
  cells = [
    (
      row.network,
      row.variant,
      str(row.queries),
      f"{1e3 * row.seconds:.3f}",
      f"{100 * row.spread:.0f} %",
      f"{row.weight_bytes / 1e9:.3f}",
      f"{row.cache_bytes / 1e9:.3f}",
      f"{1e3 * row.limit:.3f}",
      f"{row.ratio:.3f}",
      f"{1 / row.read_ratio:.2f}",
      "" if row.memory is None else f"{row.memory / 2**30:.2f}",
      f"{row.compile_seconds:.0f}",
    )
    for row in rows
  ]
  return tables.markdown(header, cells, left=(0, 1))


def speedup_table(rows: Sequence[speedup.Speedup]) -> str:
  """Return predicted decodes as a table."""
  header = (
    "acceptance",
    "block",
    "rounds",
    "draft passes",
    "commits",
    "alone tok/s",
    "drafted tok/s",
    "ratio",
  )
  cells = [
    (
      f"{row.acceptance:g}",
      str(row.block_length),
      f"{row.rounds:.2f}",
      f"{row.steps:.2f}",
      "folded" if row.folded else "separate",
      f"{row.alone:.1f}",
      f"{row.drafted:.1f}",
      f"{row.ratio:.2f}",
    )
    for row in rows
  ]
  return tables.markdown(header, cells, left=(4,))
