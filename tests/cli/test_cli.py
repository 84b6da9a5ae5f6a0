# SPDX-License-Identifier: Apache-2.0
"""The verbs: help, sampling, converting, evaluating, sweeping."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file

from dlm_jax import convert
from dlm_jax.cli import flags
from dlm_jax.cli.main import VERBS, main
from dlm_jax.evaluate import generative
from dlm_jax.text import denoiser


def _help(capsys, verb):
  with pytest.raises(SystemExit) as end:
    main([verb, "--help"])
  assert end.value.code == 0
  return capsys.readouterr().out


def _examples(text):
  lines = text.split("examples:\n")[1].splitlines()
  return [line.strip() for line in lines if line.strip().startswith("dlm-jax ")]


def test_top_level_help(capsys):
  assert main([]) == 0
  text = capsys.readouterr().out
  assert main(["--help"]) == 0
  assert capsys.readouterr().out == text
  assert len(text.splitlines()) < 25 and len(_examples(text)) == 3
  assert all(f"  {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_short_with_three_examples(capsys, verb):
  text = _help(capsys, verb)
  assert len(text.splitlines()) < 45
  assert max(map(len, text.splitlines())) <= 100
  examples = _examples(text)
  assert len(examples) == 3 and all(e.startswith(f"dlm-jax {verb}") for e in examples)


class _ParsedError(Exception):
  """Parsing went well; nothing is to be run."""


@pytest.mark.parametrize("verb", VERBS)
def test_examples_parse(capsys, monkeypatch, verb):
  """Every example is accepted by the verb's own flags, and its config fields exist."""
  examples, seen = _examples(_help(capsys, verb)), []

  def parse(self, argv):
    seen.append(original(self, argv))
    if "config" in vars(seen[-1]):
      flags.load_config(seen[-1])
    raise _ParsedError

  original = flags.Parser.parse
  monkeypatch.setattr(flags.Parser, "parse", parse)
  for example in examples:
    with pytest.raises(_ParsedError):
      importlib.import_module(f"dlm_jax.cli.{verb}").main(shlex.split(example)[2:])
  assert all(isinstance(namespace, argparse.Namespace) for namespace in seen)


def test_examples_of_the_top_level_name_real_verbs(capsys):
  main([])
  for example in _examples(capsys.readouterr().out):
    assert example.split()[1] in VERBS


def test_print_config(capsys):
  assert main(["train", "--config=novels_idlm", "--config.optim.lr=0.25", "--print_config"]) == 0
  text = capsys.readouterr().out
  assert "lr: 0.25" in text and "name: idlm" in text and "max_entropy_drop" in text


def test_dry_run(capsys):
  tiny = tiny_runs.make()
  sizes = {"mesh__data": "2", "mesh__fsdp": "2", "mesh__tensor": "2"}
  assert main(["train", *tiny.flags("idlm", **sizes), "--dry_run"]) == 0
  text = capsys.readouterr().out
  assert "data=2 × fsdp=2 × tensor=2" in text
  assert "trees: fake, student, teacher" in text and "2 × 8 × 16 tokens" in text
  assert "embed/embedding" in text and "301 × 8" in text and "tensor" in text and "fsdp" in text
  total = convert.load(tiny.teacher / "final")[1]
  count = sum(np.size(x) for x in jax.tree.leaves(total))
  assert f"{count:,} parameters per tree" in text
  assert "GiB state and batch" in text


@pytest.mark.slow
def test_dry_run_at_full_size(capsys):
  """Of one tree: that of several is shown by the tiny IDLM above, and takes a minute here."""
  assert main(["train", "--config=owt_teacher", "--dry_run"]) == 0
  text = capsys.readouterr().out
  assert "169,627,218 parameters per tree" in text and "memory per device" in text


# --- sample ---------------------------------------------------------------------------------------


def _sample(capsys, *options):
  code = main(["sample", f"--checkpoint={tiny_runs.make().teacher}", *options])
  assert code == 0
  return capsys.readouterr().out


def test_sample_prints_texts(capsys):
  text = _sample(capsys, "--steps=2", "--num=3", "--seed=1")
  assert [line for line in text.splitlines() if line.startswith("────")] == [
    f"──── {i} ────" for i in (1, 2, 3)
  ]
  assert _sample(capsys, "--steps=2", "--num=3", "--seed=1") == text
  assert _sample(capsys, "--steps=2", "--num=3", "--seed=2") != text


