# SPDX-License-Identifier: Apache-2.0
"""Learning rates by hand, decay, selection of the best student, and what the writer keeps."""

import contextlib
import importlib
import io
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier
from dlm_jax.train import optim, progress, selection, writers


def _rates(steps=20, **options):
  schedule = optim.learning_rate(optim.OptimConfig(**options), steps)
  return [float(schedule(i)) for i in range(steps + 1)]


def test_warm_up_starts_at_zero():
  assert _rates(lr=0.4, warmup=4)[:7] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
  assert _rates(lr=0.4, warmup=0) == pytest.approx([0.4] * 21)


def test_linear_decay():
  """From 1 at update 4 to 0.2 at update 20: 0.05 per update."""
  rates = _rates(lr=1.0, warmup=4, schedule="linear", final=0.2)
  assert rates[4:] == pytest.approx([1 - 0.05 * i for i in range(17)])


def test_cosine_decay():
  rates = _rates(lr=2.0, warmup=4, schedule="cosine", final=0.1)
  by_hand = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 16))) for i in range(17)]
  assert rates[4:] == pytest.approx(by_hand)
  assert rates[20] == pytest.approx(0.2) and rates[12] == pytest.approx(1.1)


def test_warm_up_longer_than_the_run():
  assert _rates(steps=3, lr=1.0, warmup=10, schedule="cosine") == pytest.approx([0, 0.1, 0.2, 0.3])


def test_unknown_schedule():
  with pytest.raises(InputError, match=r"optim\.schedule='cosin' is unknown; use one of constant"):
    optim.adamw(optim.OptimConfig(schedule="cosin"), 10)


_PARAMS = {
  "embed": {"embedding": jnp.ones((3, 2))},
  "mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
  "norm": {"scale": jnp.ones(2)},
}


def test_decay_acts_on_matrices_only():
  tx = optim.adamw(optim.OptimConfig(lr=0.1, warmup=0, weight_decay=0.5), 10)
  zeros = jax.tree.map(jnp.zeros_like, _PARAMS)
  updates, _ = tx.update(zeros, tx.init(_PARAMS), _PARAMS)
  np.testing.assert_allclose(updates["embed"]["embedding"], -0.05)
  np.testing.assert_allclose(updates["mlp"]["kernel"], -0.05)
  assert not updates["mlp"]["bias"].any() and not updates["norm"]["scale"].any()


def test_first_update_of_adam_and_its_warm_up():
  """Adam's first step is lr · g / (|g| + eps), whatever the gradient; with warm-up it is zero."""
  grads = jax.tree.map(lambda x: 5.0 * x, _PARAMS)
  tx = optim.adamw(optim.OptimConfig(lr=0.1, warmup=0, eps=1e-12), 10)
  updates, _ = tx.update(grads, tx.init(_PARAMS), _PARAMS)
  for leaf in jax.tree.leaves(updates):
    np.testing.assert_allclose(leaf, -0.1, rtol=1e-5)
  tx = optim.adamw(optim.OptimConfig(lr=0.1, warmup=2), 10)
  updates, _ = tx.update(grads, tx.init(_PARAMS), _PARAMS)
  assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_clip_is_by_the_global_norm():
  """16 equal gradients g have the norm 4 |g|; the clip shows through a large eps."""
  grads = jax.tree.map(lambda x: 3.0 * x, _PARAMS)  # 3·2 + 4 + 2 + 2 = 14 entries
  scale = 1.0 / (3.0 * math.sqrt(14))
  changes = []
  for clip in (0.0, 1.0, 1e6):
    tx = optim.adamw(optim.OptimConfig(lr=1.0, warmup=0, eps=10.0, clip=clip), 10)
    updates, _ = tx.update(grads, tx.init(_PARAMS), _PARAMS)
    changes.append(float(updates["norm"]["scale"][0]))
  clipped = 3.0 * scale
  assert changes[0] == changes[2] == pytest.approx(-3 / (3 + 10), rel=1e-5)
  assert changes[1] == pytest.approx(-clipped / (clipped + 10), rel=1e-5)


# --- selection ------------------------------------------------------------------------------------


