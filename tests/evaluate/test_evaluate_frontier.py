# SPDX-License-Identifier: Apache-2.0
"""Sweeps: what is drawn, what is skipped on a second run, and the files they end in."""

import csv
import errno
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax import disk, evaluate
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier
from dlm_jax.evaluate.judge import JudgeWithTokens


def of_eight(tokens_BL):
  """Find every one of eight tokens equally likely."""
  return jnp.zeros((*tokens_BL.shape, 8))


judge = JudgeWithTokens(judge=of_eight)


class Uniform:
  """Draw the first `nfe` ids uniformly, and count how often it is asked to."""

  def __init__(self, **options):
    self.options = options
    self.prepared, self.runs = [], 0

  def __call__(self, batch, nfe):
    self.prepared.append(nfe)

    def run(rng):
      self.runs += 1
      return jax.random.randint(rng, (batch, 16), 0, nfe)

    return run


def row(name, nfe, genppl=100.0, entropy=5.0, **changes):
  values = {"genppl": genppl, "genppl_se": genppl / 20, "entropy": entropy, "entropy_se": 0.02}
  values |= {"correlation": 0.0, "distinct_4": 0.99}
  fixed = {"samples": 512, "tokens": 9, "seconds": 1.5, "seed": 0, "options": {}, "context": {}}
  return {"name": name, "nfe": nfe, "evaluations": nfe, **values, **fixed, **changes}


ROWS = [
  row(name, nfe, base * (1 + 8 / nfe), height + 0.2 / nfe)
  for name, base, height in (("teacher", 120, 5.0), ("student", 80, 4.9))
  for nfe in (1, 2, 4, 8, 16)
]


def test_rows_hold_what_was_measured():
  sampler = Uniform(temperature=0.9)
  rows = frontier.sweep(
    {"a": sampler}, [1, 4, 4], judge=judge, samples=10, batch_size=4, context={"step": 7}
  )
  assert [r["nfe"] for r in rows] == [1, 4] and sampler.prepared == [1, 4]
  assert sampler.runs == 6  # three batches of four for ten samples
  for r in rows:
    assert tuple(r) == frontier.COLUMNS
    assert r["samples"] == 10 and r["tokens"] == 150 and r["seconds"] > 0
    assert r["genppl"] == pytest.approx(8)
    assert r["options"] == {"temperature": 0.9} and r["context"] == {"step": 7}
  assert rows[0]["entropy"] == 0 and 1.0 < rows[1]["entropy"] <= math.log(4)


def test_samplers_see_the_same_keys_and_seeds_differ():
  def run(seed):
    return frontier.sweep({"a": Uniform(), "b": Uniform()}, [4], judge=judge, samples=3, seed=seed)

  a, b = run(0)
  assert a["entropy"] == b["entropy"] != run(1)[0]["entropy"]


def test_resume_skips_finished_rows(tmp_path):
  path = tmp_path / "new" / "rows.jsonl"
  options = {"judge": judge, "samples": 4, "path": path}

  class Killed(Exception):
    pass

  def kill(r, number, total):
    assert total == 4
    if number == 3:
      raise Killed

  first = {"a": Uniform(p=(1, 2)), "b": Uniform()}
  with pytest.raises(Killed):
    frontier.sweep(first, [2, 4], on_row=kill, **options)
  path.write_text(path.read_text() + '{"name": "b", "nf')  # killed inside a write

  again, seen = {"a": Uniform(p=(1, 2)), "b": Uniform()}, []
  rows = frontier.sweep(again, [2, 4], on_row=lambda r, *_: seen.append(r), **options)
  assert again["a"].prepared == [] and again["b"].prepared == [4]
  assert seen == rows
  fresh = frontier.sweep(first, [2, 4], judge=judge, samples=4)
  assert [r | {"seconds": 0} for r in rows] == [r | {"seconds": 0} for r in fresh]
  assert [json.loads(line) for line in path.read_text().splitlines()] == rows
  assert 0 < rows[0]["distinct_4"] <= 1


def test_rows_of_before_are_found(tmp_path):
  """They know no correlation and no distinct 4-grams; the others' columns stand in the table."""
  path = tmp_path / "rows.jsonl"
  options = {"judge": judge, "samples": 4, "path": path}
  (old,) = frontier.sweep({"a": Uniform()}, [4], **options)
  before = {key: value for key, value in old.items() if key not in ("correlation", "distinct_4")}
  path.write_text(json.dumps(before) + "\n")
  again = Uniform()
  rows = frontier.sweep({"a": again}, [4, 8], **options)
  assert again.prepared == [8] and math.isnan(rows[0]["distinct_4"])
  lines = frontier.table(rows).splitlines()
  assert "distinct 4-grams" in lines[0] and " nan " in lines[2]
  assert "distinct" not in frontier.table(rows[:1])


@pytest.mark.parametrize("change", [{"samples": 5}, {"seed": 1}, {"context": {"step": 2}}])
def test_resume_repeats_what_differs(tmp_path, change):
  options = {"judge": judge, "samples": 4, "path": tmp_path / "rows.jsonl"}
  frontier.sweep({"a": Uniform()}, [2], **options)
  sampler = Uniform()
  frontier.sweep({"a": sampler}, [2], **(options | change))
  assert sampler.prepared == [2]
  other = Uniform(nucleus=0.9)
  frontier.sweep({"a": other}, [2], **options)
  assert other.prepared == [2]


def test_foreign_file_is_left_alone(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"loss": 1}\n{"loss": 2}\n')
  with pytest.raises(InputError, match=r"line 1 of .* is no frontier row"):
    frontier.sweep({"a": Uniform()}, [2], judge=judge, path=path)
  assert path.read_text() == '{"loss": 1}\n{"loss": 2}\n'


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"\xff\xfe", b"mine", b'{"loss": 1}\n', b"[]"])
def test_a_foreign_file_of_one_line_is_no_torn_row(tmp_path, content):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(content)
  with pytest.raises(InputError, match=r"line 1 of .* is no frontier row; move the file away"):
    frontier.sweep({"a": Uniform()}, [2], judge=judge, path=path)
  assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_full_disk_loses_no_row(tmp_path, monkeypatch):
  path = tmp_path / "rows.jsonl"
  plain, full = pathlib.Path.open, []

  def refuse(self, mode="r", *given, **options):
    if mode == "a" and full:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    full.extend([1] if mode == "a" else [])
    return plain(self, mode, *given, **options)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(InputError, match="No space left on device; free space and run the same"):
      frontier.sweep({"a": Uniform()}, [2, 4], judge=judge, samples=4, path=path)
  assert len(path.read_text().splitlines()) == 1
  again = Uniform()
  assert len(frontier.sweep({"a": again}, [2, 4], judge=judge, samples=4, path=path)) == 2
  assert again.prepared == [4]


def test_two_sweeps_of_one_file(tmp_path):
  path = tmp_path / "rows.jsonl"
  with disk.alone(path), pytest.raises(InputError, match=r"rows.jsonl is being written by process"):
    frontier.sweep({"a": Uniform()}, [2], judge=judge, path=path)
  assert not list(tmp_path.iterdir())


def test_retokenised_judge():
  reader = JudgeWithTokens(
    judge=of_two,
    eos_id=1,
    retokenise=lambda tokens: evaluate.retokenise(tokens, list, eos_id=1, decode=lambda _: [0, 1]),
  )
  rows = frontier.sweep({"a": Uniform()}, [4], judge=reader, samples=3)
  assert rows[0]["tokens"] == 3 and rows[0]["genppl"] == pytest.approx(2)


def of_two(tokens_BL, mask_BL):
  return jnp.zeros((*mask_BL.shape, 2))


@pytest.mark.parametrize("nfes", [[], [0], [4, -1], [2.0], ["8"], [True]])
def test_bad_nfes(nfes):
  with pytest.raises(InputError, match="NFE"):
    frontier.sweep({"a": Uniform()}, nfes, judge=judge)


def test_bad_options(tmp_path):
  with pytest.raises(InputError, match="samplers=0 must be"):
    frontier.sweep({}, [1], judge=judge)
  with pytest.raises(InputError, match="samples=0"):
    frontier.sweep({"a": Uniform()}, [1], judge=judge, samples=0)
  with pytest.raises(InputError, match="no frontier rows"):
    frontier.write([], tmp_path)
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot be written"):
    frontier.write(ROWS, tmp_path / "file" / "folder")