def test_sample_json_and_prompt(capsys):
  text = _sample(capsys, "--steps=2", "--num=3", "--prompt=def parse", "--json")
  texts = [json.loads(line) for line in text.splitlines()]
  assert len(texts) == 3 and all("def parse" in t for t in texts)


@pytest.mark.first_case
@pytest.mark.parametrize(
  "options",
  [
    ["--sampler=first_hitting", "--length=8"],
    ["--noise_removal=greedy", "--temperature=0.5", "--nucleus=0.9", "--steps=2"],
    ["--precision=legacy", "--steps=2"],
    ["--sampler=psi", "--option=kappa=0.5", "--steps=2"],
    ["--sampler=psi", "--option", "kappa=rescale", "--option", "eta=0.5", "--steps=2"],
  ],
)
def test_sample_options(capsys, options):
  assert _sample(capsys, *options).startswith("──── 1 ────\n")


def test_sample_shows_the_steps(capsys):
  text = _sample(capsys, "--steps=2", "--show_steps")
  assert text.startswith("step 1: ") and "step 2: " in text and "\x1b" not in text
  assert "16 of 16 tokens" in text
  assert text.count("step ") == 2, "what is left to the removal of noise is no third step"
  text = _sample(capsys, "--steps=2", "--show_steps", "--prompt=def parse")
  (total,) = set(re.findall(r" of (\d+) tokens", text))
  assert int(total) < 16, "a prompt is not drawn"


@pytest.mark.slow
def test_sample_prints_no_separators(capsys):
  text = _sample(capsys, "--steps=2", "--num=4", "--prompt=a")
  assert "<|endoftext|>" not in text
  assert "<|endoftext|>" in _sample(capsys, "--steps=2", "--prompt=a", "--json"), "exact there"


@pytest.mark.slow
def test_sample_writes_a_page(capsys, tmp_path):
  page = tmp_path / "page.html"
  page.write_text("before")
  arguments = ["sample", f"--checkpoint={tiny_runs.make().teacher}", "--steps=2", "--num=2"]
  plain = _sample(capsys, *arguments[2:])
  code = main([*arguments, f"--html={page}"])
  out, err = capsys.readouterr()
  assert code == 0 and out == plain, "the texts are printed as without it"
  assert err == f"page: {page}\n" and [file.name for file in tmp_path.iterdir()] == ["page.html"]
  assert page.read_text().count("<pre title=") == 3, "a start and two steps"
  assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
  ("place", "said"),
  [
    ("", "is a folder; name a file"),
    ("none/page.html", "cannot be written: No such file"),
    ("s3://bucket/page.html", "is a file of this machine"),
  ],
)
def test_sample_refuses_a_place_for_the_page_first(capsys, tmp_path, monkeypatch, place, said):
  monkeypatch.setattr(denoiser, "load_denoiser", pytest.fail)
  place = place if "://" in place else tmp_path / place
  assert main(["sample", f"--checkpoint={tiny_runs.make().teacher}", f"--html={place}"]) == 2
  out, err = capsys.readouterr()
  assert said in err and len(err.splitlines()) == 1 and not out
  assert not list(tmp_path.iterdir())


def test_a_page_that_fails_leaves_what_was_there(capsys, tmp_path):
  page = tmp_path / "page.html"
  page.write_text("before")
  arguments = ["sample", f"--checkpoint={tiny_runs.make().teacher}", f"--html={page}"]
  assert main([*arguments, "--sampler=none"]) == 2
  assert page.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
  assert main(["sample", f"--checkpoint={tiny_runs.make().judge}", f"--html={page}"]) == 2
  assert "writes from left to right" in capsys.readouterr().err


def test_sample_names_both_ways_to_name_a_network(capsys):
  text = " ".join(_help(capsys, "sample").split())
  assert "usage: dlm-jax sample (--model=NAME | --checkpoint=PATH)" in text
  assert "`dlm-jax models` lists" in text


