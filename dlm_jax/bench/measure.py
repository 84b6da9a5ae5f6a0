# SPDX-License-Identifier: Apache-2.0
"""Time compiled programs: warm up, repeat, take the median."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_SHORTEST = 0.2  # seconds per measurement: so many calls are dispatched together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """What repeated calls of one program took.

  Attributes:
    seconds: median per call.
    spread: (slowest − fastest) / median of the repeats.
    repeats: measurements.
    memory: bytes per device that the compiler reserves: arguments, results and working space,
      donated arguments once. None where the back end does not say.
    compile_seconds: tracing and compilation.
  """

  seconds: float
  spread: float
  repeats: int
  memory: int | None
  compile_seconds: float


def compiled(run: Callable, *args: Any, **jit_options: Any) -> tuple[Any, float]:
  """Compile a function, jitted already or not; return the program and the seconds it took."""
  start = time.perf_counter()
  jitted = run if hasattr(run, "lower") else jax.jit(run, **jit_options)
  program = jitted.lower(*args).compile()
  return program, time.perf_counter() - start


def timed(run: Callable, *args: Any, repeats: int = 10, **jit_options: Any) -> Timing:
  """Time `run(*args)`, compiled.

  Args:
    run: pure; all results are computed.
    *args: its arguments, on the device already.
    repeats: measurements.
    **jit_options: of `jax.jit`, but no donation.
  """
  program, seconds = compiled(run, *args, **jit_options)
  return repeat(lambda: program(*args), repeats, memory(program), seconds)


def repeat(
  call: Callable[[], Any], repeats: int, memory: int | None, compile_seconds: float
) -> Timing:
  """Time a call that dispatches work and returns what has to be waited for."""
  jax.block_until_ready(call())
  start = time.perf_counter()
  jax.block_until_ready(call())
  together = max(1, round(_SHORTEST / max(time.perf_counter() - start, 1e-6)))
  took = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(together):
      result = call()
    jax.block_until_ready(result)
    took.append((time.perf_counter() - start) / together)
  median = statistics.median(took)
  return Timing(
    seconds=median,
    spread=(max(took) - min(took)) / median,
    repeats=repeats,
    memory=memory,
    compile_seconds=compile_seconds,
  )


def memory(program: Any) -> int | None:
  """Return the bytes per device that a compiled program needs at its peak, by the compiler."""
  analysis = program.memory_analysis()
  if analysis is None:
    return None
  own = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
  return own - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes
