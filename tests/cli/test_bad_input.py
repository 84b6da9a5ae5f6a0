# SPDX-License-Identifier: Apache-2.0
"""Bad input: one line on stderr, exit code 2, nothing half-written."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import tiny_runs

from dlm_jax import draw
from dlm_jax.cli.main import main


@pytest.fixture
def tiny():
  return tiny_runs.make()


@pytest.fixture
def fails(capsys):
  """Return a function that runs a command, checks how it fails, and returns its line."""

  def run(verb, *arguments):
    try:
      code = main([verb, *map(str, arguments)])
    except SystemExit as end:  # the flag parser
      code = end.code
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert len(err.splitlines()) == 1 and err.startswith("dlm-jax"), err
    assert out == "" and "Traceback" not in err
    return err

  return run


@pytest.fixture
def workdir(tmp_path):
  """Return a path that must not exist after the test."""
  yield tmp_path / "workdir"
  assert not (tmp_path / "workdir").exists(), "something was written"


# --- prepare --------------------------------------------------------------------------------------


def _prepare(fails, source, tmp_path, **changes):
  out = tmp_path / "out" / "packed"
  fields = {"data.length": "16", "data.tokenizer": "bytes", "data.options.tests": "none"}
  fields |= {"data.source": source, "data.directory": out, **changes}
  config = tmp_path / "corpus_config.py"
  config.write_text(
    "from dlm_jax.configs.base import base\n\n\ndef get_config():\n  return base()\n"
  )
  fields.pop("data.options.tests")
  line = fails("prepare", f"--config={config}", *(f"--config.{k}={v}" for k, v in fields.items()))
  assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir()), "half-written"
  return line


def test_missing_corpus(fails, tmp_path):
  assert "matches no file" in _prepare(fails, f"files:{tmp_path}/nothing*.txt", tmp_path)


def test_empty_corpus(fails, tmp_path):
  (tmp_path / "empty.txt").write_text("\n \n")
  assert "empty" in _prepare(fails, f"files:{tmp_path}/empty.txt", tmp_path)


def test_undecodable_corpus(fails, tmp_path):
  (tmp_path / "latin.txt").write_bytes(b"a word\n" * 99 + b"caf\xe9\n")
  line = _prepare(fails, f"files:{tmp_path}/latin.txt", tmp_path)
  assert "latin.txt is not UTF-8: byte 0xe9 at offset 696" in line


def test_corpus_shorter_than_the_sequence(fails, tmp_path):
  for name in ("a.txt", "b.txt"):
    (tmp_path / name).write_text("some forty characters of text, no more.")
  options = {"data.options.validation": f"{tmp_path}/b.txt", "data.length": "64"}
  line = _prepare(fails, f"files:{tmp_path}/a.txt", tmp_path, **options)
  assert "length=64 is longer than the train split" in line and "use length <= 42" in line


def test_no_directory(fails, tmp_path):
  line = _prepare(fails, "stdlib", tmp_path, **{"data.directory": ""})
  assert "data.directory is empty" in line


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("data.source", "gutenberg", "source='gutenberg' is unknown"),
    ("data.tokenizer", "bpe:many", "write bpe:SIZE"),
    ("data.tokenizer", "/nowhere", "/nowhere"),
    ("data.length", "2", "length=2"),
    ("data.options.colour", "red", "has no option colour"),
    ("data.directory", "/proc/nowhere/packed", "cannot be written"),
  ],
)
def test_bad_preparation(fails, tmp_path, field, value, message):
  (tmp_path / "a.txt").write_text("text " * 400)
  assert message in _prepare(fails, f"files:{tmp_path}/a.txt", tmp_path, **{field: value})


def test_directory_with_something_else(fails, tiny, tmp_path):
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "precious.txt").write_text("mine")
  line = _prepare(fails, f"files:{tiny.corpus}", tmp_path, **{"data.directory": folder})
  assert "is not a prepared dataset" in line
  assert [path.name for path in folder.iterdir()] == ["precious.txt"]


# --- train: what the configuration says -----------------------------------------------------------

_CONFIG_ERRORS = [
  ("idlm", {"optim__lrr": "1"}, "there is no field 'lrr' (did you mean 'lr'?)"),
  ("idlm", {"optm__lr": "1"}, "there is no group 'optm' (did you mean 'optim'?)"),
  ("idlm", {"optim__lr": "fast"}, "expected float like 2.5e-05, got str"),
  ("idlm", {"train__steps": "2.5"}, "expected int like"),
  ("idlm", {"model__time_conditioning": "3"}, "expected bool like False"),
  ("idlm", {"model": "dit"}, "is a group with the fields"),
  ("idlm", {"objective__name": "idml"}, "did you mean 'idlm'"),
  ("idlm", {"objective__name": "no_such.module"}, "cannot be imported"),
  ("idlm", {"objective__name": "ar"}, "trains a Causal or a Decoder, but model.name='dit'"),
  ("judge", {"objective__name": "mdlm"}, "trains a DiT, but model.name='causal'"),
  ("idlm", {"model__name": "unet"}, "model.name='unet' is unknown; found: causal, decoder, dit"),
  (
    "idlm",
    {"process__name": "absorb"},
    "process.name='absorb' is unknown (did you mean 'absorbing'?); found: ",
  ),
  ("idlm", {"process__schedule": "linear"}, "process.schedule='linear' is unknown"),
  ("idlm", {"optim__schedule": "step"}, "optim.schedule='step' is unknown; use one of constant"),
  ("idlm", {"objective__time_coupling": "none"}, "time_coupling"),
  ("idlm", {"model__attention": "flash"}, "model.attention='flash' is unknown"),
  ("idlm", {"model__heads": "3"}, "model.heads=3 must divide model.dim=8"),
  ("idlm", {"model__dim": "0"}, "model.dim=0 must be at least 1"),
  ("idlm", {"model__vocab_size": "50258"}, "the data needs 301; use 301 or 0"),
  ("idlm", {"loader__batch_size": "100"}, "8-way batch sharding (data=8 × fsdp=1); use 96 or 104"),
  ("idlm", {"objective__accumulate": "3"}, "accumulate=3); use 24 or 48"),
  ("idlm", {"objective__accumulate": "0"}, "accumulate=0"),
  ("idlm", {"mesh__data": "3"}, "does not fit 8 device(s)"),
  ("idlm", {"train__steps": "0"}, "train.steps=0 must be at least 1"),
  ("idlm", {"train__steps": "-5"}, "train.steps=-5 must be at least 1"),
  ("idlm", {"train__log_every": "0"}, "train.log_every=0"),
  ("idlm", {"train__checkpoint_every": "0"}, "train.checkpoint_every=0"),
  ("idlm", {"evaluate__every": "1", "evaluate__nfes": "()"}, "the list of NFEs is empty"),
  ("idlm", {"evaluate__every": "1", "evaluate__nfes": "(4, 0)"}, "NFE 0 is not a whole number"),
  ("idlm", {"evaluate__every": "1", "evaluate__samples": "0"}, "evaluate.samples=0"),
  ("idlm", {"evaluate__every": "1", "evaluate__judge": ""}, "evaluate.judge is empty"),
  ("teacher", {"evaluate__every": "1", "evaluate__batch_size": "0"}, "evaluate.batch_size=0"),
  ("idlm", {"teacher__path": ""}, "distils a teacher"),
  ("idlm", {"teacher__path": "/nowhere"}, "/nowhere holds no network"),
  ("idlm", {"teacher__path": "shipped:student"}, "shipped:student is unknown (did you mean"),
  ("idlm", {"model__dim": "16"}, "model.dim=16, but the teacher"),
  ("idlm", {"model__layers": "2"}, "model.layers=2, but the teacher"),
  (
    "idlm",
    {"data__directory": "/nowhere"},
    "does not exist; write it first with `dlm-jax prepare`",
  ),
  ("idlm", {"data__length": "32"}, "holds sequences of 16 tokens"),
  ("idlm", {"seed": str(2**63)}, "seed=9223372036854775808"),
]


@pytest.mark.parametrize("kind, changes, message", _CONFIG_ERRORS)
def test_config(fails, tiny, workdir, kind, changes, message):
  line = fails("train", *tiny.flags(kind, **changes), f"--workdir={workdir}")
  assert message in line


def test_unknown_config(fails, workdir, tmp_path):
  line = fails("train", "--config=quickstart_idml", f"--workdir={workdir}")
  assert "did you mean 'quickstart_idlm'" in line and "owt_teacher" in line
  assert "no such file" in fails("train", "--config=nowhere.py", f"--workdir={workdir}")
  (tmp_path / "empty.py").write_text("")
  line = fails("train", f"--config={tmp_path}/empty.py", f"--workdir={workdir}")
  assert "defines no get_config()" in line


def test_flags(fails, tiny, workdir):
  assert "--stepps=3" in fails("sample", f"--checkpoint={tiny.teacher}", "--stepps=3")
  assert "--steps" in fails("sample", f"--checkpoint={tiny.teacher}", "--steps=few")
  both = fails("sample", f"--checkpoint={tiny.teacher}", "--model=teacher")
  assert "both --model and --checkpoint given; give one: " in both
  neither = fails("sample")
  assert "neither --model nor --checkpoint given; give one: " in neither
  assert "--model=NAME, one of novels-student, novels-teacher, teacher" in neither
  wrong = fails("sample", "--model=novels-studnet")
  assert "is no shipped model (did you mean 'novels-student'?); choose one of novels-s" in wrong
  assert "choose one of novels-student" in fails("sample", "--model=judge")
  assert "--config" in fails("train", f"--workdir={workdir}")
  assert "--workdir is required" in fails("train", *tiny.flags("teacher"))
  assert "write --config.optim.lr=VALUE" in fails("train", "--config=owt_idlm", "--config.optim.lr")
  assert "did you mean" in fails("trian").lower()


# --- train: what the files hold -------------------------------------------------------------------


def test_teacher_with_another_vocabulary(fails, tiny, workdir):
  """The shipped teacher has 2048 tokens, our data 300."""
  line = fails(
    "train", *tiny.flags("idlm", teacher__path="shipped:teacher"), f"--workdir={workdir}"
  )
  assert "vocabulary of 2048 tokens and the data one of 300" in line and "prepare the data" in line


def test_teacher_with_other_tokens_of_the_same_number(fails, tiny, workdir, tmp_path):
  teacher = pathlib.Path(shutil.copytree(tiny.teacher / "final", tmp_path / "teacher"))
  config = json.loads((teacher / "config.json").read_text())
  config["dlm_jax"]["tokenizer_fingerprint"] = "0" * 64
  (teacher / "config.json").write_text(json.dumps(config))
  line = fails("train", *tiny.flags("idlm", teacher__path=teacher), f"--workdir={workdir}")
  assert "one of 300 others" in line


def test_judge_that_is_a_denoiser(fails, tiny, workdir):
  changes = {"evaluate__judge": tiny.teacher, "evaluate__every": "1"}
  line = fails("train", *tiny.flags("idlm", **changes), f"--workdir={workdir}")
  assert "is a mdlm network; a judge is autoregressive" in line


def test_teacher_that_is_a_judge(fails, tiny, workdir):
  line = fails("train", *tiny.flags("idlm", teacher__path=tiny.judge), f"--workdir={workdir}")
  assert str(tiny.judge) in line


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda d: _truncate(d / "model.safetensors"), "model.safetensors cannot be read"),
    (lambda d: _truncate(d / "config.json"), "cannot be read as JSON"),
    (lambda d: (d / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "bert"),
    (lambda d: (d / "config.json").write_text('{"dim": 4}'), "names no model_type"),
    (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
  ],
)
def test_damaged_or_foreign_network(fails, tiny, tmp_path, damage, message):
  network = pathlib.Path(shutil.copytree(tiny.teacher / "final", tmp_path / "network"))
  damage(network)
  assert message in fails("sample", f"--checkpoint={network}", "--steps=1")
  assert message in fails("convert", f"--checkpoint={network}", f"--out={tmp_path / 'out'}")
  assert not (tmp_path / "out").exists()


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_dataset_that_is_none(fails, tiny, workdir, tmp_path):
  line = fails("train", *tiny.flags("teacher", data__directory=tmp_path), f"--workdir={workdir}")
  assert "is not a prepared dataset" in line
  copy = pathlib.Path(shutil.copytree(tiny.data, tmp_path / "data"))
  _truncate(next(copy.rglob("*.array_record*")))
  line = fails("train", *tiny.flags("teacher", data__directory=copy), f"--workdir={workdir}")
  assert "is truncated or changed" in line


# --- the workdir ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/proc/nowhere", "/sys/nowhere/run"])
def test_workdir_that_cannot_be_written(fails, tiny, place):
  assert f"workdir {place} cannot be written" in fails(
    "train", *tiny.flags("teacher"), f"--workdir={place}"
  )
  model = f"--model=t={tiny.teacher}"
  line = fails("frontier", model, f"--judge={tiny.judge}", "--nfes=1", f"--workdir={place}")
  assert "cannot be written" in line
  assert "cannot be written" in fails("convert", f"--checkpoint={tiny.teacher}", f"--out={place}")
  assert "cannot be written" in fails("quickstart", f"--workdir={place}")


def test_workdir_below_a_file(fails, tiny, tmp_path):
  (tmp_path / "file").write_text("mine")
  line = fails("train", *tiny.flags("teacher"), f"--workdir={tmp_path / 'file' / 'run'}")
  assert "cannot be written: Not a directory" in line
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", ["train", "prepare", "sample", "frontier", "quickstart"])
def test_names_that_are_too_long(fails, tiny, verb, tmp_path):
  name = tmp_path / ("x" * 5000)
  arguments = {
    "train": [*tiny.flags("teacher"), f"--workdir={name}"],
    "prepare": [*tiny.flags("judge", data__directory=name), "--config.data.options.tests=none"],
    "sample": [f"--checkpoint={name}"],
    "frontier": [f"--model=t={name}", f"--judge={tiny.judge}", f"--workdir={tmp_path}/f"],
    "quickstart": [f"--workdir={name}"],
  }
  assert "File name too long" in fails(verb, *arguments[verb])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "name, kind, said",
  [
    ("metrics.jsonl", "folder", "metrics.jsonl cannot be written: Is a directory"),
    ("tensorboard", "file", "tensorboard cannot be written: File exists"),
    ("checkpoints", "file", "cannot write checkpoints to"),
    ("final", "file", "final is a file and not a folder; move it away"),
  ],
)
def test_what_lies_in_a_workdir(fails, tiny, tmp_path, name, kind, said):
  place = tmp_path / name
  place.mkdir() if kind == "folder" else place.write_text("mine")
  assert said in fails("train", *tiny.flags("teacher"), f"--workdir={tmp_path}")
  assert place.is_dir() if kind == "folder" else place.read_text() == "mine"


def test_damaged_records_end_a_training(fails, tiny, tmp_path):
  """The loader reads in threads of its own; the line is the same."""
  copy = pathlib.Path(shutil.copytree(tiny.data, tmp_path / "data"))
  shard = next(copy.rglob("*train.array_record*"))
  content = bytearray(shard.read_bytes())
  content[::40] = bytes(byte ^ 255 for byte in content[::40])
  head = shard.read_bytes()[: 2**16]  # the file opens: its ends are whole
  shard.write_bytes(head + content[2**16 : -(2**17)] + shard.read_bytes()[-(2**17) :])
  workdir = tmp_path / "run"
  line = fails("train", *tiny.flags("teacher", data__directory=copy), f"--workdir={workdir}")
  assert f"of train cannot be read from {shard.name}: " in line and "prepare it again" in line
  assert not (workdir / "final").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Return the workdir of a finished run of two steps."""
  tiny, workdir = tiny_runs.make(), tmp_path_factory.mktemp("finished")
  flags = tiny.flags("teacher", train__steps="2")
  assert main(["train", *flags, f"--workdir={workdir}"]) == 0
  return workdir


def _listing(folder):
  return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_seed_of_64_bits_is_resumed_under_itself(fails, tiny, tmp_path, capsys):
  run = lambda seed, steps: (  # noqa: E731
    "train",
    *tiny.flags("teacher", seed=str(seed), train__steps=steps),
    f"--workdir={tmp_path}",
  )
  assert main(list(run(-(2**40), "1"))) == 0
  capsys.readouterr()
  assert "another config (seed)" in fails(*run(-(2**41), "2"))
  assert "another config (seed)" in fails(*run(draw.fold_32(-(2**40)), "2"))
  assert main(list(run(-(2**40), "2"))) == 0
  assert (tmp_path / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_workdir_of_another_run(fails, tiny, finished):
  before = _listing(finished)
  line = fails("train", *tiny.flags("teacher", seed="7"), f"--workdir={finished}")
  assert "holds a run with another config (seed)" in line
  assert _listing(finished) == before


def test_truncated_checkpoint(fails, tiny, finished, tmp_path):
  """The line names the checkpoint; tests/train/test_resume.py cuts every file."""
  flags = tiny.flags("teacher", train__steps="4")
  step = finished / "checkpoints" / "2"
  largest = max((step / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
  for number, file in enumerate((largest, step / "extra" / "metadata")):
    copy = pathlib.Path(shutil.copytree(finished, tmp_path / str(number)))
    shutil.rmtree(copy / "final")
    _truncate(copy / file.relative_to(finished))
    line = fails("train", *flags, f"--workdir={copy}")
    assert f"{copy / 'checkpoints' / '2'} cannot be restored" in line
    assert not (copy / "final").exists()


def test_foreign_checkpoint(fails, tiny, finished, tmp_path):
  """A checkpoint of another network under our config."""
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  config = tmp_path / "checkpoints" / "config.json"
  stored = json.loads(config.read_text())
  stored["model"]["layers"] = 2
  config.write_text(json.dumps(stored))
  flags = tiny.flags("teacher", train__steps="4", model__layers="2")
  assert "cannot be restored" in fails("train", *flags, f"--workdir={tmp_path}")


def test_checkpoint_directory_that_is_none(fails, tiny, finished, tmp_path):
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  _truncate(tmp_path / "checkpoints" / "config.json")
  line = fails("train", *tiny.flags("teacher", train__steps="4"), f"--workdir={tmp_path}")
  assert "is not a checkpoint directory of dlm_jax" in line


@pytest.mark.slow
def test_corrupted_metrics_are_no_obstacle(tiny, finished, tmp_path):
  """A torn metrics file loses its torn lines, never the run."""
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  with (tmp_path / "metrics.jsonl").open("ab") as file:
    file.write(b'\xff\xfe{"step": ')
  assert main(["train", *tiny.flags("teacher", train__steps="3"), f"--workdir={tmp_path}"]) == 0
  assert [row["step"] for row in tiny_runs.metrics(tmp_path)] == [1, 2, 3]


# --- other verbs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "option, message",
  [
    ("--steps=0", "steps=0: sampling needs at least 1"),
    ("--num=0", "num=0 must be at least 1"),
    ("--length=-4", "length=-4"),
    ("--sampler=euler", "sampler='euler' is unknown"),
    ("--noise_removal=maybe", "noise_removal"),
    ("--precision=half", "precision='half' is unknown"),
    ("--temperature=-1", "temperature=-1.0 must be 0 or more"),
    ("--nucleus=0", "nucleus"),
    ("--prompt=" + "word and " * 99, "the prompt has"),
  ],
)
def test_sample(fails, tiny, option, message):
  assert message in fails("sample", f"--checkpoint={tiny.teacher}", option)


def test_sample_from_a_judge(fails, tiny):
  line = fails("sample", f"--checkpoint={tiny.judge}", "--steps=8")
  assert "steps is no option of a network that writes one token after the other" in line


def test_evaluate(fails, tiny):
  teacher = f"--checkpoint={tiny.teacher}"
  assert "say what to measure" in fails("evaluate", teacher)
  data, judge = f"--data={tiny.data}", f"--judge={tiny.judge}"
  assert "must be positive" in fails("evaluate", teacher, data, "--sequences=0")
  assert "samples=0 must be at least 1" in fails("evaluate", teacher, judge, "--samples=0")
  assert "batch_size=0" in fails("evaluate", teacher, judge, "--batch_size=0")
  assert "is not a prepared dataset" in fails("evaluate", teacher, f"--data={tiny.folder}")
  assert "vocabulary" in fails("evaluate", "--checkpoint=shipped:teacher", data)
  assert "a judge is autoregressive" in fails("evaluate", teacher, f"--judge={tiny.teacher}")


@pytest.mark.slow
def test_frontier(fails, tiny, workdir):
  common = [f"--model=t={tiny.teacher}", f"--judge={tiny.judge}", f"--workdir={workdir}"]
  assert "the list of NFEs is empty" in fails("frontier", *common, "--nfes=")
  assert "NFE 0 is not a whole number" in fails("frontier", *common, "--nfes=4,0")
  assert "is not a list like 1,2,4" in fails("frontier", *common, "--nfes=4,x")
  assert "samples=0" in fails("frontier", *common, "--samples=0")
  assert "write NAME=PATH" in fails("frontier", "--model=runs/a", *common[1:])
  assert "write NAME=PATH" in fails("frontier", "--model=a=runs/a,psi", *common[1:])
  assert "--model=t=… is given twice" in fails("frontier", common[0], *common)
  assert "'wall' is not among nfe" in fails("frontier", *common, "--x=wall")
  assert "give at least two, 0 or more" in fails("frontier", *common, "--temperatures=0.9")
  assert "give at least two, 0 or more" in fails("frontier", *common, "--entropy=4")
  assert "is not a list like" in fails("frontier", *common, "--temperatures=a,b")
  assert "needs a discriminator" in fails(
    "frontier", f"--model=t={tiny.teacher},sampler=rgas", *common[1:]
  )
  wrong = f"--model=t={tiny.teacher},kappa=1"
  assert "has no option 'kappa'" in fails("frontier", wrong, *common[1:], "--nfes=1")
  line = fails("frontier", *common, "--model=s=shipped:teacher")
  assert "has another tokenizer than the first model" in line


def test_quickstart(fails, workdir):
  common = [f"--workdir={workdir}"]
  assert "the list of NFEs is empty" in fails("quickstart", *common, "--nfes=")
  assert "at least 1" in fails("quickstart", *common, "--samples=0")
  assert "there is no field 'lrr'" in fails("quickstart", *common, "--config.optim.lrr=1")
  assert "train.steps=0" in fails("quickstart", *common, "--config.train.steps=0")
  line = fails("quickstart", *common, "--from_scratch", "--teacher_steps=0")
  assert "train.steps=0" in line


@pytest.mark.parametrize("how", [[], ["--pretrained"]], ids=["distilled", "pretrained"])
def test_quickstart_in_a_store(fails, tmp_path, monkeypatch, how):
  monkeypatch.chdir(tmp_path)
  line = fails("quickstart", "--workdir=gs://bucket/run", *how)
  assert "--workdir=gs://bucket/run: the quick start writes to a folder of this machine" in line
  assert not list(tmp_path.iterdir()), "no folder is called gs:"


def test_in_a_process_of_its_own(tiny, tmp_path):
  """The same through the shell's eyes: exit code, one line, no traceback, no directory."""
  flags = tiny.flags("idlm", loader__batch_size="100")
  answer = subprocess.run(
    [sys.executable, "-m", "dlm_jax", "train", *flags, f"--workdir={tmp_path / 'run'}"],
    capture_output=True,
    text=True,
    check=False,
    env=tiny_runs.environment(),
  )
  assert answer.returncode == 2 and answer.stdout == ""
  assert answer.stderr.strip().endswith("use 96 or 104.")
  assert len(answer.stderr.strip().splitlines()) == 1
  assert not (tmp_path / "run").exists()