# --- convert --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teacher", "judge"])
def test_convert_round_trip_in_bfloat16(capsys, tmp_path, kind):
  source = getattr(tiny_runs.make(), kind)
  out = tmp_path / "out"
  assert main(["convert", f"--checkpoint={source}", f"--out={out}", "--dtype=bfloat16"]) == 0
  assert "bfloat16" in capsys.readouterr().out
  before = convert.load(source / "final")
  after = convert.load(out)
  assert before[0] == after[0] and before[2] == after[2]
  for a, b in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
    np.testing.assert_array_equal(a.astype("bfloat16").astype("float32"), b)
  files = {path.name for path in out.iterdir()}
  assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
  ours = convert.read_config(source / "final")["dlm_jax"]
  assert convert.read_config(out)["dlm_jax"] == ours

  again = tmp_path / "again"
  assert main(["convert", f"--checkpoint={out}", f"--out={again}", "--dtype=bfloat16"]) == 0
  first, second = (load_file(p / "model.safetensors") for p in (out, again))
  assert all((first[name] == second[name]).all() for name in first)


def test_convert_refuses_a_used_directory(capsys, tmp_path):
  (tmp_path / "precious.txt").write_text("mine")
  assert main(["convert", f"--checkpoint={tiny_runs.make().teacher}", f"--out={tmp_path}"]) == 2
  assert "is not empty" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


# --- evaluate and frontier ------------------------------------------------------------------------


def test_evaluate_likelihood_and_samples(capsys):
  tiny = tiny_runs.make()
  both = ["--sequences=8", "--batch_size=8", "--steps=2", "--samples=12", f"--judge={tiny.judge}"]
  arguments = ["evaluate", f"--checkpoint={tiny.teacher}", f"--data={tiny.data}", *both]
  assert main(arguments) == 0
  text = capsys.readouterr().out
  assert "perplexity bound" in text and "bits per byte" in text and "GenPPL" in text
  assert main([*arguments, "--json"]) == 0
  scores = json.loads(capsys.readouterr().out)
  assert scores["samples"] == 12 and scores["genppl"] > 1 and scores["entropy"] > 0
  assert generative.plus_minus(scores["perplexity"], scores["perplexity_se"], 2) in text


def test_evaluate_a_judge(capsys):
  tiny = tiny_runs.make()
  code = main(["evaluate", f"--checkpoint={tiny.judge}", f"--data={tiny.data}", "--sequences=8"])
  assert code == 0
  assert capsys.readouterr().out.startswith("perplexity ")


def _frontier(folder, *models):
  """Return arguments that compare the teacher with itself; {} is its path."""
  tiny = tiny_runs.make()
  models = [f"--model={model.format(tiny.teacher)}" for model in models]
  return ["frontier", *models, f"--judge={tiny.judge}", f"--workdir={folder}"]


def test_frontier(capsys, tmp_path):
  cold = "cold={},temperature=0.1,noise_removal=greedy"
  arguments = _frontier(tmp_path, "a={}", "b={}", cold)
  arguments += ["--nfes=1,2", "--samples=8", "--batch_size=8"]
  assert main(arguments) == 0
  text = capsys.readouterr().out
  assert text.count("| a") == 2 and text.count("| b") == 2
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"frontier.csv", "frontier.json", "frontier.png", "frontier.jsonl"}
  rows = json.loads((tmp_path / "frontier.json").read_text())["rows"]
  pairs = [(name, nfe) for name in ("a", "b", "cold") for nfe in (1, 2)]
  assert [(row["name"], row["nfe"]) for row in rows] == pairs
  assert rows[4]["options"] == {"temperature": 0.1, "noise_removal": "greedy"}
  assert rows[5]["entropy"] < rows[1]["entropy"], "a low temperature"
  assert rows[0]["genppl"] == rows[2]["genppl"], "one network, the same keys"
  assert main(arguments) == 0
  again = capsys.readouterr().out
  assert again == text, "nothing is measured twice: the seconds are the same too"