def _follow(sequence, **options):
  chosen = selection.Selection(**options)
  better = [chosen.update(step, *scores) for step, scores in enumerate(sequence)]
  return chosen, better


def test_the_best_is_the_lowest_genppl_inside_the_band():
  scores = [(100.0, 0.0), (80.0, 0.1), (90.0, 0.0), (10.0, 0.9), (70.0, 0.25), (60.0, 0.251)]
  chosen, better = _follow(scores, max_entropy_drop=0.25, patience=3)
  assert better == [True, True, False, False, True, False]
  assert chosen.best == (4, 70, 0.25)
  assert not chosen.stop


def test_stop_needs_consecutive_collapses():
  inside, outside = (50.0, 0.0), (1.0, 2.0)
  chosen, _ = _follow([outside, outside, inside, outside, outside], patience=3)
  assert not chosen.stop and chosen.outside == 2
  assert not chosen.update(5, *outside)
  assert chosen.stop
  assert chosen.best == (2, 50, 0.0)


def test_higher_entropy_than_the_teacher_is_inside():
  chosen, better = _follow([(50.0, -3.0)], patience=1)
  assert better == [True] and not chosen.stop


def test_collapse_before_any_best():
  chosen, _ = _follow([(1.0, 9.0)] * 2, patience=2)
  assert chosen.stop and chosen.best is None


@pytest.mark.parametrize("sequence", [[], [(50.0, 0.0), (40.0, 0.1), (1.0, 9.0)]])
def test_selection_survives_json(sequence):
  chosen, _ = _follow(sequence)
  again = selection.Selection()
  again.from_json(json.loads(json.dumps(chosen.to_json())))
  assert again == chosen


def test_narrowing_alone_is_never_kept():
  """Of matched scores only those count that are below the teacher's, 0, by two errors."""
  scores = [(0.0, 0.0, 0.0), (-0.03, 0.1, 0.02), (-0.05, 0.1, 0.02), (-0.04, 0.0, 0.01)]
  scores += [(math.nan, 0.0, math.nan), (-0.9, 0.3, 0.01), (-0.06, 0.25, 0.01), (0.2, 0.0, 0.0)]
  chosen, better = _follow(scores, select="matched", max_entropy_drop=0.25)
  assert better == [True, False, True, False, False, False, True, False]
  assert chosen.best == (6, -0.06, 0.25)
  again = selection.Selection(select="matched")
  again.from_json(json.loads(json.dumps(chosen.to_json())))
  assert again.best == chosen.best
  other = selection.Selection(select="genppl")
  other.from_json(chosen.to_json())  # a score of another kind says nothing
  assert other.best is None and other.update(7, 500.0, 0.0)


def test_a_start_without_a_score_is_not_the_best():
  chosen, better = _follow([(math.nan, 0.0, math.nan), (-0.5, 0.0, 0.1)], select="matched")
  assert better == [False, True] and chosen.best[0] == 1


def test_unknown_rules_are_refused():
  with pytest.raises(InputError, match=r"evaluate.select='entropy' is unknown; use one of matched"):
    selection.Selection(select="entropy")


# --- writer ---------------------------------------------------------------------------------------


def _write(workdir, steps, **options):
  with writers.Writer(workdir, tensorboard=False, **options) as writer:
    for step in steps:
      writer.write(step, {"loss": step / 2})


def _lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_writer_drops_later_lines(tmp_path):
  _write(tmp_path, [1, 2, 3, 4, 5])
  _write(tmp_path, [4, 5, 6], resume_from=3)
  assert _lines(tmp_path) == [{"step": i, "loss": i / 2} for i in range(1, 7)]


def test_a_new_run_starts_an_empty_file(tmp_path):
  _write(tmp_path, [1, 2])
  _write(tmp_path, [1])
  assert [line["step"] for line in _lines(tmp_path)] == [1]


@pytest.mark.parametrize(
  "torn", [b'{"step": 3, "lo', b"\xff\xfe\x00", b"[1]", b'{"step": "x"}', b'{"loss": 1}', b"null"]
)
def test_lines_torn_by_a_crash_are_dropped(tmp_path, torn):
  _write(tmp_path, [1, 2])
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(torn)
  _write(tmp_path, [3], resume_from=2)
  assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_non_finite_values_are_null(tmp_path):
  with writers.Writer(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.5})
  assert _lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.5}]