@pytest.mark.slow
def test_sampler_draws_with_the_library():
  from dlm_jax import models, process, sample

  config = models.DiTConfig(vocab_size=9, dim=8, heads=2, layers=1, dtype="float32")
  model = models.DiT(config)
  tokens, sigma = jnp.zeros((1, 6), jnp.int32), jnp.zeros(1)
  denoiser = models.Denoiser(model, jax.jit(model.init)(jax.random.key(0), tokens, sigma)["params"])
  proc = process.Absorbing(vocab_size=9, mask_id=8)
  sampler = frontier.Sampler(
    denoiser=denoiser, process=proc, length=6, options={"temperature": 0.8}
  )
  rng = jax.random.key(1)
  options = {"batch": 3, "length": 6, "steps": 2, "temperature": 0.8}
  direct = jax.jit(lambda d: sample.generate(d, proc, rng, **options))(denoiser)
  np.testing.assert_array_equal(sampler(3, 2)(rng), direct)
  rows = frontier.sweep({"toy": sampler}, [2], judge=judge, samples=4, batch_size=3)
  assert rows[0]["genppl"] == pytest.approx(8) and rows[0]["options"] == {"temperature": 0.8}
  one_by_one = frontier.Sampler(
    denoiser=denoiser, process=proc, length=6, options={"sampler": "first_hitting"}
  )
  with pytest.raises(InputError, match="has no frontier"):
    one_by_one(3, 2)
  with pytest.raises(InputError, match="NFE 6; ask for that"):
    one_by_one.check(nfe=2)
  one_by_one.check(nfe=6)
  rows = frontier.sweep({"limit": one_by_one}, [2, 4], judge=judge, samples=4, batch_size=3)
  assert [(row["nfe"], row["evaluations"]) for row in rows] == [(6, 6)]


def pixels(path):
  from matplotlib import image

  return image.imread(path)[..., :3]


def test_write(tmp_path):
  nan = row("student", 32, math.nan, entropy=0.0, genppl_se=math.nan)
  reference = frontier.Reference(genppl=61.3, entropy=4.95)
  paths = frontier.write([*ROWS, nan], tmp_path / "out", reference=reference)
  assert {path.name for path in paths.values()} == {
    "frontier.csv",
    "frontier.json",
    "frontier.png",
  }
  lines = list(csv.DictReader(paths["csv"].open()))
  assert tuple(lines[0]) == frontier.COLUMNS and len(lines) == 11
  assert float(lines[3]["genppl"]) == ROWS[3]["genppl"]
  content = json.loads(paths["json"].read_text(), parse_constant=pytest.fail)
  assert content["rows"][:10] == ROWS and content["rows"][10]["genppl"] is None
  assert content["reference"]["entropy"] == 4.95
  assert paths["png"].stat().st_size > 10_000
  image = pixels(paths["png"])
  assert image.shape == (1840, 2200, 3)
  for colour in ("#0072B2", "#D55E00"):  # both models are on both panels
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    near = (np.abs(image - rgb[None, None]) < 0.02).all(axis=-1)
    assert near[:, :1100].sum() > 500 and near[:, 1100:].sum() > 500


@pytest.mark.first_case
@pytest.mark.parametrize("count", [1, 9, 20])
def test_any_number_of_models(tmp_path, count):
  rows = [row(f"model {i}", 4, 50.0 + i) for i in range(count)]
  assert pixels(frontier.write(rows, tmp_path)["png"]).std() > 0.02


def test_drawing_leaves_pyplot_alone(tmp_path):
  import sys

  sys.modules.pop("matplotlib.pyplot", None)
  frontier.write(ROWS, tmp_path)
  assert "matplotlib.pyplot" not in sys.modules


def test_labels_keep_apart():
  from dlm_jax.evaluate import _labels

  moved = _labels.spread([10.0, 50.0, 12.0, 11.0], 13.0)
  assert moved[1] == 50.0
  assert sorted(moved)[:3] == pytest.approx([-2.0, 11.0, 24.0])
  assert moved[0] < moved[3] < moved[2]  # order is kept


def many(count):
  """Return rows of models whose curves cross, and end at different evaluations."""
  return [
    row(f"model {i}", n, (60 + 12 * i) * (1 + 14 / n), 4.8 - 0.05 * i + 0.25 * (1 + 0.3 * i) / n)
    for i in range(count)
    for n in (1, 2, 4, 8, 16, 32)[: 6 - i % 3]
  ]


@pytest.fixture(params=[3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8, 20))])
def drawn(request):
  from dlm_jax.evaluate import _plot

  reference = frontier.Reference(genppl=61.3, entropy=4.9)
  figure = _plot.draw(many(request.param), reference, trade=True)
  figure.draw_without_rendering()
  return request.param, figure


def _words(axes):
  return [text for text in axes.texts if text.get_text() and text.xyann != (0, 9)]


