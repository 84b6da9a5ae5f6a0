# SPDX-License-Identifier: Apache-2.0
"""A progress line on terminals and in notebooks, log lines elsewhere."""

import contextlib
import sys
import time

import jax
from tqdm import auto


def _in_notebook() -> bool:
  """Return whether a kernel runs this process; importing one is not enough."""
  shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
  return getattr(shell, "kernel", None) is not None


class Progress:
  """Show step, loss, tokens per second and the time left; used as a context manager.

  Args:
    label: what runs.
    start: completed steps.
    total: steps of the whole run.
    every: seconds between log lines where there is no terminal.
  """

  def __init__(self, label: str, start: int, total: int, every: float = 30.0):
    self._label, self._total, self._every = label, total, every
    self._silent = jax.process_index() != 0
    self._interactive = sys.stderr.isatty() or _in_notebook()
    self._bar = auto.tqdm(
      desc=label,
      initial=start,
      total=total,
      unit="step",
      dynamic_ncols=True,
      leave=True,
      disable=self._silent or not self._interactive,
    )
    self._start, self._last_line = start, time.monotonic()
    self._clock = None  # starts after the first step: compiling is not training
    self._tokens = 0
    self.rate = 0.0  # tokens per second since the first step

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_):
    self._bar.close()

  def update(self, step: int, metrics: dict[str, float], tokens: int) -> None:
    """Show that `step` is complete; every step once."""
    now = time.monotonic()
    if self._clock is None:
      self._clock, self._start = now, step
    else:
      self._tokens += tokens
      self.rate = self._tokens / max(now - self._clock, 1e-9)
    losses = {k: f"{v:.4g}" for k, v in metrics.items() if k.endswith("/loss")}
    shown = {**losses, "tok/s": f"{self.rate:,.0f}"}
    self._bar.update(step - self._bar.n)
    self._bar.set_postfix(shown, refresh=False)
    if not (self._interactive or self._silent) and (
      now - self._last_line > self._every or step == self._total
    ):
      self._last_line = now
      text = ", ".join(f"{k} {v}" for k, v in shown.items())
      line = f"{self._label}: step {step}/{self._total}, {text}, {self._left(step, now)} left"
      print(line, file=sys.stderr, flush=True)

  def _left(self, step, now):
    if step <= self._start:
      return "?"
    seconds = (now - self._clock) / (step - self._start) * (self._total - step)
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

  @contextlib.contextmanager
  def paused(self, what: str):
    """Leave out the time of something that is not training."""
    self._bar.set_description(f"{self._label} ({what})")
    begun = time.monotonic()
    yield
    if self._clock is not None:
      self._clock += time.monotonic() - begun
    self._bar.set_description(self._label)