def test_lines_are_readable_while_the_run_goes_on(tmp_path):
  with writers.Writer(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"loss": 2.0})
    assert _lines(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
  "name, kind, said",
  [
    ("metrics.jsonl", "folder", r"metrics.jsonl cannot be written: Is a directory\."),
    ("tensorboard", "file", r"tensorboard cannot be written: File exists\."),
  ],
)
def test_what_is_in_the_place_of_its_files_stays(tmp_path, name, kind, said):
  place = tmp_path / name
  place.mkdir() if kind == "folder" else place.write_text("mine")
  with pytest.raises(InputError, match=said):
    writers.Writer(tmp_path)
  assert place.is_dir() if kind == "folder" else place.read_text() == "mine"


@pytest.fixture
def full_file():
  """Return an open file of a disk that is full."""
  file = open("/dev/full", "wb")  # noqa: SIM115
  yield file
  with contextlib.suppress(OSError):
    file.close()


def test_a_full_disk_is_one_line_and_loses_no_line(tmp_path, full_file):
  full = "metrics.jsonl cannot be written: No space left on device; free space and run the same"
  with pytest.raises(InputError, match=full), writers.Writer(tmp_path) as writer:
    writer.write(1, {"loss": 1.0})
    writer._file = io.TextIOWrapper(full_file)
    writer.write(2, {"loss": 1.0})
  assert [line["step"] for line in _lines(tmp_path)] == [1]


def test_a_full_disk_of_events_does_not_hang(tmp_path, full_file):
  full = "tensorboard cannot be written: No space left on device"
  with pytest.raises(InputError, match=full), writers.Writer(tmp_path) as writer:
    writer._board._events._py_recordio_writer._writer = full_file
    for step in range(1, 500):
      writer.write(step, {"loss": 1.0})
  assert len(_lines(tmp_path)) > 0


def test_a_resumed_board_hides_later_steps(tmp_path):
  with writers.Writer(tmp_path) as writer:
    writer.write(7, {"loss": 2.0})
  (tmp_path / "tensorboard").rename(tmp_path / "before")
  with writers.Writer(tmp_path, resume_from=3):
    pass
  (events,) = (tmp_path / "tensorboard").glob("events*")
  content = events.read_bytes()
  mark = event_pb2.Event(step=4, session_log=event_pb2.SessionLog(status=1)).SerializeToString()
  assert mark in content


def test_tensorboard_events(tmp_path):
  with writers.Writer(tmp_path) as writer:
    writer.write(1, {"loss": 2.0})
  (events,) = (tmp_path / "tensorboard").glob("events*")
  assert b"loss" in events.read_bytes()


# --- progress -------------------------------------------------------------------------------------


def test_progress_prints_lines_where_there_is_no_terminal(capsys):
  importlib.import_module(
    "ipykernel"
  )  # another test may have; it makes no notebook of this process
  with progress.Progress("run", 0, 4, every=0.0) as shown:
    for step in range(1, 5):
      shown.update(step, {"model/loss": 2.5, "model/grad_norm": 1.0}, tokens=100)
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 4
  assert lines[-1].startswith("run: step 4/4, model/loss 2.5, tok/s ")
  assert lines[-1].endswith("0:00 left") and lines[0].endswith("? left")
  assert shown.rate > 0


def test_progress_draws_a_bar_in_a_notebook(capsys, monkeypatch):
  """A shell with a kernel, as in Jupyter and Colab; a plain IPython terminal has none."""
  shell = types.SimpleNamespace(kernel=object())
  monkeypatch.setattr(importlib.import_module("IPython"), "get_ipython", lambda: shell)
  with progress.Progress("run", 0, 1, every=0.0) as shown:
    shown.update(1, {"model/loss": 2.5}, tokens=100)
  written = capsys.readouterr()
  assert "1/1" in written.out + written.err and "left" not in written.err