def test_no_line_strikes_a_word(drawn):
  """Names stand beside the axes and numbers where there is room: no line, bar or word is there."""
  from dlm_jax.evaluate import _labels

  count, figure = drawn
  above, below = figure.subfigs
  for axes in (*above.axes, *below.axes):
    words = _words(axes)
    boxes = [word.get_window_extent() for word in words]
    names = {word.get_text() for word in words}
    assert names >= {f"model {i}" for i in range(count)}
    assert [name for name in names if name.startswith("validation text ")]
    assert not [
      w.get_text() for w, box in zip(words, boxes, strict=True) if _labels.struck(axes, box)
    ]
    for box in boxes:
      assert box.x0 >= 0 and box.x1 <= 2200 and box.y0 >= 0 and box.y1 <= 1840
    for i, box in enumerate(boxes if count < 20 else ()):
      assert not any(box.shrunk(0.95, 0.8).overlaps(other) for other in boxes[:i])
  numbers = [word.get_text() for word in _words(below.axes[0]) if word.get_text().isdigit()]
  assert set(numbers) == {"1", "2", "4", "8", "16", "32"}
  assert len(numbers) >= 6 * min(count, 3) - 4


def test_a_line_through_a_word_is_found():
  from matplotlib.figure import Figure
  from matplotlib.transforms import Bbox

  from dlm_jax.evaluate import _labels

  axes = Figure().subplots()
  axes.plot([0, 1], [0, 1])
  (x, y) = axes.transData.transform((0.5, 0.5))
  assert _labels.struck(axes, Bbox([[x - 5, y - 20], [x + 5, y + 20]]))
  assert not _labels.struck(axes, Bbox([[x + 5, y - 40], [x + 15, y - 20]]))


def test_equal_models_are_both_seen(tmp_path):
  rows = [{**r, "name": name} for name in ("a", "b") for r in many(1)]
  image = pixels(frontier.write(rows, tmp_path)["png"])
  for colour in ("#0072B2", "#D55E00"):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    near = (np.abs(image - rgb[None, None]) < 0.02).all(axis=-1)
    # Left of the names in each panel.
    for panel in (near[:840, :800], near[:840, 1100:1900], near[840:, :1900]):
      assert panel.sum() > 500


@pytest.mark.parametrize("entropy", [None, 4.9])
def test_nearness_to_real_text_is_said_where_it_is_drawn(entropy):
  from dlm_jax.evaluate import _plot

  figure = _plot.draw(many(1), entropy and frontier.Reference(entropy=entropy), trade=True)
  said = [text.get_text() for part in figure.subfigs for axes in part.axes for text in axes.texts]
  assert any("nearer to real text" in text for text in said) is (entropy is not None)
  assert not any("dashed lines meet" in text for text in said), "its GenPPL is not known"


@pytest.mark.parametrize(
  ("unknown", "said"),
  [
    ((), "; bars are ± one standard error, unseen where the mark is larger."),
    (("entropy_se",), "; bars of GenPPL are ± one standard error, unseen where"),
    (("genppl_se", "entropy_se"), "512 samples per point."),
  ],
)
def test_bars_are_said_of_what_has_them(unknown, said):
  from dlm_jax.evaluate import _plot

  rows = [{**row, **dict.fromkeys(unknown, math.nan)} for row in ROWS]
  assert said in _plot.draw(rows).get_supxlabel()


def test_crowded_heights_share_the_room():
  from dlm_jax.evaluate import _labels

  moved = _labels.fitted([5.0] * 10, (0.0, 50.0))
  assert sorted(moved) == pytest.approx([2.5 + 5 * i for i in range(10)])


def test_table():
  lines = frontier.table([*ROWS[:2], row("x", 128, 7.0, genppl_se=math.nan, samples=1000)])
  lines = lines.splitlines()
  assert len({len(line) for line in lines}) == 1 and len(lines) == 5
  assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
    "teacher",
    "1",
    "1080.0 ± 54.0",
    "5.20 ± 0.02",
    "0.990",
    "512",
    "1.5",
  ]
  assert "| 7.0 |" in " ".join(lines[-1].split()) and "1,000" in lines[-1]
  guided = frontier.table([ROWS[0], row("x", 8, evaluations=32)]).splitlines()
  assert "all nets" in guided[0] and [c.strip() for c in guided[-1].split("|")][2:4] == ["8", "32"]


@pytest.mark.parametrize("x", list(frontier.AXES))
def test_every_axis(tmp_path, x):
  rows = [*ROWS, row("guided", 8, evaluations=28, seconds=9.0)]
  from dlm_jax.evaluate import _plot

  _plot.save(rows[-1:], tmp_path / "one.png", x=x)  # 28 alone: no power of two is near
  paths = frontier.write(rows, tmp_path, axes=(x,))
  name = "frontier.png" if x == "nfe" else f"frontier_{x}.png"
  assert (tmp_path / name) in paths.values() and (tmp_path / name).stat().st_size > 10_000
