# SPDX-License-Identifier: Apache-2.0
"""Proteins from FASTA to samples: special tokens are given, several lengths, bitwise resume."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from compiled import at_most
from safetensors.numpy import load_file

import dlm_jax
from dlm_jax import convert, mesh, models, objectives
from dlm_jax.cli.main import main
from dlm_jax.data import builder, loader, tokenizers
from dlm_jax.errors import InputError
from dlm_jax.evaluate import frontier
from dlm_jax.experiment import build, plan
from dlm_jax.experiment.config import load_config
from dlm_jax.experiment.run import open_data, train
from dlm_jax.train import loop

ESM = tokenizers.Esm()
GIVEN = ESM.given_ids
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
ESM_LETTERS = f"{LETTERS}XBUZO.-"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """FASTA, a prepared dataset with buckets of 8 and 16, and a judge with random parameters."""
  folder, draw = tmp_path_factory.mktemp("proteins"), random.Random(0)
  lengths = [draw.choice((4, 5, 6, 8, 10, 14)) for _ in range(60)]
  texts = ["".join(draw.choices(LETTERS, k=length)) for length in lengths]
  (folder / "some.fasta").write_text("".join(f">p{i}\n{t}\n" for i, t in enumerate(texts)))
  build.prepare(plan.read_data(config(folder, "teacher")), progress=False)
  tiny_runs.export(config(folder, "judge"), folder / "judge" / "final")
  return folder


def overrides(folder, kind, **changes):
  fields = {**tiny_runs.SHAPE, **tiny_runs.TRAINING, "data.buckets": "8,16"}
  fields |= {"data.source": f"fasta:{folder}/*.fasta", "data.directory": str(folder / "data")}
  fields |= {"data.options.min_length": "3", "data.options.validation_fraction": "0.2"}
  if kind != "judge":
    fields["model.cond_dim"] = "4"
  if kind == "idlm":
    fields |= {"teacher.path": str(folder / "teacher"), "evaluate.judge": str(folder / "judge")}
    fields |= {"evaluate.nfes": "2", "evaluate.max_entropy_drop": "100.0"}
  return fields | {name.replace("__", "."): str(value) for name, value in changes.items()}


def config(folder, kind, **changes):
  return load_config(f"proteins_{kind}", overrides(folder, kind, **changes))


@pytest.fixture(scope="module")
def teacher(folder):
  """A teacher, trained for six steps with evaluations."""
  train(config(folder, "teacher", evaluate__every="3"), folder / "teacher")
  return folder / "teacher"


def same(one, other):
  ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
  assert ours.keys() == theirs.keys()
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_what_is_special_is_never_valid(folder):
  traced, seen = [], set()

  def step(state, batch):
    traced.append(batch["tokens"].shape[1])
    return state.replace(step=state.step + 1), {"valid": batch["valid"], "tokens": batch["tokens"]}

  state = objectives.TrainState(step=jnp.zeros((), jnp.int32), trees={}, opt={}, ema={})
  devices = mesh.make(devices=jax.devices()[:1])
  shardings = jax.tree.map(lambda _: mesh.replicated(devices), state)
  state = jax.device_put(state, shardings)
  run = loop.jit_step(objectives.Objective(None, at_most(step, 2)), devices, shardings, 0)
  stream = loader.make(folder / "data", "train", batch_size=8, seed=0)
  for _ in range(8):
    record = next(stream)
    tokens = record["tokens"]
    split = lambda x: jax.device_put(jnp.asarray(x)[None], mesh.batch_sharding(devices, 1))  # noqa: E731
    placed = jax.tree.map(split, record)
    state, out = run(state, placed)
    np.testing.assert_array_equal(out["tokens"], tokens)
    np.testing.assert_array_equal(out["valid"], tokens > 3)
    seen.add(tokens.shape[1])
  assert sorted(traced) == sorted(seen) == [8, 16], "compiled once per length"


@pytest.mark.slow
def test_a_teacher_keeps_what_it_needs_to_be_sampled(folder, teacher):
  rows = tiny_runs.metrics(teacher)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  # 27 ids may be predicted, and the network starts uniform over them
  assert all(10 < row["validation/perplexity"] < 40 for row in rows if row["step"] in (3, 6))
  stored = convert.read_config(teacher / "final")["dlm_jax"]
  assert stored["process"]["blocked"] == list(GIVEN) and stored["buckets"] == [8, 16]
  assert tokenizers.load(teacher / "final") == ESM
  pipe = dlm_jax.load(teacher)
  assert pipe.process.blocked == GIVEN and pipe.buckets == (8, 16)


@pytest.mark.slow
def test_resume_is_bitwise(folder, teacher, tmp_path):
  short = config(folder, "teacher", evaluate__every="3", train__steps="4")
  train(short, tmp_path)
  train(config(folder, "teacher", evaluate__every="3"), tmp_path)
  assert tiny_runs.metrics(tmp_path) == tiny_runs.metrics(teacher)
  for name in ("final", "best"):
    same(tmp_path / name, teacher / name)


@pytest.mark.slow
def test_a_student_is_judged_on_samples_of_validation_lengths(folder, teacher, tmp_path):
  run = {"evaluate__every": "2", "train__steps": "4"}
  assert train(config(folder, "idlm", **run), tmp_path).reason == "finished"
  rows = tiny_runs.metrics(tmp_path)
  assert [row["step"] for row in rows] == list(range(5))
  scored = [row for row in rows if "nfe2/genppl" in row]
  assert [row["step"] for row in scored] == [0, 2, 4]
  # at most log 14: a sample has 14 residues or fewer, and padding does not count
  assert all(1 < row["nfe2/entropy"] < np.log(14) for row in scored)
  assert convert.load(tmp_path / "final")[2].blocked == GIVEN


@pytest.mark.slow
def test_samples_have_the_length_that_is_asked_for(teacher, capsys):
  pipe = dlm_jax.load(teacher)
  options = {"num": 3, "steps": 2}  # always the same: compiled once per bucket
  for length in (1, 6, 7, 14):
    texts = pipe(length=length, **options)
    assert all(len(text) == length and set(text) <= set(ESM_LETTERS) for text in texts)
    assert pipe.tokens(length=length, **options).shape == (3, 8 if length <= 6 else 16)
  assert pipe(**options) == texts  # by default as long as can be
  texts = pipe(length=9, prompt="mkt", **options)
  assert all(text.startswith("MKT") and len(text) == 9 for text in texts)
  row = np.asarray(pipe.tokens(length=3, **options))[0]
  assert row[0] == ESM.cls_id and row[4:].tolist() == [ESM.eos_id] + [ESM.pad_id] * 3
  arguments = [f"--checkpoint={teacher}", "--steps=2", "--num=3", "--length=5"]
  assert main(["sample", *arguments, "--json"]) == 0
  assert [len(json.loads(line)) for line in capsys.readouterr().out.splitlines()] == [5, 5, 5]
  assert main(["sample", *arguments, "--show_steps", "--prompt=MK"]) == 0
  shown = capsys.readouterr().out
  assert shown.count("step ") == 2 and shown.count(" of 3 tokens") == 2, "a frame is not drawn"
  assert shown.splitlines()[-1].startswith("MK") and len(shown.splitlines()[-1]) == 5
  for bad, message in (
    (["--length=15"], "length=15: the longest sequence that this network was trained on has 14"),
    (["--prompt=ACDEFG"], "the prompt has 6 residues and length=5"),
    (["--prompt=J"], "'J' is no residue"),
  ):
    assert main(["sample", *arguments, *bad]) == 2
    assert message in capsys.readouterr().err


def test_prepare_counts_residues(folder, tmp_path, capsys):
  flags = overrides(folder, "teacher", data__directory=tmp_path / "data")
  flags = [f"--config.{name}={value}" for name, value in flags.items()]
  assert main(["prepare", "--config=proteins_teacher", *flags]) == 0
  said = capsys.readouterr().out
  dataset = builder.open_dataset(tmp_path / "data")
  for split in ("train", "validation"):
    lengths = dataset.lengths(split) - 2
    count = f"{split}: {len(lengths):,} records, {lengths.sum():,} residues"
    assert f"{count}, {lengths.mean():.1f} per protein; " in said
  assert "padded to 8" in said and "bytes per token" not in said


@pytest.mark.slow
def test_evaluate_prints_what_proteins_are_like(folder, teacher, capsys):
  arguments = [f"--checkpoint={teacher}", f"--data={folder / 'data'}", "--samples=5", "--steps=2"]
  assert main(["evaluate", *arguments, f"--judge={folder / 'judge'}"]) == 0
  first, second, third = capsys.readouterr().out.splitlines()
  assert first.startswith("perplexity bound ") and "bits per byte" in first
  assert second.startswith("2 steps: GenPPL ") and "(5 samples, " in second
  assert third.startswith("2 steps: composition KL ") and "(5 samples)" in third
  dataset = builder.open_dataset(folder / "data")
  assert f"{dataset.info.splits['train'].records} training sequences" in third
  residues = (dataset.lengths("validation") - 2).sum()
  assert f"({residues} tokens)" in first
  assert main(["evaluate", *arguments, "--json"]) == 0
  scores = json.loads(capsys.readouterr().out)
  assert {"perplexity", "composition_kl", "novelty", "pairwise_identity", "entropy"} <= set(scores)
  assert "genppl" not in scores
  assert main(["evaluate", *arguments[:2], "--samples=0"]) == 0
  assert len(capsys.readouterr().out.splitlines()) == 1
  assert main(["evaluate", f"--checkpoint={folder / 'judge'}", arguments[1]]) == 0
  assert capsys.readouterr().out.startswith("perplexity ")


@pytest.mark.slow
def test_frontier_of_proteins(folder, teacher, tmp_path, capsys):
  """Samples are as long as validation records; only residues are judged, guided or not."""
  convert.save_beside(teacher / "best", "discriminator", _critic(teacher))
  data = folder / "data"
  arguments = ["frontier", f"--judge={folder / 'judge'}", "--samples=5", "--batch_size=4"]
  arguments += ["--nfes=2", f"--workdir={tmp_path}", f"--model=plain={teacher}"]
  arguments += [f"--model=guided={teacher},sampler=rgas,candidates=2"]
  assert main(arguments) == 2 and "--data=DIR" in capsys.readouterr().err
  assert main([*arguments, f"--data={data}"]) == 0
  rows = {row["name"]: row for row in json.loads((tmp_path / "frontier.json").read_text())["rows"]}
  residues = builder.open_dataset(data).lengths("validation")[:5] - 2
  for row in rows.values():
    assert row["tokens"] == residues.sum() and 10 < row["genppl"] < 60
  assert rows["plain"]["evaluations"] == 2 and rows["guided"]["evaluations"] > 2
  evaluated = ["evaluate", f"--checkpoint={teacher}", f"--data={data}", "--samples=5", "--steps=2"]
  options = ["--option", "sampler=rgas", "--option", "candidates=2", "--json"]
  assert main([*evaluated, f"--judge={folder / 'judge'}", "--batch_size=4", *options]) == 0
  scores = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert scores["genppl"] == pytest.approx(rows["guided"]["genppl"], rel=1e-5)


def _critic(teacher):
  """Return a discriminator of the teacher's own trunk, with a fresh head."""
  model, params, _ = convert.load(teacher / "best", dtype="float32")
  judge = models.Discriminator(model.config, trained_layers=1)
  fresh = judge.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.zeros(1))
  params = models.discriminator.from_trunk(judge, params, fresh["params"]["head"])
  return models.Critic(model=judge, params=params, spectral=fresh["spectral"])


def test_what_does_not_fit_is_told(folder, teacher, tmp_path):
  with pytest.raises(
    InputError, match=r"data.buckets=\(16,\), but .* was prepared with 'documents'"
  ):
    open_data(plan.read_data(config(folder, "teacher", data__buckets="()")))
  with pytest.raises(InputError, match=r"process.name='uniform' would draw the special ids"):
    uniform = {"process__name": "uniform", "model__time_conditioning": "True"}
    build.experiment(plan.read(config(folder, "teacher", **uniform)), 32, blocked=GIVEN)
  pipe = dlm_jax.load(teacher)
  sampler = frontier.Sampler(denoiser=pipe.denoiser, process=pipe.process, length=16)
  with pytest.raises(InputError, match="proteins are drawn with a start, an end and given lengths"):
    sampler.check()
