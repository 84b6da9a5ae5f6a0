# SPDX-License-Identifier: Apache-2.0
"""The shipped networks: sizes, hashes, and that they know Python."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax import assets, convert, evaluators, experiment, models
from dlm_jax.data import builder, sources
from dlm_jax.errors import InputError
from dlm_jax.evaluate import likelihood

HERE = pathlib.Path(assets.__file__).parent


def test_small_enough():
  files = [path for path in HERE.glob("*/*") if path.is_file() and path.suffix != ".pyc"]
  assert sum(path.stat().st_size for path in files) <= 12e6
  names = {path.relative_to(HERE).as_posix() for path in files}
  assert {f"{name}/model.safetensors" for name in ("teacher", "judge")} <= names
  assert {f"{name}/tokenizer.json" for name in ("teacher", "judge")} <= names
  hashed = set(json.loads((HERE / "sha256.json").read_text()))
  assert names == hashed, "every shipped file has a hash"


def test_load_by_hash():
  for name in ("teacher", "judge"):
    assert assets.path(name) == HERE / name
    _, params, _ = convert.load(assets.path(name))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  with pytest.raises(InputError, match=r"shipped:student is unknown; found: judge, teacher"):
    assets.path("student")


@pytest.mark.parametrize("file", ["teacher/model.safetensors", "judge/tokenizer.json"])
def test_one_changed_byte_is_refused(tmp_path, monkeypatch, file):
  copy = pathlib.Path(shutil.copytree(HERE, tmp_path / "assets"))
  monkeypatch.setattr(assets, "_HERE", copy)
  name = file.split("/")[0]
  assert assets.path(name) == copy / name
  data = bytearray((copy / file).read_bytes())
  data[len(data) // 2] ^= 1
  (copy / file).write_bytes(data)
  with pytest.raises(InputError, match="is damaged: its SHA-256 differs"):
    assets.path(name)
  with pytest.raises(InputError, match="damaged"):
    experiment.network_directory(f"shipped:{name}")
  (copy / file).unlink()
  with pytest.raises(InputError, match="damaged"):
    assets.path(name)


@pytest.fixture(scope="module")
def pipe():
  return dlm_jax.load("shipped:teacher")


@pytest.fixture(scope="module")
def held_out(pipe):
  """Return 64 packed sequences of the standard library's validation modules."""
  texts = sources.open_source("stdlib").documents("validation")
  ids = (pipe.tokenizer.encode(text) for text in texts)
  rows = builder.pack(ids, pipe.length, pipe.tokenizer.eos_id)
  return np.stack([row for row, _ in zip(rows, range(64), strict=False)])


@pytest.fixture(scope="module")
def judge(pipe):
  return evaluators.load_judge("shipped:judge", pipe.tokenizer)


def test_the_judge_knows_held_out_text(judge, held_out):
  scores = likelihood.ar_perplexity(judge.judge, held_out, batch_size=32)
  assert 2 < scores["perplexity"] < 25


def test_the_teacher_knows_held_out_text(pipe, held_out):
  assert isinstance(pipe.denoiser, models.Denoiser)
  scores = likelihood.elbo(pipe.denoiser, pipe.process, held_out, jax.random.key(0), batch_size=32)
  assert 2 < scores["perplexity"] < 40


def test_eight_step_samples_are_sane(pipe, judge):
  quality = judge.quality(np.asarray(pipe.tokens(steps=8, num=32, seed=0)), batch_size=32)
  assert quality.genppl < 600 and 3 < quality.entropy < 5