@pytest.mark.slow
def test_frontier_draws_held_out_text(capsys, tmp_path):
  """A prepared dataset, and a text file; another run of the same sweep may ask for another one."""
  tiny, few = tiny_runs.make(), ["--nfes=1", "--samples=4", "--batch_size=4"]
  arguments = [*_frontier(tmp_path / "out", "a={}"), *few]
  references = []
  text = tmp_path / "text.txt"
  text.write_text("".join(tiny_runs.documents()[:8]))
  for path in (tiny.data, text):
    assert main([*arguments, f"--held_out={path}"]) == 0
    said = capsys.readouterr().out
    reference = json.loads((tmp_path / "out" / "frontier.json").read_text())["reference"]
    assert (
      f"4 validation texts: {reference['genppl']:.1f} at {reference['entropy']:.2f} nats" in said
    )
    references.append(reference["genppl"])
  assert references[0] != references[1]


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (None, "cannot be read: No such file"),
    ("short", "is shorter than one sample of 16 tokens"),
    (b"\xff\xfe\xff", "is not UTF-8"),
  ],
)
def test_frontier_refuses_held_out_text_first(capsys, tmp_path, monkeypatch, content, said):
  monkeypatch.setattr("dlm_jax.cli.frontier.load_judge", pytest.fail)
  text = tmp_path / "text.txt"
  if content is not None:
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
  arguments = [*_frontier(tmp_path / "out", "a={}"), f"--held_out={text}"]
  assert main(arguments) == 2
  error = capsys.readouterr().err
  assert said in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_frontier_at_matched_entropy(capsys, tmp_path):
  arguments = _frontier(tmp_path, "a={}", "b={},nucleus=0.9")
  arguments += ["--nfes=2", "--samples=16", "--temperatures=0.3,1.5", "--x=nfe,evaluations,seconds"]
  assert main(arguments) == 0
  assert "at matched entropy" in capsys.readouterr().out
  names = {path.name for path in tmp_path.iterdir()}
  assert names >= {"frontier_evaluations.png", "frontier_seconds.png", "matched.png", "matched.csv"}
  rows = json.loads((tmp_path / "matched.json").read_text())["rows"]
  assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["entropy"] == rows[1]["entropy"]
  capsys.readouterr()
  assert main([*arguments, "--entropy=99"]) == 0
  assert "not every model reaches the entropy" in capsys.readouterr().out


def test_frontier_beside_a_baseline(capsys, tmp_path):
  """Its exact limit is drawn with as many evaluations as a text has tokens, whatever the NFEs."""
  arguments = _frontier(tmp_path, "a={}", "spaced={},order=spaced")
  arguments += ["--nfes=2", "--samples=8", "--temperatures=0.3,1.5", "--baseline=a"]
  assert main(arguments) == 0
  out = capsys.readouterr().out
  assert "GenPPL at common entropies:" in out and "evaluations saved beside a, two errors" in out
  rows = json.loads((tmp_path / "frontier.json").read_text())["rows"]
  assert [row["name"] for row in rows] == ["a", "spaced", "a, exact limit"]
  assert rows[-1]["nfe"] == rows[-1]["evaluations"] > 2
  assert rows[-1]["options"] == {"sampler": "first_hitting"}
  assert rows[1]["options"] == {"order": "spaced"} and 0 < rows[1]["distinct_4"] <= 1
  table = out.partition("evaluations saved beside")[2]
  assert "| spaced " in table and "| a " not in table and "exact limit |" not in table
  assert ("no saving is shown" in table) or ("times fewer evaluations" in table)


def test_module_is_the_command():
  """`python -m dlm_jax` and the console script's entry point."""
  answer = subprocess.run(
    [sys.executable, "-m", "dlm_jax", "smaple"], capture_output=True, text=True, check=False
  )
  assert answer.returncode == 2 and answer.stdout == ""
  assert "'smaple' is no verb" in answer.stderr and "(did you mean 'sample'?)" in answer.stderr
  assert len(answer.stderr.splitlines()) == 1


def test_models_lists_what_can_be_named(capsys):
  assert main(["models"]) == 0
  text = capsys.readouterr().out
  for name in ("novels-student", "own_text:teacher", "sdar:8b", "first_hitting", "didi_instruct"):
    assert f"  {name} " in text, name
  assert max(map(len, text.splitlines())) < 160 and "None" not in text
  assert main(["models", "experiments", "--match=idlm"]) == 0
  head, *rows = capsys.readouterr().out.splitlines()
  assert head.startswith("experiments") and rows and all("idlm" in row for row in rows)
  assert main(["models", "networks", "--match=no such"]) == 0
  assert capsys.readouterr().out.splitlines()[1:] == ["  none"]
