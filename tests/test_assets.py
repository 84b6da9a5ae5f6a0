# SPDX-License-Identifier: Apache-2.0
"""The shipped networks: sizes, hashes, and that they know Python."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax import assets, convert, models
from dlm_jax.cli.main import main
from dlm_jax.convert import places
from dlm_jax.data import builder, sources
from dlm_jax.errors import InputError
from dlm_jax.evaluate import likelihood
from dlm_jax.evaluate.judge import load_judge
from dlm_jax.quickstart import shipped

NOVELS_PERPLEXITY = 60  # the judge's on held-out novels is 40, the teacher's bound 60
HERE = pathlib.Path(assets.__file__).parent


NETWORKS = ("judge", "novels-judge", "novels-student", "novels-teacher", "teacher")


def _files():
  return [path for path in HERE.glob("*/*") if path.is_file() and path.suffix != ".pyc"]


def test_small_enough():
  files, size = _files(), {}
  for path in files:
    size[path.parent.name] = size.get(path.parent.name, 0) + path.stat().st_size
  assert size["teacher"] + size["judge"] <= 12e6
  assert size["novels-teacher"] + size["novels-student"] + size["novels-judge"] <= 40e6
  assert (HERE / "novels-judge" / "held_out.txt").stat().st_size <= 200e3
  names = {path.relative_to(HERE).as_posix() for path in files}
  wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
  assert {f"{network}/{file}" for network in NETWORKS for file in wanted} <= names
  hashed = set(json.loads((HERE / "sha256.json").read_text()))
  assert names == hashed, "every shipped file has a hash"


def test_names_resolve():
  assert assets.names() == list(NETWORKS)
  assert assets.denoisers() == ["novels-student", "novels-teacher", "teacher"]
  for name in NETWORKS:
    assert assets.path(name) == HERE / name
    assert (convert.open_network(HERE / name).writes == "grid") == (name in assets.denoisers()), (
      name
    )
    _, params, _ = convert.load(assets.path(name))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  with pytest.raises(InputError, match=r"shipped:poems is unknown; found: judge, novels-judge,"):
    assets.path("poems")
  with pytest.raises(InputError, match=r"\(did you mean 'novels-student'\?\)"):
    assets.path("novel-studnet")


def test_held_out_text():
  books = assets.held_out("novels-judge").split("\n\n\n\n")
  assert [book.splitlines()[0] for book in books] == ["Wuthering Heights", "FELIX HOLT,"]
  with pytest.raises(InputError, match="shipped:judge came without held-out text"):
    assets.held_out("judge")


@pytest.mark.parametrize(
  "file",
  [
    "teacher/model.safetensors",
    "judge/tokenizer.json",
    "novels-student/config.json",
    "novels-judge/held_out.txt",
  ],
)
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
    places.network_directory(f"shipped:{name}")
  (copy / file).unlink()
  with pytest.raises(InputError, match="damaged"):
    assets.path(name)


def test_the_command_line_refuses_damage_in_one_line(tmp_path, monkeypatch, capsys):
  copy = pathlib.Path(shutil.copytree(HERE, tmp_path / "assets"))
  monkeypatch.setattr(assets, "_HERE", copy)
  with (copy / "novels-student" / "model.safetensors").open("ab") as file:
    file.write(b"x")
  assert main(["sample", "--model=novels-student", "--steps=1"]) == 2
  answer = capsys.readouterr()
  assert answer.out == "" and len(answer.err.splitlines()) == 1
  assert "model.safetensors is damaged: its SHA-256 differs" in answer.err


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
  return load_judge("shipped:judge", pipe.tokenizer)


def test_the_judge_knows_held_out_text(judge, held_out):
  scores = likelihood.ar_perplexity(judge.judge, held_out, batch_size=32)
  assert 2 < scores["perplexity"] < 25


@pytest.mark.slow
def test_the_teacher_knows_held_out_text(pipe, held_out):
  assert isinstance(pipe.denoiser, models.Denoiser)
  scores = likelihood.elbo(pipe.denoiser, pipe.process, held_out, jax.random.key(0), batch_size=32)
  assert 2 < scores["perplexity"] < 40


@pytest.mark.slow
def test_eight_step_samples_are_sane(pipe, judge):
  quality = judge.quality(np.asarray(pipe.tokens(steps=8, num=32, seed=0)), batch_size=32)
  assert quality.genppl < 600 and 3 < quality.entropy < 5


# --- the novels -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def novels():
  return {name: dlm_jax.load(f"shipped:novels-{name}") for name in ("teacher", "student")}


@pytest.fixture(scope="module")
def novels_judge(novels):
  return load_judge("shipped:novels-judge", novels["teacher"].tokenizer)


def test_the_novels_pair_is_a_pair(novels):
  """One shape, one tokenizer, other weights; about as large as the README says."""
  teacher, student = novels["teacher"], novels["student"]
  assert teacher.tokenizer.fingerprint == student.tokenizer.fingerprint
  assert teacher.tokenizer.vocab_size == 4096 and teacher.length == student.length == 256
  assert teacher.denoiser.model == student.denoiser.model and teacher.process == student.process
  sizes = [sum(x.size for x in jax.tree.leaves(p.denoiser.params)) for p in (teacher, student)]
  assert sizes[0] == sizes[1] and 7e6 < sizes[0] < 8e6
  assert convert.fingerprint(HERE / "novels-teacher") != convert.fingerprint(
    HERE / "novels-student"
  )
  assert convert.read_config(HERE / "novels-student")["dlm_jax"]["objective"] == "idlm"
  assert convert.read_config(HERE / "novels-student")["dlm_jax"]["step"] > 0


def test_the_novels_know_held_out_text(novels, novels_judge):
  """As the configs say; the texts are not among those that they were trained on."""
  rows = shipped.held_out(novels["teacher"])
  assert rows.shape[1] == 256 and 150 < len(rows) < 256
  scores = likelihood.ar_perplexity(novels_judge.judge, rows[:8], batch_size=8)
  assert scores["perplexity"] < NOVELS_PERPLEXITY
  teacher = novels["teacher"]
  scores = likelihood.elbo(
    teacher.denoiser, teacher.process, rows[:8], jax.random.key(0), batch_size=8
  )
  assert scores["perplexity"] < 2 * NOVELS_PERPLEXITY


def test_the_novels_student_writes(novels, novels_judge):
  tokens_BL = np.asarray(novels["student"].tokens(steps=8, num=8, seed=0))
  assert (tokens_BL < 4096).all()
  assert novels_judge.quality(tokens_BL, batch_size=8).entropy > 3
