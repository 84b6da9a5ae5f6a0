# SPDX-License-Identifier: Apache-2.0
"""A progress line on terminals and in notebooks, log lines elsewhere."""

import contextlib
import sys
import time

import jax
import tqdm


def _in_notebook() -> bool:
  """Return whether a kernel runs this process; importing one is not enough."""
  shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
  return getattr(shell, "kernel", None) is not None


_COLUMNS = 100  # of a notebook, which has none of its own
_CELLS = (6, 30)  # of the bar, at least and at most


class Bar(tqdm.tqdm):
  """A line that is drawn over and over, on terminals and in notebooks; nothing elsewhere.

  What does not fit is left out from its end, a part at a time: no number is cut.

  Args:
    label: what runs.
    total: how many.
    start: of these done before.
    parts: texts behind the count; set others as it goes on.
    silent: draw nothing.
  """

  def __init__(
    self, label: str, total: int, *, start: int = 0, parts: tuple = (), silent: bool = False
  ):
    self.parts = parts
    notebook = _in_notebook()
    super().__init__(
      desc=label,
      initial=start,
      total=total,
      dynamic_ncols=True,
      file=sys.stdout if notebook else sys.stderr,  # a notebook paints errors red
      disable=silent or not (notebook or sys.stderr.isatty()),
    )

  def __str__(self) -> str:
    columns = (self.format_dict["ncols"] or _COLUMNS) - 1
    head = f"{self.desc.removesuffix(': ')} {self.n}/{self.total}"
    parts = list(self.parts)
    while parts and len(head) + len(", ".join(parts)) + 2 > columns:
      parts.pop()
    tail = f", {', '.join(parts)}" if parts else ""
    cells = min(columns - len(head) - len(tail) - 3, _CELLS[1])
    if cells < _CELLS[0]:
      return (head + tail)[:columns]
    full = cells * self.n // max(self.total, 1)
    return f"{head} |{('#' if self.ascii else '█') * full}{' ' * (cells - full)}|{tail}"


class Progress:
  """Show step, loss, tokens per second and the time left; used as a context manager.

  What is left is told by the steps after the first: compiling is not training.

  Args:
    label: what runs.
    start: completed steps.
    total: steps of the whole run.
    every: seconds between log lines where there is no terminal.
  """

  def __init__(self, label: str, start: int, total: int, every: float = 30.0):
    self._label, self._total, self._every = label, total, every
    self._silent = jax.process_index() != 0
    self._bar = Bar(label, total, start=start, parts=("compiling",), silent=self._silent)
    self._start, self._last_line = start, time.monotonic()
    self._clock = None  # starts after the first step
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
    losses = [f"{k} {v:.4g}" for k, v in metrics.items() if k.endswith("/loss")]
    left, rate = f"{self._left(step, now)} left", f"{self.rate:,.0f}"
    self._bar.parts = (left, f"{rate} tok/s", *losses)
    self._bar.update(step - self._bar.n)
    if not self._bar.disable or self._silent:
      return
    if now - self._last_line > self._every or step == self._total:
      self._last_line = now
      text = ", ".join([*losses, f"tok/s {rate}", left])
      print(f"{self._label}: step {step}/{self._total}, {text}", file=sys.stderr, flush=True)

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