class _Screen(io.StringIO):
  """A terminal of so many columns that keeps every line it is told to draw."""

  encoding = "utf-8"

  def __init__(self, monkeypatch, columns):
    super().__init__()
    monkeypatch.setattr(progress.sys, "stderr", self)
    # What tqdm asks a real terminal for.
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (columns, 40))

  def isatty(self):
    return True

  def drawn(self):
    return [line.rstrip() for line in self.getvalue().replace("\n", "\r").split("\r") if line]


@pytest.fixture
def clock(monkeypatch):
  now = types.SimpleNamespace(seconds=0.0)
  monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
  return now


def _train(clock, columns, monkeypatch, metrics, label="distillation"):
  """Compile for 300 seconds, then take 10 steps of two seconds; return what was drawn."""
  screen = _Screen(monkeypatch, columns)
  with progress.Progress(label, 0, 10) as shown:
    for step in range(1, 11):
      clock.seconds += 300 if step == 1 else 2
      shown.update(step, metrics, tokens=1_000_000)
      shown._bar.refresh()
  return screen.drawn()


LOSSES = {"student/loss": 11.4123, "fake/loss": 470.25, "student/grad_norm": 3.0}


def test_progress_tells_one_time_left_and_compiling_is_not_in_it(clock, monkeypatch):
  drawn = _train(clock, 110, monkeypatch, LOSSES)
  assert drawn[0].startswith("distillation 0/10 |") and drawn[0].endswith("|, compiling")
  second = next(line for line in drawn if line.startswith("distillation 2/10"))
  assert ", 0:16 left, 500,000 tok/s, student/loss 11.41, fake/loss 470.2" in second
  assert all(line.count("left") <= 1 and "s/step" not in line for line in drawn)


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 110, 200])
def test_no_number_of_the_bar_is_cut(clock, monkeypatch, columns):
  drawn = _train(clock, columns, monkeypatch, LOSSES, "distillation (evaluating)")
  assert max(map(len, drawn)) < columns
  head, *parts = drawn[-1].split(", ")
  whole = ["0:00 left", "500,000 tok/s", "student/loss 11.41", "fake/loss 470.2"]
  assert parts == whole[: len(parts)], "what does not fit is left out whole"
  assert len(parts) == {20: 0, 40: 0, 60: 2, 80: 3, 110: 4, 200: 4}[columns]
  bar = re.search(r"\|([█ ]*)\|", head)
  assert bar is None or len(bar[1]) >= 6


def test_what_is_no_training_is_not_in_the_time_left(clock, monkeypatch):
  screen = _Screen(monkeypatch, 110)
  with progress.Progress("run", 0, 4) as shown:
    for step in (1, 2, 3):
      clock.seconds += 2
      shown.update(step, LOSSES, tokens=10)
      with shown.paused("evaluating"):
        assert "run (evaluating) " in screen.drawn()[-1]
        clock.seconds += 1000
  assert ", 0:02 left, 5 tok/s" in screen.drawn()[-1]


def test_without_a_terminal_nothing_is_drawn_over(capsys):
  row = {"name": "a", "nfe": 1, "genppl": 2.0, "entropy": 1.0, "samples": 8}
  with progress.Progress("run", 0, 2, every=0.0) as shown, frontier.sweep_progress(2) as on_row:
    shown.update(1, LOSSES, tokens=10)
    with shown.paused("evaluating"):
      on_row(row, 1, 2)
  written = capsys.readouterr()
  assert "\r" not in written.err + written.out and not written.out
  assert (
    written.err.splitlines()[1] == "frontier: 1/2, a at 1: GenPPL 2.0, entropy 1.00 (8 samples)"
  )


def test_a_sweep_on_a_terminal(monkeypatch):
  screen = _Screen(monkeypatch, 110)
  row = {"name": "a", "nfe": 1, "genppl": 2.0, "entropy": 1.0, "samples": 8}
  with frontier.sweep_progress(2) as on_row:
    on_row(row, 1, 2)
  last = screen.drawn()[-1]
  assert last.startswith("frontier, NFE 1/2 |█") and last.endswith(
    "|, a at 1: GenPPL 2.0, entropy 1.00 (8 samples)"
  )
